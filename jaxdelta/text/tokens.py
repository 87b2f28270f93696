"""A calibration text as token ids in windows, with the document and position of each token."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int32

from jaxdelta.errors import JaxDeltaError

PADDING = -1  # the document of padding


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids in B windows of T tokens, with the document and the position of each token.

    A segment attends only to itself; it begins where `positions` is 0, by default with each window. Padding
    at the end of a window is a segment of document -1. `texts(window, index)` is a token's text, if known.

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
        valid = (self.positions[:, 1:] == 0) | (np.diff(self.positions) == 1)
        if self.positions[:, 0].any() or not valid.all():
            raise JaxDeltaError("positions must begin with 0 in every window and go on by 1, or from 0 again")

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
        """The tokens that statistics count: all but padding and the first of a segment, an attention sink."""
        return (self.positions > 0) & (self.documents != PADDING)

    @property
    def segmented(self) -> bool:
        """Whether any window has more than one segment, not counting padding."""
        return bool(((self.positions[:, 1:] == 0) & (self.documents[:, 1:] != PADDING)).any())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, documents and positions, in hexadecimal."""
        digest = hashlib.sha256(b"jaxdelta tokens 1")
        for array in (self.ids.shape, self.ids, self.documents, self.positions):
            digest.update(np.asarray(array, "<i4").tobytes())
        return digest.hexdigest()

    def text(self, window: int, position: int) -> str:
        """A token's text, or its id in angle brackets if the text is unknown."""
        if self.texts is None:
            return f"<{self.ids[window, position]}>"
        return self.texts(window, position)
