"""The layer-major pass: all tokens through one layer at a time."""
