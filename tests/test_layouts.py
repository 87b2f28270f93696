"""Windows of tokens: joined or packed, none lost and none doubled, and what tells two texts apart."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calibration import DOCUMENTS, letters, word_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.text import windows as calibration
from jaxdelta.text.documents import shipped_prompts
from jaxdelta.text.tokenizer import Tokenize, load_encoder
from jaxdelta.text.tokens import PADDING, Tokens
from jaxdelta.text.windows import SEPARATOR, best_fit, tokenize

TEXTS = st.lists(st.text("abcdefgh \n", max_size=40), max_size=30)


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> Tokenize:
    directory = tmp_path_factory.mktemp("words")
    word_tokenizer().save(str(directory / "tokenizer.json"))
    return load_encoder(directory)


def lay_out(documents: Sequence[str], **options: Any) -> Tokens:
    return tokenize(documents, letters, **{"vocab_size": 256, "layout": "packed"} | options)


def segments(tokens: Tokens) -> list[tuple[int, str, str]]:
    """(document, ids as letters, texts) of every segment that is no padding."""
    found = []
    for window in range(len(tokens.ids)):
        bounds = [*np.flatnonzero(tokens.positions[window] == 0), tokens.ids.shape[1]]
        for start, stop in itertools.pairwise(bounds):
            (document,) = set(tokens.documents[window, start:stop].tolist())
            assert tokens.positions[window, start:stop].tolist() == list(range(stop - start))
            text = "".join(tokens.text(window, place) for place in range(start, stop))
            if document == PADDING:
                assert text == "" and stop == tokens.ids.shape[1]
            else:
                found.append((document, "".join(map(chr, tokens.ids[window, start:stop])), text))
    return found


# Packed


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.integers(2, 50), st.integers(2, 300))
def test_packing_loses_doubles_and_mixes_nothing(texts: list[str], seq_len: int, max_tokens: int) -> None:
    cut = [
        (number, text[start : start + seq_len])
        for number, text in enumerate(texts)
        for start in range(0, len(text), seq_len)
    ]
    whole = sum(len(text) for _, text in cut if len(text) > 1)
    if whole == 0:
        with pytest.raises(JaxDeltaError, match="at least 2 are needed"):
            lay_out(texts, seq_len=seq_len, max_tokens=max_tokens)
        return
    tokens = lay_out(texts, seq_len=seq_len, max_tokens=max_tokens)
    found = segments(tokens)
    assert all(ids == text for _, ids, text in found)
    assert tokens.count == sum(len(text) for *_, text in found) <= max_tokens
    assert tokens.ids.shape[1] <= seq_len
    assert tokens.counted.sum() == tokens.count - len(found)
    if whole <= max_tokens:
        assert sorted(found) == sorted((number, text, text) for number, text in cut if len(text) > 1)
    else:
        # A piece of one token at the very end does not count.
        assert tokens.count >= max_tokens - 1
        uncut = [(number, text) for number, text, _ in found if (number, text) in cut]
        assert len(found) - len(uncut) <= 1
        assert all(found.count((*piece, piece[1])) <= cut.count(piece) for piece in uncut)


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=100))
def test_best_fit(sizes: list[int]) -> None:
    windows, places = best_fit(np.array(sizes), 100)
    taken = np.zeros((windows.max() + 1, 100), int)
    for size, window, place in zip(sizes, windows, places, strict=True):
        assert place + size <= 100
        taken[window, place : place + size] += 1
    assert taken.max() == 1
    # From the left without a gap, and no two windows would fit into one.
    filled = taken.sum(1)
    assert (taken == (np.arange(100) < filled[:, None])).all()
    assert len(filled) == 1 or sum(sorted(filled)[:2]) > 100


def test_hardly_any_room_is_left() -> None:
    sizes = np.exp(np.random.default_rng(0).normal(6, 1.2, 2000)).astype(int) + 2
    tokens = lay_out(["a" * size for size in sizes], seq_len=512, max_tokens=10**7)
    assert tokens.count == sizes.sum() - (sizes % 512 == 1).sum()
    assert tokens.padding < 0.005
    assert tokens.segmented


def test_packed_documents_are_tokenized_by_themselves(encode: Tokenize) -> None:
    tokens = tokenize(DOCUMENTS, encode, vocab_size=500, layout="packed", seq_len=64)
    for number, (ids, _) in enumerate(encode(DOCUMENTS)):
        found = tokens.ids[tokens.documents == number].tolist()
        assert found == (ids if len(ids) > 1 else [])
    places = np.argwhere(tokens.documents == 2).tolist()
    assert "".join(tokens.text(*place) for place in places) == DOCUMENTS[2]


def test_one_window_is_as_long_as_its_text() -> None:
    tokens = lay_out(["abc", "de", "f"])
    assert tokens.ids.shape == (1, 5)
    assert tokens.documents.tolist() == [[0, 0, 0, 1, 1]]
    assert tokens.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert tokens.counted.tolist() == [[False, True, True, False, True]]
    assert tokens.padding == 0
    assert tokens.segmented


# Joined


@pytest.mark.parametrize(("size", "windows"), [(9, 1), (10, 1), (11, 2), (20, 2), (25, 3)])
def test_stream_in_windows(size: int, windows: int) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"[:size]
    tokens = lay_out([text], layout="stream", seq_len=10)
    assert tokens.ids.shape == (windows, min(size, 10))
    assert "".join(map(chr, tokens.ids.ravel()[:size])) == text
    assert tokens.count == size
    assert "".join(text for _, _, text in segments(tokens)) == text
    assert tokens.counted.sum() == size - windows
    filled = tokens.ids.size - size
    assert tokens.padding == pytest.approx(filled / tokens.ids.size)
    assert not tokens.segmented  # what fills a window up comes last, so no token sees it
    assert tokens.positions[-1, 10 - filled :].tolist() == list(range(filled))[: tokens.ids.shape[1]]


def test_stream_in_windows_is_the_stream(encode: Tokenize) -> None:
    whole = tokenize(shipped_prompts(), encode, vocab_size=500)
    cut = tokenize(shipped_prompts(), encode, vocab_size=500, seq_len=37)
    real = cut.documents != PADDING
    assert len(whole.ids) == 1
    np.testing.assert_array_equal(cut.ids[real], whole.ids[0])
    np.testing.assert_array_equal(cut.documents[real], whole.documents[0])
    texts = [cut.text(*map(int, place)) for place in np.argwhere(real)]
    assert texts == [whole.text(0, place) for place in range(whole.count)]


ODD = [*DOCUMENTS, "...", "\n", " \n\n a", "\u0301x", "b...", "\r\n\r\n", "   ", "(c)\n\n\n", "d"] * 4


@pytest.mark.parametrize("count", [2, 57, 233, 400])
@pytest.mark.parametrize("letters", [1, 7, 60, 500])
def test_a_text_in_parts_is_the_text(
    count: int, letters: int, encode: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenize([SEPARATOR.join(ODD)], encode, vocab_size=500, max_tokens=10**6, seq_len=10**6)
    owned = tokenize(ODD, encode, vocab_size=500, max_tokens=10**6, seq_len=10**6)
    for name in ("PART_LETTERS", "BATCH_LETTERS"):
        monkeypatch.setattr(calibration, name, letters)
    tokens = tokenize(ODD, encode, vocab_size=500, max_tokens=count)
    np.testing.assert_array_equal(tokens.ids, whole.ids[:, :count])
    np.testing.assert_array_equal(tokens.documents, owned.documents[:, :count])
    assert [tokens.text(0, i) for i in range(count)] == [whole.text(0, i) for i in range(count)]


def sentencepiece(prepends: Callable[[Tokenizer], None]) -> Tokenizer:
    """A BPE of the build of Llama 2's and Mistral's: no split into words, bytes for what it does not know."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepends(tokenizer)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=vocabulary, show_progress=False)
    lines = [line for document in [*shipped_prompts(), *DOCUMENTS] for line in document.splitlines()]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def as_llama2(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def as_mistral(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


@pytest.mark.parametrize("layout", ["stream", "packed"])
@pytest.mark.parametrize("prepends", [as_llama2, as_mistral])
def test_a_part_is_not_tokenized_as_a_beginning(
    prepends: Callable[[Tokenizer], None], layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These tokenizers put a space before a text's first word, which a later part's is not."""
    sentencepiece(prepends).save(str(tmp_path / "tokenizer.json"))
    encode, options = load_encoder(tmp_path), {"vocab_size": 600, "max_tokens": 4000, "layout": layout}
    assert encode(["a\nb"])[0][0] != encode(["a\n"])[0][0] + encode(["b"])[0][0]
    texts = [SEPARATOR.join(shipped_prompts()), *DOCUMENTS]
    whole = tokenize(texts, encode, **options)
    monkeypatch.setattr(calibration, "PART_LETTERS", 60)
    monkeypatch.setattr(calibration, "BATCH_LETTERS", 150)
    parts = tokenize(texts, encode, **options)
    np.testing.assert_array_equal(parts.ids, whole.ids)
    np.testing.assert_array_equal(parts.documents, whole.documents)
    places = [tuple(map(int, place)) for place in np.argwhere(whole.documents != PADDING)]
    assert [parts.text(*place) for place in places] == [whole.text(*place) for place in places]


@pytest.mark.parametrize("layout", ["stream", "packed"])
def test_documents_are_taken_as_they_are_needed(layout: str) -> None:
    taken = []

    def documents() -> Iterator[str]:
        for number in itertools.count():
            taken.append(number)
            yield f"Document {number}.\n"

    tokens = tokenize(documents(), letters, vocab_size=256, layout=layout, max_tokens=1000, seq_len=100)
    assert 999 <= tokens.count <= 1000
    assert len(taken) < 1000


def test_pieces_that_are_left_out_do_not_count() -> None:
    """Of each document the eleventh token is a piece by itself."""
    tokens = lay_out(["abcdefghijk"] * 100, seq_len=10, max_tokens=500)
    assert tokens.count == 500


@pytest.mark.parametrize("layout", ["stream", "packed"])
def test_of_a_long_document_a_part_is_tokenized(layout: str) -> None:
    most = 0

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        nonlocal most
        most = max(most, *map(len, texts))
        return letters(texts)

    text = "A line of text.\n" * 100_000
    tokens = tokenize([text], encode, vocab_size=256, layout=layout, max_tokens=1000, seq_len=100)
    assert tokens.count == 1000 and tokens.text(0, 0) == "A"
    assert most <= calibration.PART_LETTERS < len(text)


# Both


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len must be at least 2 .*not 1"),
        ({"layout": "loose"}, "layout must be one of stream, packed, not 'loose'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lay_out(["abc"], **options)


@pytest.mark.parametrize("positions", [[1, 2, 3], [0, 2, 3], [0, 1, 1], [0, -1, 0]])
def test_positions_count_up(positions: list[int]) -> None:
    zeros = np.zeros((1, 3), np.int32)
    with pytest.raises(JaxDeltaError, match="positions must begin with 0"):
        Tokens(zeros, zeros, positions=np.array([positions], np.int32))


def test_default_positions() -> None:
    zeros = np.zeros((2, 3), np.int32)
    tokens = Tokens(zeros, zeros)
    assert tokens.positions.dtype == np.int32
    assert tokens.positions.tolist() == [[0, 1, 2]] * 2
    assert tokens.count == 6
    assert tokens.counted.tolist() == [[False, True, True]] * 2
    assert not tokens.segmented
    assert tokens.text(1, 2) == "<0>"


def test_fingerprint() -> None:
    tokens = lay_out(["abc", "defgh", "ij"], seq_len=6)
    assert tokens.fingerprint == lay_out(["abc", "defgh", "ij"], seq_len=6).fingerprint
    assert tokens.fingerprint == dataclasses.replace(tokens, texts=None).fingerprint
    found = {tokens.fingerprint}
    for name in ("ids", "documents"):
        for place in np.ndindex(tokens.ids.shape):
            changed = getattr(tokens, name).copy()
            changed[place] += 1
            found.add(dataclasses.replace(tokens, **{name: changed}).fingerprint)
    found.add(Tokens(tokens.ids, tokens.documents).fingerprint)
    arrays = {
        f.name: getattr(tokens, f.name).reshape(1, -1)
        for f in dataclasses.fields(tokens)
        if f.name in ("ids", "documents", "positions")
    }
    found.add(Tokens(**arrays).fingerprint)
    assert len(found) == 1 + 2 * tokens.ids.size + 2
    assert all(len(digest) == 64 for digest in found)


def test_fingerprint_of_the_layout() -> None:
    """Written down, so that it cannot change unnoticed."""
    tokens = lay_out(["abc", "defgh", "ij"], seq_len=6)
    assert tokens.fingerprint == "b176ab0661c578864964c8d606d45e023323da0f244b5fb443a0d929c83fdaff"
