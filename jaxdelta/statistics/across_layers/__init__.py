"""How the directions of the layers relate: overlaps, subspaces, nulls, phases."""
