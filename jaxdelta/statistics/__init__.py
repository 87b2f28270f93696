"""Statistics with intervals and nulls, of one layer and across layers."""
