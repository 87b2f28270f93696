"""Which tokens of a text statistics count: all, those of a role, or a range of positions."""

import dataclasses
import re

import numpy as np
from jaxtyping import Bool

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.text.tokens import PADDING, Tokens

ALL = "all"
_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?")
_ROLE = re.compile(r"[^\W\d][\w.-]*")


def measured_role(measure: str) -> str | None:
    """The role that `measure` names, or None."""
    return measure if measure != ALL and _ROLE.fullmatch(measure) else None


def check_measure(measure: str) -> None:
    """Raises a UsageError for what is neither `all` nor a role nor a range such as 10: or 5:100."""
    if (
        measured_role(measure) is None
        and measure != ALL
        and (measure == ":" or not _RANGE.fullmatch(measure))
    ):
        raise UsageError(
            f"measure must be all, a role such as assistant or user, or a range of positions such as 10: or "
            f"5:100, not {measure!r}"
        )


def measured(tokens: Tokens, measure: str) -> Tokens:
    """The tokens with a mask of those chosen by `measure`: statistics count these, all pass the model.

    A role chooses its messages' tokens. A range START:STOP chooses positions in each document, counted from 0
    as in Python: a negative number counts from the end of what is read of the document.

    Raises:
        JaxDeltaError: the text has no roles, or fewer than two of the chosen tokens count.
    """
    if measure == ALL:
        return tokens
    role = measured_role(measure)
    chosen = _of_role(tokens, role) if role else _in_range(tokens, measure)
    if tokens.measured is not None:
        chosen &= tokens.measured
    tokens = dataclasses.replace(tokens, measured=chosen)
    if (count := int(tokens.counted.sum())) < 2:
        roles = ", ".join(f"{name} ({number} tokens)" for name, number in tokens.by_role.items())
        raise JaxDeltaError(
            f"--measure={measure} leaves {count} of {tokens.count} tokens to count; at least 2 are needed"
            + (f"; the roles are {roles}" if roles else "")
        )
    return tokens


def _of_role(tokens: Tokens, role: str) -> Bool[np.ndarray, "B T"]:
    if tokens.roles is None:
        raise JaxDeltaError(
            f"--measure={role} needs chats (lists of messages with roles), and the text has none; choose "
            "all, or a range of positions such as 10:"
        )
    if role not in tokens.roles.names:
        return np.zeros(tokens.ids.shape, bool)
    return tokens.roles.of_token == tokens.roles.names.index(role)


def _in_range(tokens: Tokens, measure: str) -> Bool[np.ndarray, "B T"]:
    """In packed windows, a document's pieces follow each other in order."""
    start, stop = (int(bound) if bound else None for bound in measure.split(":"))
    documents = tokens.documents.ravel()
    order = np.argsort(documents, kind="stable")
    _, firsts, document, lengths = np.unique(
        documents[order], return_index=True, return_inverse=True, return_counts=True
    )
    places, lengths = np.empty(len(order), np.int64), lengths[document]
    places[order], length = np.arange(len(order)) - firsts[document], np.empty_like(places)
    length[order] = lengths
    low = 0 if start is None else start + (length if start < 0 else 0)
    high = length if stop is None else stop + (length if stop < 0 else 0)
    chosen = (places >= low) & (places < high) & (documents != PADDING)
    return np.asarray(chosen.reshape(tokens.ids.shape))
