"""A calibration text as token ids in windows, with the document and position of each token."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int32

from jaxdelta.errors import JaxDeltaError

PADDING = -1  # in the place of a document


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids in windows, each with the document it begins in, and its position in its segment.

    A segment attends to nothing but itself. It begins where `positions` is 0, by default with each window.
    What fills up a window is a segment of its own, of document -1. `texts` gives, where it is known, the text
    of the token in a window and a place.

    Raises:
        JaxDeltaError: positions that do not count up from 0.
    """

    ids: Int32[np.ndarray, "B T"]
    documents: Int32[np.ndarray, "B T"]
    texts: Callable[[int, int], str] | None = None
    positions: Int32[np.ndarray, "B T"] = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        if self.positions is None:
            length = self.ids.shape[1]
            row = np.broadcast_to(np.arange(length, dtype=np.int32), self.ids.shape)
            object.__setattr__(self, "positions", row)
            return
        goes_on = (self.positions[:, 1:] == 0) | (np.diff(self.positions) == 1)
        if self.positions[:, 0].any() or not goes_on.all():
            raise JaxDeltaError("positions must begin with 0 in every window and go on by 1, or from 0 again")

    @property
    def count(self) -> int:
        """Number of tokens, without those that fill up windows."""
        return int((self.documents != PADDING).sum())

    @property
    def padding(self) -> float:
        """Share of the windows that no token of the text fills."""
        return 1 - self.count / self.ids.size

    @property
    def counted(self) -> Bool[np.ndarray, "B T"]:
        """The tokens that figures are taken of: all but the first of every segment, an attention sink."""
        return (self.positions > 0) & (self.documents != PADDING)

    @property
    def segmented(self) -> bool:
        """Whether any window has more than one segment, apart from what fills it up, which nobody sees."""
        return bool(((self.positions[:, 1:] == 0) & (self.documents[:, 1:] != PADDING)).any())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, documents and positions, in hexadecimal: the same for the same text alone."""
        digest = hashlib.sha256(b"jaxdelta tokens 1")
        for array in (self.ids.shape, self.ids, self.documents, self.positions):
            digest.update(np.asarray(array, "<i4").tobytes())
        return digest.hexdigest()

    def text(self, window: int, position: int) -> str:
        """A token's text, or else its id in angle brackets."""
        if self.texts is None:
            return f"<{self.ids[window, position]}>"
        return self.texts(window, position)
