"""The layer-major pass: all tokens through one layer at a time."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, DeviceMesh="mesh", OneDevice="devices", PassPlan="sweep", Sweep="sweep"
)
