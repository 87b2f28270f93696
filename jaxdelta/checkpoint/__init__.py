"""Where weights come from: the hub, safetensors, PyTorch, Orbax, float8, adapters, controls."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__,
    Checkpoint="checkpoint",
    Weights="weights",
    load_model="checkpoint",
    open_checkpoint="checkpoint",
)
