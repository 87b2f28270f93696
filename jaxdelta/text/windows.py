"""Documents -> windows of tokens, each token with its document."""

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.text.chat import Chat
from jaxdelta.text.parts import Part, parts
from jaxdelta.text.rows import Document, check_unicode
from jaxdelta.text.tokenizer import Tokenize
from jaxdelta.text.tokens import PADDING, Roles, Tokens

SEPARATOR = "\n\n"
DEFAULT_MAX_TOKENS = DEFAULT_SEQ_LEN = 2048
LAYOUTS = ("stream", "packed")
LETTERS_PER_TOKEN = 5  # roughly, in English: how much text to read for the missing tokens
PART_LETTERS, BATCH_LETTERS = 1 << 16, 1 << 21  # of a part, tokenized by itself; of parts tokenized at once
CHUNK = 1 << 18  # characters of a long document that are handled at once


def tokenize(
    documents: Iterable[Document],
    encode: Tokenize,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    vocab_size: int,
    layout: str = "stream",
    seq_len: int = DEFAULT_SEQ_LEN,
) -> Tokens:
    """Documents -> windows of tokens, without special tokens.

    `stream` joins the documents by a blank line and tokenizes them as one text, as the reference does; a
    token belongs to the document in which it begins, a separator to the document before it. The text is cut
    into windows, each one segment. `packed` tokenizes each document by itself and cuts it into pieces, each
    one segment, which are packed into windows. It leaves out pieces of one token: the first is never counted.
    Chats are tokenized each by itself in both layouts, and `stream` joins their tokens without a separator.

    Args:
        documents: the texts; only as many are read as needed.
        encode: the model's tokenizer, see `load_encoder`.
        max_tokens: the maximum number of tokens.
        vocab_size: of the model; a token beyond it is an error.
        layout: `stream` or `packed`.
        seq_len: length of a window; a single window is as long as the text.

    Raises:
        UsageError: max_tokens or seq_len below 2, or no such layout.
        JaxDeltaError: fewer than two tokens, a token without embedding, or text that is not Unicode.
    """
    check_layout(max_tokens, layout, seq_len)
    documents = iter(documents)
    first = next(documents, "")
    cut = _pieces if layout == "packed" else _consecutive
    if isinstance(first, Chat):
        cut = _chat_pieces if layout == "packed" else _consecutive_chats
    segments = list(cut(chain([first], documents), _checked(encode), max_tokens, seq_len))
    tokens = in_windows(segments, layout, seq_len)
    if tokens.roles and isinstance(first, Chat):
        names, template = tuple(first.source.roles), first.source.digest
        tokens = dataclasses.replace(tokens, roles=tokens.roles._replace(names=names, template=template))
    if (largest := int(tokens.ids.max())) >= vocab_size:
        raise JaxDeltaError(
            f"the tokenizer gives token {largest}, the model has {vocab_size}: they do not belong together"
        )
    return tokens


def check_layout(max_tokens: int, layout: str, seq_len: int) -> None:
    """Raises a UsageError if an option of a layout has an impossible value."""
    for name, value in (("max_tokens", max_tokens), ("seq_len", seq_len)):
        if value < 2:
            raise UsageError(f"{name} must be at least 2 (the first token is left out), not {value}")
    if layout not in LAYOUTS:
        raise UsageError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")


class TokenizedText(NamedTuple):
    """The tokens of a text; token i is the characters bounds[i] to bounds[i + 1]."""

    ids: Int32[np.ndarray, " n"]
    bounds: Int32[np.ndarray, " bounds"]

    def part(self, start: int, stop: int) -> "TokenizedText":
        """Tokens start, ..., stop - 1."""
        return TokenizedText(self.ids[start:stop], self.bounds[start : stop + 1])


class Segment(NamedTuple):
    """The tokens of one segment, the document of each, and the text that their bounds refer to; of chats also
    the number of each token's role."""

    documents: Int[np.ndarray, " n"]
    text: str
    tokens: TokenizedText
    roles: Int[np.ndarray, " n"] | None = None

    def part(self, start: int, stop: int) -> "Segment":
        """Tokens start, ..., stop - 1."""
        roles = None if self.roles is None else self.roles[start:stop]
        return Segment(self.documents[start:stop], self.text, self.tokens.part(start, stop), roles)


