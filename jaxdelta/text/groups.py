"""Resampling groups: the documents of a text, bootstrap draws and halves of them."""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int32

from jaxdelta.text.tokens import Tokens
from jaxdelta.utils.arrays import AnyArray

LONG = 4096  # tokens that figures are taken of: of more, an update is not kept, see `pooling`
MAX_WINDOW_GROUPS = 10  # of a long text: each has moments of its own
MAX_GROUPS = 40  # more documents are put together at random: what resampling keeps grows with their number
HALVINGS = 10


class Groups(NamedTuple):
    """The text's documents, or groups of them: they are drawn anew, since tokens of one are not independent.

    `membership[g, i]` is 1 where token i is in group g, else 0; `halves[r, s, g]` is 1 where group g is in
    half s of the r-th division.
    """

    membership: Float64[AnyArray, "G n"]
    halves: Float64[AnyArray, "R 2 G"]

    @classmethod
    def none(cls, halves: Float64[AnyArray, "R 2 G"]) -> "Groups":
        """Of no token: where groups are known otherwise."""
        return cls(np.zeros((halves.shape[2], 0)), halves)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The tokens of every update: where they are from, and how their documents are drawn anew.

    `owners` are the tokens' groups: each a document, or several. `draws[b, g]` says how often group g is in
    draw b; there are none without intervals. `windows` are the windows' groups where the text is so long that
    its updates are not kept: then a group is windows that follow each other.
    """

    tokens: Tokens
    owners: Int[np.ndarray, " n"]
    draws: Float64[np.ndarray, "B G"]
    halves: Float64[np.ndarray, "R 2 G"]
    windows: Int32[np.ndarray, " W"] | None = None

    @classmethod
    def of(
        cls, tokens: Tokens, bootstrap: int, seed: int, resampled: bool = True, pooled: bool = False
    ) -> "Sample":
        """Groups of the text's documents, `bootstrap` draws of them, and their divisions into halves; a long
        text, or one to be `pooled` like that, is one group if it is not to be resampled."""
        counted, windows = tokens.counted, None
        owners: np.ndarray
        if pooled or counted.sum() > LONG:
            count = min(MAX_WINDOW_GROUPS, len(counted)) if resampled else 1
            windows = (np.arange(len(counted)) * count // len(counted)).astype(np.int32)
            owners = np.repeat(windows, counted.sum(axis=1))
        else:
            owners = np.unique(tokens.documents[counted], return_inverse=True)[1].reshape(-1)
            count = int(owners.max()) + 1
            if count > MAX_GROUPS:
                order = np.random.default_rng(seed).permutation(count)
                owners, count = order[owners] % MAX_GROUPS, MAX_GROUPS
        draws, halves = cluster_weights(count, bootstrap, seed), half_weights(count, HALVINGS, seed)
        return cls(tokens, owners, draws, halves, windows)

    @property
    def groups(self) -> Groups:
        """What the device needs to know of it."""
        return Groups(self.membership, self.halves)

    @property
    def documents(self) -> int:
        """The number of documents, or groups of them."""
        return self.halves.shape[2]

    @property
    def membership(self) -> Float64[np.ndarray, "G n"]:
        """1 where a token is in a group, else 0."""
        return (self.owners == np.arange(self.documents)[:, None]).astype(np.float64)

    @property
    def without(self) -> Float64[np.ndarray, "G G"]:
        """The draws that have all groups but one."""
        return 1 - np.eye(self.documents)

    @property
    def intervals(self) -> bool:
        """Whether there is anything to draw: of one document there is not."""
        return len(self.draws) > 0 and self.documents > 1

    @cached_property
    def places(self) -> Int[np.ndarray, " n"]:
        """Where the tokens of an update are among all of the text."""
        return np.flatnonzero(self.tokens.counted)


def cluster_weights(groups: int, draws: int, seed: int) -> Float64[np.ndarray, "B G"]:
    """How often each of G documents is drawn when G are drawn with replacement, B times."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(np.float64)


def half_weights(groups: int, repeats: int, seed: int) -> Float64[np.ndarray, "R 2 G"]:
    """Which documents are in the first and which in the second half, R random times; none if G < 2.

    The second half has one more where G is odd.
    """
    rng = np.random.default_rng(seed)
    first = np.tile(np.arange(groups) < groups // 2, (repeats if groups > 1 else 0, 1))
    first = rng.permuted(first, axis=1)
    return np.stack([first, ~first], axis=1).astype(np.float64)
