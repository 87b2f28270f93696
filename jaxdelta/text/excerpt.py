"""The part of a text in a run's file: its beginning, and the tokens around the owners of σ_1."""

from collections.abc import Iterable, Iterator
from typing import Any

from jaxdelta.text.tokens import Tokens

REACH = 8  # tokens before and after an owner
BEGINNING = 24  # tokens


def excerpt(tokens: Tokens, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The JSON of a text, given its layers' rows.

    `begins` is the text of the first tokens; `around` maps position -> token for all tokens near an owner of
    σ_1 in its window, over all layers and views.
    """
    length = tokens.ids.shape[1]
    near: set[int] = set()
    for position in set(_owners(rows)):
        start, index = position - position % length, position % length
        near.update(range(start + max(0, index - REACH), start + min(length, index + REACH + 1)))
    return {
        "begins": "".join(tokens.text(0, i) for i in range(min(BEGINNING, length))),
        "around": {str(position): tokens.text(*divmod(position, length)) for position in sorted(near)},
    }


def context(text: dict[str, Any] | None, position: int) -> tuple[str, str]:
    """The text before and after the token at a position, as far as the run kept it."""
    around = (text or {}).get("around", {})

    def walk(step: int) -> Iterator[str]:
        for i in range(1, REACH + 1):
            token = around.get(str(position + step * i))
            if token is None:
                return
            yield token

    return "".join(reversed([*walk(-1)])), "".join(walk(1))


def _owners(rows: Iterable[Any]) -> Iterator[int]:
    for row in rows:
        yield from (owner["position"] for owner in row.get("sigma1_tokens") or [])
        yield from _owners(value for value in row.values() if isinstance(value, dict))