def _consecutive(
    documents: Iterator[Document], encode: Tokenize, max_tokens: int, seq_len: int
) -> Iterator[Segment]:
    """The joined documents in segments of seq_len tokens."""
    starts = [0]  # of the documents read so far and of the next

    def joined() -> Iterator[str]:
        for number, document in enumerate(documents):
            if number:
                starts[-1] += len(SEPARATOR)
                yield SEPARATOR
            starts.append(starts[-1])
            for chunk in _chunks(document):
                starts[-1] += len(chunk)
                yield chunk

    numbered = ((0, part) for part in parts(joined(), encode, _part_letters(max_tokens)))
    text, tokens = _joined(_encoded(numbered, encode, max_tokens), max_tokens)
    owners = np.searchsorted(starts[:-1], tokens.bounds[:-1], side="right") - 1
    return consecutive(Segment(owners, text, tokens), seq_len)


def consecutive(whole: Segment, seq_len: int) -> Iterator[Segment]:
    """A segment in pieces of seq_len tokens; the last one may be shorter."""
    for start in range(0, len(whole.documents), seq_len):
        yield whole.part(start, start + seq_len)


def in_windows(segments: Sequence[Segment], layout: str, seq_len: int) -> Tokens:
    """Segments in windows: each in its own, or packed.

    Raises:
        JaxDeltaError: fewer than two tokens.
    """
    sizes = np.array([len(segment.tokens.ids) for segment in segments], np.int64)
    if (count := int(sizes.sum())) < 2:
        raise JaxDeltaError(
            f"the calibration text has {count} token{'s' * (count != 1)}; at least 2 are needed, "
            "since the first is left out of every statistic"
        )
    one_each = np.arange(len(sizes)), np.zeros_like(sizes)
    return _laid_out(segments, sizes, *(best_fit(sizes, seq_len) if layout == "packed" else one_each))


def _laid_out(
    segments: Sequence[Segment],
    sizes: Int[np.ndarray, " segments"],
    windows: Int[np.ndarray, " segments"],
    offsets: Int[np.ndarray, " segments"],
) -> Tokens:
    """Windows of segments, each at its offset in its window."""
    shape = int(windows.max()) + 1, int((offsets + sizes).max())
    within = np.concatenate([np.arange(size) for size in sizes])
    where = np.repeat(windows * shape[1] + offsets, sizes) + within

    def spread(values: Int[np.ndarray, " n"], empty: int) -> Int32[np.ndarray, "B T"]:
        array = np.full(shape, empty, np.int32)
        array.reshape(-1)[where] = values
        return array

    ids = spread(np.concatenate([segment.tokens.ids for segment in segments]), 0)
    documents = spread(np.concatenate([segment.documents for segment in segments]), PADDING)
    numbers = spread(np.repeat(np.arange(len(segments)), sizes), PADDING)
    filled = (documents != PADDING).sum(axis=1, dtype=np.int32, keepdims=True)
    beyond = np.arange(shape[1], dtype=np.int32) - filled  # Padding is a segment of its own.
    positions = np.where(beyond < 0, spread(within, 0), beyond)

    def text(window: int, index: int) -> str:
        if (number := numbers[window, index]) == PADDING:
            return ""
        _, whole, (_, bounds), _ = segments[number]
        start = positions[window, index]
        return whole[bounds[start] : bounds[start + 1]]

    numbered = [segment.roles for segment in segments if segment.roles is not None]
    roles = Roles(spread(np.concatenate(numbered), 0), (), "") if numbered else None
    return Tokens(ids, documents, text, positions, roles)


def _pieces(
    documents: Iterator[Document], encode: Tokenize, max_tokens: int, seq_len: int
) -> Iterator[Segment]:
    """Pieces of 2 to seq_len tokens, at most max_tokens in all."""
    left, letters = max_tokens, _part_letters(max_tokens)
    numbered = (
        (i, part)
        for i, document in enumerate(documents)
        for part in parts(_chunks(document), encode, letters)
    )
    for number, encoded in groupby(_encoded(numbered, encode, max_tokens), key=itemgetter(0)):
        text, tokens = _joined(encoded, left)
        for piece in consecutive(Segment(np.full(len(tokens.ids), number), text, tokens), seq_len):
            if len(piece.documents) > 1:
                left -= len(piece.documents)
                yield piece
        if left < 2:
            return


def _chat_pieces(
    documents: Iterator[Any], encode: Tokenize, max_tokens: int, seq_len: int
) -> Iterator[Segment]:
    """`_pieces` of chats, with the role of each token that any of its characters has."""
    taken: list[Any] = []

    def chats() -> Iterator[str]:
        for document in documents:
            taken.append(document)
            yield document

    for segment in _pieces(chats(), encode, max_tokens, seq_len):
        letters = taken[segment.documents[0]].roles
        starts = np.minimum(segment.tokens.bounds, len(letters))
        padded = np.append(letters, np.int8(0))
        # The last bound ends the last token.
        roles = np.maximum.reduceat(padded, starts)[:-1]
        yield segment._replace(roles=roles.astype(np.int32))


