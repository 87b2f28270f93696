"""A calibration text as token ids in windows, with the document and position of each token."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jaxdelta.errors import JaxDeltaError

PADDING = -1  # the document of padding


class Roles(NamedTuple):
    """The roles of a chat's tokens: token i has `names[of_token[i]]`; the first name is of what the template
    writes around the messages. `template` is the template's SHA-256."""

    of_token: Int32[np.ndarray, "B T"]
    names: tuple[str, ...]
    template: str


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids in B windows of T tokens, with the document and the position of each token.

    A segment attends only to itself; it begins where `positions` is 0, by default with each window. Padding
    at the end of a window is a segment of document -1. `texts(window, index)` is a token's text, if known.
    `roles` are those of chats. `measured` are the tokens that --measure chooses; None for all.

    Raises:
        JaxDeltaError: positions that do not count up from 0.
    """

    ids: Int32[np.ndarray, "B T"]
    documents: Int32[np.ndarray, "B T"]
    texts: Callable[[int, int], str] | None = None
    positions: Int32[np.ndarray, "B T"] = None  # type: ignore[assignment]  # filled in below
    roles: Roles | None = None
    measured: Bool[np.ndarray, "B T"] | None = None

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
