"""Resampling groups: a text's documents, their bootstrap draws and their divisions into halves."""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from jaxdelta.text.tokens import Tokens
from jaxdelta.utils.arrays import AnyArray

MAX_GROUPS = 40  # memory and time of resampling grow with their number
RUNS = 10  # groups of consecutive windows or tokens in a long text
RUN_TOKENS = 4096  # the text is long above
HALVINGS = 10


class Groups(NamedTuple):
    """The resampling groups of the tokens of an update.

    `membership[g, i]` is 1 where token i is in group g, else 0.
    """

    membership: Float64[AnyArray, "G n"]


@dataclasses.dataclass(frozen=True)
class ResamplingGroups:
    """A text and the groups of its counted tokens that resampling draws.

    Tokens of one document are not independent, so a group is one document or several. `group_of_token[i]` is
    the group of token i; `draws[b, g]` counts group g in bootstrap draw b (B = 0 without intervals);
    `halves[r, s, g]` is 1 where group g is in half s of the r-th division.
    """

    tokens: Tokens
    group_of_token: Int[np.ndarray, " n"]
    draws: Float64[np.ndarray, "B G"]
    halves: Float64[np.ndarray, "R 2 G"]

    @classmethod
    def of(cls, tokens: Tokens, bootstrap: int, seed: int) -> "ResamplingGroups":
        """The groups of a text, with `bootstrap` draws and HALVINGS random divisions into halves."""
        return cls.grouped(tokens, _groups_of(tokens, seed), bootstrap, seed)

    @classmethod
    def grouped(
        cls, tokens: Tokens, group_of_token: Int[np.ndarray, " n"], bootstrap: int, seed: int
    ) -> "ResamplingGroups":
        """The same for given groups."""
        count = int(group_of_token.max()) + 1
        draws, halves = cluster_weights(count, bootstrap, seed), half_weights(count, HALVINGS, seed)
        return cls(tokens, group_of_token, draws, halves)

    def coarser(self, most: int, seed: int) -> "ResamplingGroups":
        """At most `most` groups, by merging neighbours."""
        if self.documents <= most:
            return self
        return ResamplingGroups.grouped(
            self.tokens, self.group_of_token * most // self.documents, len(self.draws), seed
        )

    @property
    def most_in_a_window(self) -> int:
        """The largest number of groups in a window."""
        window = np.nonzero(self.tokens.counted)[0]
        pairs = np.unique(window * self.documents + self.group_of_token)
        return int(np.bincount(pairs // self.documents).max())

    @property
    def groups(self) -> Groups:
        """The arrays for the device."""
        return Groups(self.membership)

    @property
    def documents(self) -> int:
        """The number of groups."""
        return self.halves.shape[2]

    @property
    def membership(self) -> Float64[np.ndarray, "G n"]:
        """`Groups.membership`."""
        return (self.group_of_token == np.arange(self.documents)[:, None]).astype(np.float64)

    @property
    def without(self) -> Float64[np.ndarray, "G G"]:
        """The leave-one-out draws: row g has all groups but g."""
        return 1 - np.eye(self.documents)

    @property
    def intervals(self) -> bool:
        """Whether there are draws of more than one group."""
        return len(self.draws) > 0 and self.documents > 1

    @cached_property
    def places(self) -> Int[np.ndarray, " n"]:
        """The positions of the counted tokens in the text."""
        return np.flatnonzero(self.tokens.counted)


def cluster_weights(groups: int, draws: int, seed: int) -> Float64[np.ndarray, "B G"]:
    """Counts of each of G groups in B draws of G with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(np.float64)


def half_weights(groups: int, repeats: int, seed: int) -> Float64[np.ndarray, "R 2 G"]:
    """R random divisions of G groups into halves, the second one larger if G is odd; none if G < 2."""
    first = np.tile(np.arange(groups) < groups // 2, (repeats if groups > 1 else 0, 1))
    first = np.random.default_rng(seed).permuted(first, axis=1)
    return np.stack([first, ~first], axis=1).astype(np.float64)


def _groups_of(tokens: Tokens, seed: int) -> Int[np.ndarray, " n"]:
    """The group of every counted token.

    Each document is a group; more than MAX_GROUPS are merged at random. A long text is cut into RUNS runs of
    windows instead if it has that many, or else of tokens if it has fewer documents.
    """
    counted = tokens.counted
    documents = np.unique(tokens.documents[counted], return_inverse=True)[1].reshape(-1)
    count, n = int(documents.max()) + 1, len(documents)
    if n > RUN_TOKENS and len(counted) >= RUNS:
        runs = np.repeat(np.arange(len(counted)) * RUNS // len(counted), counted.sum(axis=1))
        return np.unique(runs, return_inverse=True)[1].reshape(-1)  # not all need have tokens that count
    if n > RUN_TOKENS and count < RUNS:
        return np.arange(n) * RUNS // n
    if count > MAX_GROUPS:
        order = np.random.default_rng(seed).permutation(count)
        return np.asarray(order[documents] % MAX_GROUPS)
    return documents
