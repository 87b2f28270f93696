"""The decoder in Flax: configuration, layers, attention, rotary embedding, experts, loss."""
