"""The model families: each reads its config.json into a ModelConfig and writes it back."""
