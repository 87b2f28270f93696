"""From an update to a summary of each of its views: spectrum, directions, groups, tokens."""
