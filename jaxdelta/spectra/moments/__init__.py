"""The same summaries from second moments, for a text too long to keep its updates."""
