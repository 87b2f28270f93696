"""The calibration text: documents -> windows of tokens that know which document each token is from."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.text.documents import check_unicode
from jaxdelta.text.tokenizer import Tokenize
from jaxdelta.text.tokens import PADDING, Tokens

SEPARATOR = "\n\n"
DEFAULT_MAX_TOKENS = DEFAULT_SEQ_LEN = 2048
LAYOUTS = ("stream", "packed")
LETTERS_PER_TOKEN = 5  # about, in English: so much text is taken for what is missing
PART_LETTERS, BATCH_LETTERS = 1 << 16, 1 << 21  # of a text tokenized by itself; of several at once


def tokenize(
    documents: Iterable[str],
    encode: Tokenize,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    vocab_size: int,
    layout: str = "stream",
    seq_len: int = DEFAULT_SEQ_LEN,
) -> Tokens:
    """Documents -> windows of tokens; no token is added before or after any text.

    `stream` joins the documents by a blank line and tokenizes them as one text, as the reference does; a
    token belongs to the document in which it begins, a separator to the document before it. The text is cut
    into windows, each one segment. `packed` tokenizes each document by itself and cuts it into pieces, each
    one segment, which are put side by side into windows; a piece of one token is left out, since the first
    token counts nowhere.

    Args:
        documents: the texts, of which as many are taken as are needed.
        encode: the model's tokenizer, see `load_encoder`.
        max_tokens: so many tokens are taken.
        vocab_size: the model's; a token beyond it is an error.
        layout: `stream` or `packed`.
        seq_len: length of a window; where one is enough, it is as long as the text.

    Raises:
        UsageError: max_tokens or seq_len below 2, or no such layout.
        JaxDeltaError: fewer than two tokens, one the model has no embedding for, or no Unicode text.
    """
    if max_tokens < 2:
        raise UsageError(f"max_tokens must be at least 2 (the first token is left out), not {max_tokens}")
    if seq_len < 2:
        raise UsageError(f"seq_len must be at least 2 (the first token is left out), not {seq_len}")
    if layout not in LAYOUTS:
        raise UsageError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    lay_out = _packed if layout == "packed" else _stream
    tokens = lay_out(iter(documents), encode, max_tokens, seq_len)
    if (largest := int(tokens.ids.max())) >= vocab_size:
        raise JaxDeltaError(
            f"the tokenizer gives token {largest}, the model has {vocab_size}: they do not belong together"
        )
    return tokens


class TokenizedText(NamedTuple):
    """The tokens of a text, and the characters at which they begin; the last bound is where they end."""

    ids: Int32[np.ndarray, " n"]
    bounds: Int32[np.ndarray, " bounds"]

    def part(self, start: int, stop: int) -> "TokenizedText":
        """Tokens start, ..., stop - 1."""
        return TokenizedText(self.ids[start:stop], self.bounds[start : stop + 1])


class Segment(NamedTuple):
    """Tokens that are one segment, and the document that they are of."""

    document: int
    text: str
    tokens: TokenizedText


def _stream(documents: Iterator[str], encode: Tokenize, max_tokens: int, seq_len: int) -> Tokens:
    lengths: list[int] = []

    def taken() -> Iterator[str]:
        for document in documents:
            lengths.append(len(document))
            yield document

    parts = ((0, part) for part in _parts(taken(), LETTERS_PER_TOKEN * max_tokens))
    text, (ids, bounds) = _joined(_encoded(parts, encode, max_tokens), max_tokens)
    count = _enough(len(ids))
    starts = np.cumsum([0] + [length + len(SEPARATOR) for length in lengths[:-1]])
    owners = np.searchsorted(starts, bounds[:-1], side="right") - 1
    firsts = np.arange(0, count, seq_len)
    sizes, windows = np.minimum(seq_len, count - firsts), np.arange(len(firsts))

    def text_of(token: int) -> str:
        return text[bounds[token] : bounds[token + 1]]

    return _laid_out(ids, owners, text_of, sizes, windows, np.zeros_like(sizes))


def _packed(documents: Iterator[str], encode: Tokenize, max_tokens: int, seq_len: int) -> Tokens:
    pieces = list(_pieces(documents, encode, max_tokens, seq_len))
    sizes = np.array([len(piece.tokens.ids) for piece in pieces], np.int64)
    _enough(int(sizes.sum()))
    ids = np.concatenate([piece.tokens.ids for piece in pieces])
    owners = np.repeat([piece.document for piece in pieces], sizes)
    begins = np.cumsum(sizes) - sizes

    def text_of(token: int) -> str:
        number = int(np.searchsorted(begins, token, side="right")) - 1
        _, text, (_, bounds) = pieces[number]
        place = token - begins[number]
        return text[bounds[place] : bounds[place + 1]]

    return _laid_out(ids, owners, text_of, sizes, *best_fit(sizes, seq_len))


def _enough(count: int) -> int:
    if count < 2:
        raise JaxDeltaError(
            f"the calibration text has {count} token{'s' * (count != 1)}; at least 2 are needed, "
            "since the first is left out of every figure"
        )
    return count


def _laid_out(
    ids: Int32[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    text_of: Callable[[int], str],
    sizes: Int[np.ndarray, " pieces"],
    windows: Int[np.ndarray, " pieces"],
    places: Int[np.ndarray, " pieces"],
) -> Tokens:
    """Pieces, which lie one after the other in `ids`, each put at its place in its window."""
    shape = int(windows.max()) + 1, int((places + sizes).max())
    positions = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    where = np.repeat(windows * shape[1] + places, sizes) + positions

    def spread(values: Int[np.ndarray, " n"], empty: int) -> Int32[np.ndarray, "B T"]:
        array = np.full(shape, empty, np.int32)
        array.reshape(-1)[where] = values
        return array

    documents, order = spread(owners, PADDING), spread(np.arange(len(ids)), PADDING)
    filled = (documents != PADDING).sum(axis=1, dtype=np.int32, keepdims=True)
    beyond = np.arange(shape[1], dtype=np.int32) - filled  # padding is a segment of its own

    def text(window: int, place: int) -> str:
        token = int(order[window, place])
        return "" if token == PADDING else text_of(token)

    return Tokens(spread(ids, 0), documents, text, np.where(beyond < 0, spread(positions, 0), beyond))


def _pieces(documents: Iterator[str], encode: Tokenize, max_tokens: int, seq_len: int) -> Iterator[Segment]:
    """Pieces of at most seq_len tokens and no less than 2, max_tokens in all where there are so many."""
    left, letters = max_tokens, LETTERS_PER_TOKEN * max_tokens
    parts = ((i, part) for i, document in enumerate(documents) for part in _parts(iter([document]), letters))
    for number, found in groupby(_encoded(parts, encode, max_tokens), key=itemgetter(0)):
        text, tokens = _joined(found, left)
        for start in range(0, len(tokens.ids), seq_len):
            piece = tokens.part(start, start + seq_len)
            if len(piece.ids) > 1:
                left -= len(piece.ids)
                yield Segment(number, text, piece)
        if left < 2:
            return


def _parts(documents: Iterator[str], letters: int) -> Iterator[str]:
    """The joined documents in parts that can be tokenized each by itself, since words end where a line does.

    A part has at most so many letters, or PART_LETTERS, and ends where a line begins that does not begin with
    a space, nor with a slash, which some tokenizers join to the line end before it; without such a place it
    is longer.
    """
    text, start, wanted = next(documents, ""), 0, min(letters, PART_LETTERS)
    while True:
        more, length = [], len(text) - start
        while length <= wanted and (document := next(documents, None)) is not None:
            more.append(document)
            length += len(SEPARATOR) + len(document)
        if more:
            text, start = SEPARATOR.join([text[start:], *more]), 0
        if length <= wanted:
            yield text[start:]
            return
        if stop := _last_line(text, start, start + wanted):
            yield text[start:stop]
            start, wanted = stop, min(letters, PART_LETTERS)
        else:
            wanted *= 2


def _last_line(text: str, start: int, stop: int) -> int:
    """Where the last line begins, between start and stop, that does not begin with a space or a slash; or
    else 0."""
    while (end := text.rfind("\n", start, stop)) >= 0 and (text[end + 1].isspace() or text[end + 1] == "/"):
        stop = end
    return end + 1


def _encoded(
    parts: Iterator[tuple[int, str]], encode: Tokenize, count: int
) -> Iterator[tuple[int, str, TokenizedText]]:
    """Each numbered text with its tokens, at a time as many texts as `count` tokens in all may need.

    A part that continues a text is tokenized with the line end before it, whose tokens are then dropped:
    SentencePiece's tokenizers (Llama 1 and 2, Mistral) put a space before whatever they take for a beginning.
    """
    latest = None
    while batch := _batch(parts, min(BATCH_LETTERS, LETTERS_PER_TOKEN * max(count, 1))):
        for _, text in batch:
            check_unicode(text, "the calibration text")
        numbers = [latest, *(number for number, _ in batch)]
        latest = numbers[-1]
        before = ["\n" * (number == last) for last, number in pairwise(numbers)]
        encodings = encode([end + text for end, (_, text) in zip(before, batch, strict=True)])
        for end, (number, text), (ids, starts) in zip(before, batch, encodings, strict=True):
            first = bisect_left(starts, len(end))
            bounds = np.array([*starts[first:], len(end) + len(text)], np.int32) - np.int32(len(end))
            found = TokenizedText(np.array(ids[first:], np.int32), bounds)
            count -= len(found.ids)
            yield number, text, found


def _batch(parts: Iterator[tuple[int, str]], letters: int) -> list[tuple[int, str]]:
    batch = []
    for number, text in parts:
        batch.append((number, text))
        letters -= len(text)
        if letters <= 0:
            break
    return batch


def _joined(parts: Iterator[tuple[int, str, TokenizedText]], count: int) -> tuple[str, TokenizedText]:
    """A text from its parts, until they have `count` tokens, and those."""
    texts, ids, bounds, length, found = [], [], [], 0, 0
    for _, text, tokens in parts:
        texts.append(text)
        ids.append(tokens.ids)
        bounds.append(tokens.bounds[:-1] + np.int32(length))
        length += len(text)
        found += len(tokens.ids)
        if found >= count:
            break
    bounds.append(np.array([length], np.int32))
    return "".join(texts), TokenizedText(np.concatenate(ids), np.concatenate(bounds)).part(0, count)


def best_fit(
    sizes: Int[np.ndarray, " n"], capacity: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The window of every piece, and the place in it where the piece begins.

    Best fit decreasing: the longest piece first, each into the window that has least room left for it. Takes
    at most 11/9 of the fewest windows possible, and a few more (Johnson et al. 1974, SIAM J. Comput. 3, 299).

    Args:
        sizes: of the pieces, each 1 to `capacity`.
        capacity: of a window.
    """
    windows, places = np.zeros_like(sizes), np.zeros_like(sizes)
    rooms: list[tuple[int, int]] = []  # what is left in a window, and which; the fullest first
    count = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        if (fitting := bisect_left(rooms, (size, 0))) < len(rooms):
            room, window = rooms.pop(fitting)
        else:
            room, window = capacity, count
            count += 1
        windows[piece], places[piece] = window, capacity - room
        if room > size:
            insort(rooms, (room - size, window))
    return windows, places