def _consecutive_chats(
    documents: Iterator[Any], encode: Tokenize, max_tokens: int, seq_len: int
) -> Iterator[Segment]:
    """The chats' tokens, joined, in segments of seq_len tokens."""
    whole = list(_chat_pieces(documents, encode, max_tokens, max_tokens))
    if not whole:
        return
    text, tokens = _joined(((0, segment.text, segment.tokens) for segment in whole), max_tokens)
    owners, roles = (np.concatenate([part[i] for part in whole]) for i in (0, 3))
    yield from consecutive(Segment(owners, text, tokens, roles), seq_len)


def _part_letters(max_tokens: int) -> int:
    return min(LETTERS_PER_TOKEN * max_tokens, PART_LETTERS)


def _chunks(document: Document) -> Iterator[str]:
    """Consecutive characters of a document, few enough to be copied often."""
    if isinstance(document, str):
        return (document[start : start + CHUNK] for start in range(0, len(document), CHUNK))
    return iter(document)


def _encoded(
    numbered: Iterator[tuple[int, Part]], encode: Tokenize, count: int
) -> Iterator[tuple[int, str, TokenizedText]]:
    """The numbered parts with their tokens, in batches that should have the tokens missing from `count`."""
    while batch := _batch(numbered, min(BATCH_LETTERS, LETTERS_PER_TOKEN * max(count, 1))):
        encodings = encode([before + text for _, (before, text) in batch])
        for (number, (before, text)), (ids, starts) in zip(batch, encodings, strict=True):
            first = bisect_left(starts, len(before))
            bounds = np.array([*starts[first:], len(before) + len(text)], np.int32) - np.int32(len(before))
            tokens = TokenizedText(np.array(ids[first:], np.int32), bounds)
            count -= len(tokens.ids)
            yield number, text, tokens


def _batch(numbered: Iterator[tuple[int, Part]], letters: int) -> list[tuple[int, Part]]:
    """The next parts, of at least half the letters: a part may have a few less than was asked for."""
    batch, length = [], 0
    for number, part in numbered:
        batch.append((number, part))
        length += len(part.text)
        if 2 * length >= letters:
            break
    return batch


def _joined(parts: Iterator[tuple[int, str, TokenizedText]], count: int) -> tuple[str, TokenizedText]:
    """Joins the parts that have the first `count` tokens; returns their text and these tokens."""
    texts, ids, bounds, length, total = [], [], [], 0, 0
    for _, text, tokens in parts:
        texts.append(text)
        ids.append(tokens.ids)
        bounds.append(tokens.bounds[:-1] + np.int32(length))
        length += len(text)
        total += len(tokens.ids)
        if total >= count:
            break
    bounds.append(np.array([length], np.int32))
    return "".join(texts), TokenizedText(np.concatenate(ids), np.concatenate(bounds)).part(0, count)


def _checked(encode: Tokenize) -> Tokenize:
    """The tokenizer with its failures in a sentence."""

    def encode_or_say(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        for text in texts:
            check_unicode(text, "the calibration text")
        try:
            return encode(texts)
        except MemoryError as error:
            raise JaxDeltaError("out of memory while tokenizing; lower --max_tokens") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the tokenizers library, and no Exception
                raise
            raise JaxDeltaError(f"the tokenizer fails on the calibration text ({error})") from error

    return encode_or_say


def best_fit(
    sizes: Int[np.ndarray, " n"], capacity: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The window of each piece and its offset there, for pieces of 1 to `capacity` tokens.

    Best fit decreasing: the longest piece first, each into the fullest window that has room for it. Needs at
    most 11/9 of the fewest windows possible, plus a few (Johnson et al. 1974, SIAM J. Comput. 3, 299).
    """
    windows, offsets = np.zeros_like(sizes), np.zeros_like(sizes)
    rooms: list[tuple[int, int]] = []  # (room, window) of windows that are not full, the fullest first
    count = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        if (fitting := bisect_left(rooms, (size, 0))) < len(rooms):
            room, window = rooms.pop(fitting)
        else:
            room, window = capacity, count
            count += 1
        windows[piece], offsets[piece] = window, capacity - room
        if room > size:
            insort(rooms, (room - size, window))
    return windows, offsets
