"""What a run leaves and shows: the result, tables, pages, charts, comparisons."""
