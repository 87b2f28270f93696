"""The number of tokens in a view."""

from jaxdelta.statistics.per_layer.inputs import ViewData
from jaxdelta.statistics.per_layer.registry import statistic


@statistic("n", needs="view", label="tokens", range=(1, None), figure=None)
def token_count(view: ViewData) -> int:
    """Tokens in the view."""
    return view.n


@statistic(
    "n_over_d",
    needs="view",
    label="tokens per dimension",
    range=(0, None),
    trap="a true rank of 1024 reads 620 at n = 1024",
    figure=None,
)
def tokens_per_dimension(view: ViewData) -> float:
    """n/d."""
    return view.n / view.hidden
