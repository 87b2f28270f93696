"""The decoder in Flax: configuration, layers, attention, rotary embedding, experts, loss."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, Decoder="decoder", ModelConfig="config", logits="decoder", residual_stream="decoder"
)
