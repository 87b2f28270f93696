"""Statistics with intervals and nulls, of one layer and across layers."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, LayerRecord="layer_row", layer_record="layer_row", p_value="intervals", t_interval="intervals"
)
