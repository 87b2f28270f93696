"""A calibration text as token ids in windows, with the document and position of each token."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jaxdelta.errors import UsageError
from jaxdelta.utils.arrays import check_between, check_positions, whole_numbers

# What a caller gives for an array: `Tokens` checks and converts it, so that the tests' type checker need not.
if TYPE_CHECKING:
    GivenNumbers = Int32[np.ndarray, "B T"]
else:
    GivenNumbers = object

PADDING = -1  # the document of padding


class Roles(NamedTuple):
    """The roles of a chat's tokens: token i has `names[of_token[i]]`; the first name is of what the template
    writes around the messages. `template` is the template's SHA-256."""

    of_token: Int32[np.ndarray, "B T"]
    names: tuple[str, ...]
    template: str


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids in B windows of T tokens, with the document and the position of each token.

    A segment attends only to itself; it begins where `positions` is 0, by default with each window. Padding
    at the end of a window is a segment of document -1. `texts(window, index)` is a token's text, if known.
    `roles` are those of chats. `measured` are the tokens that --measure chooses; None for all.

    Equal if ids, documents and positions are.

    Raises:
        UsageError: ids or documents that are not whole numbers of one shape; an id below 0; positions that do
            not count up from 0; text that attends to padding before it.
    """

    ids: GivenNumbers
    documents: GivenNumbers
    texts: Callable[[int, int], str] | None = None
    positions: GivenNumbers = None  # type: ignore[assignment]  # filled in below
    roles: Roles | None = None
    measured: Bool[np.ndarray, "B T"] | None = None

    def __post_init__(self) -> None:
        ids, documents = whole_numbers(self.ids, "ids"), whole_numbers(self.documents, "documents")
        if documents.shape != ids.shape:
            raise UsageError(f"documents have shape {documents.shape}, the ids {ids.shape}")
        check_between(ids, "ids", 0, np.iinfo(np.int32).max)
        check_between(documents, "documents", PADDING, np.iinfo(np.int32).max)
        if self.positions is None:
            positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        else:
            positions = whole_numbers(self.positions, "positions")
            check_positions(positions, ids.shape)
        padding = documents == PADDING
        if (padding[:, :-1] & ~padding[:, 1:] & (positions[:, 1:] != 0)).any():
            raise UsageError("documents: text after padding must begin a segment, with position 0")
        for name, array in (("ids", ids), ("documents", documents), ("positions", positions)):
            object.__setattr__(self, name, array)

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, Tokens) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def check_vocabulary(self, size: int) -> None:
        """Refuses ids that a model with `size` tokens has no embedding for, padding's too.

        Raises:
            UsageError: the first of them and its place.
        """
        check_between(self.ids, "ids", 0, size - 1)

    @property
    def count(self) -> int:
        """Number of tokens, without padding."""
        return int((self.documents != PADDING).sum())

    @property
    def padding(self) -> float:
        """Share of padding in the windows."""
        return 1 - self.count / self.ids.size

    @property
    def counted(self) -> Bool[np.ndarray, "B T"]:
        """The tokens that statistics count: all measured ones but padding and the first of a segment, an
        attention sink."""
        counted = (self.positions > 0) & (self.documents != PADDING)
        return counted if self.measured is None else counted & self.measured

    @property
    def by_role(self) -> dict[str, int]:
        """Numbers of tokens by role; empty for texts that are no chats."""
        if self.roles is None:
            return {}
        numbers = np.bincount(self.roles.of_token[self.documents != PADDING], minlength=len(self.roles.names))
        return dict(zip(self.roles.names, numbers.tolist(), strict=True))

    @property
    def segmented(self) -> bool:
        """Whether any window has more than one segment, not counting padding."""
        return bool(((self.positions[:, 1:] == 0) & (self.documents[:, 1:] != PADDING)).any())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, documents and positions, and of `measured` if given, in hexadecimal."""
        digest = hashlib.sha256(b"jaxdelta tokens 1")
        for array in (self.ids.shape, self.ids, self.documents, self.positions):
            digest.update(np.asarray(array, "<i4").tobytes())
        if self.measured is not None:
            digest.update(np.packbits(self.measured).tobytes())
        return digest.hexdigest()

    def text(self, window: int, position: int) -> str:
        """A token's text, or its id in angle brackets if the text is unknown."""
        if self.texts is None:
            return f"<{self.ids[window, position]}>"
        return self.texts(window, position)
