"""The decoder in Flax: configuration, layers, attention, rotary embedding, experts, loss."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__,
    Decoder="decoder",
    ModelConfig="config",
    final_norm="decoder",
    logits="decoder",
    next_token_loss="loss",
    residual_stream="decoder",
)
