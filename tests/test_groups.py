"""The groups of a text that resampling draws: documents, or runs of them, of windows, or of tokens."""

import numpy as np
import pytest
from updates import tokens

from jaxdelta.text.groups import HALVINGS, MAX_GROUPS, RUN_TOKENS, RUNS, ResamplingGroups
from jaxdelta.text.tokens import PADDING, Tokens


def text(windows: int, length: int, documents: int, last: int | None = None) -> Tokens:
    """Windows of this length, the last with fewer tokens where that is given; documents of one length."""
    count = (windows - 1) * length + (length if last is None else last)
    owners = np.arange(windows * length) * documents // count
    owners = np.where(np.arange(windows * length) < count, owners, PADDING).astype(np.int32)
    return Tokens(np.zeros((windows, length), np.int32), owners.reshape(windows, length))


def document_of(of: Tokens) -> np.ndarray:
    """The document of each token that counts."""
    return of.documents[of.counted]


def test_a_short_text_has_its_documents() -> None:
    of = text(2, 50, 7)
    np.testing.assert_array_equal(ResamplingGroups.of(of, 0, 0).group_of_token, document_of(of))


@pytest.mark.parametrize(("windows", "length"), [(2, 101), (4, 2048)], ids=["short", "long, few windows"])
def test_many_documents_are_merged_at_random(windows: int, length: int) -> None:
    """Whole, and as many into each group."""
    of = text(windows, length, 100)
    samples = [ResamplingGroups.of(of, 0, seed) for seed in (0, 0, 1)]
    assert samples[0].documents == MAX_GROUPS
    pairs = np.unique(np.stack([document_of(of), samples[0].group_of_token]), axis=1)
    assert pairs.shape[1] == 100
    assert set(np.bincount(pairs[1]).tolist()) == {2, 3}
    np.testing.assert_array_equal(samples[0].group_of_token, samples[1].group_of_token)
    assert (samples[0].group_of_token != samples[2].group_of_token).any()


def test_a_long_text_of_many_windows_has_runs_of_them() -> None:
    of = text(25, 200, 60)
    found = ResamplingGroups.of(of, 0, 0)
    assert len(found.group_of_token) > RUN_TOKENS and found.documents == RUNS and found.most_in_a_window == 1
    of_window = [np.unique(own) for own in np.split(found.group_of_token, 25)]
    np.testing.assert_array_equal(np.concatenate(of_window), np.arange(25) * RUNS // 25)


def test_a_long_text_of_few_windows_and_documents_has_runs_of_tokens() -> None:
    of = text(3, 2048, 4)
    found = ResamplingGroups.of(of, 0, 0)
    assert found.documents == RUNS and found.most_in_a_window > 1
    assert (np.diff(found.group_of_token) >= 0).all()
    sizes = np.bincount(found.group_of_token)
    assert sizes.max() - sizes.min() <= 1


def test_a_long_text_of_few_windows_and_many_documents_has_its_documents() -> None:
    of = text(3, 2048, 30)
    np.testing.assert_array_equal(ResamplingGroups.of(of, 0, 0).group_of_token, document_of(of))


@pytest.mark.parametrize("documents", [12, 60])
def test_a_token_more_changes_no_number_of_groups(documents: int) -> None:
    """4,099 and 4,100 tokens, of which 4,096 and 4,097 count: a short text and a long one."""
    samples = [ResamplingGroups.of(text(3, 2048, documents, last), 0, 0) for last in (3, 4)]
    assert [len(sample.group_of_token) for sample in samples] == [RUN_TOKENS, RUN_TOKENS + 1]
    assert {sample.documents for sample in samples} == {min(documents, MAX_GROUPS)}


def test_coarser_groups_are_neighbours_merged() -> None:
    sample = ResamplingGroups.of(tokens(400, 25), 30, 0)
    assert sample.coarser(25, 0) is sample
    found = sample.coarser(10, 0)
    assert found.documents == 10 and found.draws.shape == (30, 10)
    assert found.halves.shape == (HALVINGS, 2, 10)
    pairs = np.unique(np.stack([sample.group_of_token, found.group_of_token]), axis=1)
    np.testing.assert_array_equal(pairs, [np.arange(25), np.arange(25) * 10 // 25])


def test_membership_draws_and_halves() -> None:
    sample = ResamplingGroups.of(tokens(400, 25), 30, 0)
    np.testing.assert_array_equal(sample.membership.argmax(axis=0), sample.group_of_token)
    np.testing.assert_array_equal(sample.membership.sum(axis=0), 1)
    np.testing.assert_array_equal(sample.draws.sum(axis=1), 25)
    np.testing.assert_array_equal(sample.halves.sum(axis=1), 1)
    np.testing.assert_array_equal(sample.halves.sum(axis=2), [[12, 13]] * HALVINGS)


def test_the_most_groups_that_a_window_has_tokens_of() -> None:
    of = ResamplingGroups.of(tokens(12, np.array([0, 0, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4]), windows=3), 0, 0)
    assert of.most_in_a_window == 3
