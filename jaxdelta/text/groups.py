"""Resampling groups: the documents of a text, bootstrap draws and halves of them."""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from jaxdelta.text.tokens import Tokens
from jaxdelta.utils.arrays import AnyArray

MAX_GROUPS = 40  # more documents are merged at random: memory and time of resampling grow with the number
RUNS = 10  # groups of a long text that has enough windows
RUN_TOKENS = 4096  # of a longer text each group is a run of consecutive windows, or tokens
HALVINGS = 10


class Groups(NamedTuple):
    """The resampling groups of the tokens of an update.

    `membership[g, i]` is 1 where token i is in group g, else 0; `halves[r, s, g]` is 1 where group g is in
    half s of the r-th division.
    """

    membership: Float64[AnyArray, "G n"]
    halves: Float64[AnyArray, "R 2 G"]


@dataclasses.dataclass(frozen=True)
class ResamplingGroups:
    """The tokens of every update and the groups of them that resampling draws.

    Tokens of one document are not independent, so a group is a document, or several of them. `group_of_token[i]` is
    the group of token i; `draws[b, g]` is how often group g is in bootstrap draw b (no rows without
    intervals); `halves` as in `Groups`.
    """

    tokens: Tokens
    group_of_token: Int[np.ndarray, " n"]
    draws: Float64[np.ndarray, "B G"]
    halves: Float64[np.ndarray, "R 2 G"]

    @classmethod
    def of(cls, tokens: Tokens, bootstrap: int, seed: int) -> "ResamplingGroups":
        """The groups of a text, `bootstrap` draws of them, and random divisions of them into halves."""
        return cls.grouped(tokens, _groups_of(tokens, seed), bootstrap, seed)

    @classmethod
    def grouped(
        cls, tokens: Tokens, group_of_token: Int[np.ndarray, " n"], bootstrap: int, seed: int
    ) -> "ResamplingGroups":
        """The same with the group of every token given."""
        count = int(group_of_token.max()) + 1
        draws, halves = cluster_weights(count, bootstrap, seed), half_weights(count, HALVINGS, seed)
        return cls(tokens, group_of_token, draws, halves)

    def coarser(self, most: int, seed: int) -> "ResamplingGroups":
        """At most this number of groups, neighbours merged."""
        if self.documents <= most:
            return self
        return ResamplingGroups.grouped(
            self.tokens, self.group_of_token * most // self.documents, len(self.draws), seed
        )

    @property
    def most_in_a_window(self) -> int:
        """The largest number of groups that a window has tokens of."""
        window = np.nonzero(self.tokens.counted)[0]
        pairs = np.unique(window * self.documents + self.group_of_token)
        return int(np.bincount(pairs // self.documents).max())

    @property
    def groups(self) -> Groups:
        """The arrays that the device needs."""
        return Groups(self.membership, self.halves)

    @property
    def documents(self) -> int:
        """The number of documents, or groups of them."""
        return self.halves.shape[2]

    @property
    def membership(self) -> Float64[np.ndarray, "G n"]:
        """1 where a token is in a group, else 0."""
        return (self.group_of_token == np.arange(self.documents)[:, None]).astype(np.float64)

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


def _groups_of(tokens: Tokens, seed: int) -> Int[np.ndarray, " n"]:
    """The group of every token that counts.

    Each document is a group; more than MAX_GROUPS are merged at random. A long text with few documents, or
    with many windows, is cut into RUNS runs instead: of windows, where there are as many.
    """
    counted = tokens.counted
    documents = np.unique(tokens.documents[counted], return_inverse=True)[1].reshape(-1)
    count, n = int(documents.max()) + 1, len(documents)
    if n > RUN_TOKENS and len(counted) >= RUNS:
        return np.repeat(np.arange(len(counted)) * RUNS // len(counted), counted.sum(axis=1))
    if n > RUN_TOKENS and count < RUNS:
        return np.arange(n) * RUNS // n
    if count > MAX_GROUPS:
        order = np.random.default_rng(seed).permutation(count)
        return np.asarray(order[documents] % MAX_GROUPS)
    return documents
