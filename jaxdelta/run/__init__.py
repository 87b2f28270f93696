"""A whole run: analyze(), its options, memory plan, provenance, resuming, merging."""
