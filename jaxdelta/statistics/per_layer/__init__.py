"""Statistics of a single layer."""
