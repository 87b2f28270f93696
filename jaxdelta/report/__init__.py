"""What a run leaves and shows: the result, tables, pages, charts, comparisons."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, Analysis="analysis", Result="result", page_file="page", steering_file="steering"
)
