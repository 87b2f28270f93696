"""From an update to a summary of each of its views: spectrum, directions, groups, tokens."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, LayerSummary="view_summary", Summaries="scheduler", View="views", ViewSummary="view_summary"
)
