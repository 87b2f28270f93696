"""A whole run: analyze(), its options, memory plan, provenance, resuming, merging."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, Options="options", Plan="memory_plan", RunContext="context", merge_runs="merge"
)
