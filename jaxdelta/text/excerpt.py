"""What a run's file keeps of its text: its beginning, and the tokens around those that own σ_1."""

from collections.abc import Iterable, Iterator
from typing import Any

from jaxdelta.text.tokens import Tokens

REACH = 8  # tokens before and after an owner
BEGINNING = 24  # tokens


def excerpt(tokens: Tokens, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """For the JSON.

    Args:
        tokens: the text.
        rows: the layers' rows; owners of σ_1 in any of their views are looked for.

    Returns:
        `begins`, the text's first tokens, and `around`: position -> token, of all that stand near an owner
        and in its window.
    """
    length = tokens.ids.shape[1]
    near: set[int] = set()
    for position in set(_owners(rows)):
        window, place = divmod(position, length)
        near |= {window * length + i for i in range(max(0, place - REACH), min(length, place + REACH + 1))}
    return {
        "begins": "".join(tokens.text(0, i) for i in range(min(BEGINNING, length))),
        "around": {str(position): tokens.text(*divmod(position, length)) for position in sorted(near)},
    }


def context(text: dict[str, Any] | None, position: int) -> tuple[str, str]:
    """What stands before and after the token at this position, as far as the run kept it."""
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
