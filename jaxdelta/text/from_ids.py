"""Documents of token ids -> windows of tokens."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxdelta.errors import JaxDeltaError
from jaxdelta.text.rows import TokenIds
from jaxdelta.text.tokens import PADDING, Tokens
from jaxdelta.text.windows import Segment, TokenizedText, check_layout, consecutive, in_windows


@dataclasses.dataclass(frozen=True)
class IdDocuments:
    """Documents of token ids, read as they are taken.

    `joined`: documents of one text, which the layout `stream` joins; else sequences that attend to themselves
    only, in any layout.
    """

    documents: Iterable[TokenIds]
    joined: bool = False


def windows_of_ids(
    documents: IdDocuments,
    *,
    max_tokens: int,
    vocab_size: int,
    layout: str,
    seq_len: int,
    text_of: Callable[[int], str] | None = None,
) -> Tokens:
    """Documents of token ids -> windows of tokens, as `tokenize` gives them for texts.

    `stream` joins documents of one text without anything between them.

    Args:
        documents: the ids; only as many are read as needed.
        max_tokens: the maximum number of tokens.
        vocab_size: of the model; an id beyond it is an error.
        layout: `stream` or `packed`.
        seq_len: length of a window.
        text_of: the text of an id, if it is known.

    Raises:
        UsageError: an impossible option.
        JaxDeltaError: fewer than two tokens, or an id without embedding.
    """
    check_layout(max_tokens, layout, seq_len)
    cut = _stream if layout == "stream" and documents.joined else _packed
    segments = cut(_checked(documents.documents, vocab_size), max_tokens, seq_len)
    tokens = in_windows(list(segments), layout, seq_len)
    if text_of is None:
        return dataclasses.replace(tokens, texts=None)

    def text(window: int, index: int) -> str:
        padding = tokens.documents[window, index] == PADDING
        return "" if padding else text_of(int(tokens.ids[window, index]))

    return dataclasses.replace(tokens, texts=text)


def load_texts(directory: Path) -> Callable[[int], str] | None:
    """The text of each token by a model's tokenizer.json; None if it has none that can be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception:  # All that tokenizers raises. A run of ids needs no tokenizer.
        return None

    def text(token: int) -> str:
        # After another token: at the beginning of a text some decoders drop a space.
        alone, twice = (tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(alone) :]

    return text


def _checked(documents: Iterable[TokenIds], vocab_size: int) -> Iterator[Segment]:
    """Each document as one segment."""
    for number, (where, ids) in enumerate(documents):
        if ids[place := int(ids.argmax())] >= vocab_size:
            raise JaxDeltaError(
                f"{where}: has token {ids[place]} at {place}, the model has {vocab_size}: they do not belong "
                "together"
            )
        yield _segment(np.full(len(ids), number), ids)


def _packed(documents: Iterator[Segment], max_tokens: int, seq_len: int) -> Iterator[Segment]:
    """Pieces of 2 to seq_len tokens, at most max_tokens in all."""
    left = max_tokens
    for owners, _, tokens, _ in documents:
        for piece in consecutive(_segment(owners[:left], tokens.ids[:left]), seq_len):
            if len(piece.documents) > 1:
                left -= len(piece.documents)
                yield piece
        if left < 2:
            return


def _stream(documents: Iterator[Segment], max_tokens: int, seq_len: int) -> Iterator[Segment]:
    """The joined documents in segments of seq_len tokens."""
    taken, left = [_segment(np.zeros(0, np.int64), np.zeros(0, np.int32))], max_tokens
    for document in documents:
        taken.append(document)
        left -= len(document.documents)
        if left <= 0:
            break
    owners = np.concatenate([segment.documents for segment in taken])[:max_tokens]
    ids = np.concatenate([segment.tokens.ids for segment in taken])[:max_tokens]
    yield from consecutive(_segment(owners, ids), seq_len)


def _segment(documents: np.ndarray, ids: np.ndarray) -> Segment:
    return Segment(documents, "", TokenizedText(ids, np.zeros(len(ids) + 1, np.int32)))
