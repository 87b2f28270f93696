"""The same summaries from second moments, for a text too long to keep its updates."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, LayerMoments="summary", MomentAccumulator="accumulate", MomentSummaries="accumulate"
)
