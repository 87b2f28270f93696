"""Where weights come from: the hub, safetensors, PyTorch, Orbax, float8, controls."""
