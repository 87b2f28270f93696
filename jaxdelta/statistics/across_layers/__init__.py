"""Comparison of the layers' directions: overlaps, subspaces, nulls, phases."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, Overlaps="overlap", Phases="phases", compare_layers="table", verdicts="verdict"
)
