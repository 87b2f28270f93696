"""How benchmarks time: sides in turn, whole processes, an older commit's tree."""
