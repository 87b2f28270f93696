"""A long text -> parts that can be tokenized one by one, whose tokens are those of the whole text.

A part ends before a line, or, in a text without usable lines, at a boundary that is shown to be one of the
whole text's tokens, whatever follows.
"""

import unicodedata
from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple

from jaxdelta.text.tokenizer import Tokenize

LONGEST_TOKEN = 128  # characters; the longest of the vocabularies of Qwen, Llama and Mistral
TAIL = 4 * LONGEST_TOKEN  # characters before the end of a text in which a boundary is looked for
SETTLED, AGREEING = 64, 64  # characters for tokens to become those of the whole text; then to be so
NEAR, LINES = 256, 8  # characters around a line end that is checked; line ends that are
COMPOSED = 32  # characters on either side that Unicode normalization could join


class Part(NamedTuple):
    """Consecutive characters of a text, and the characters before them that their tokens depend on.

    SentencePiece tokenizers (Llama 1 and 2, Mistral) insert a space at the beginning of any text, so a later
    part is tokenized with `before`, whose tokens are then dropped.
    """

    before: str
    text: str


def parts(chunks: Iterator[str], encode: Tokenize, letters: int) -> Iterator[Part]:
    """Parts of about `letters` characters of the text that the chunks are together.

    A part is longer where no boundary is found. At most one chunk more than the part is read.
    """
    text, before, wanted = "", "", letters
    while True:
        waiting, length = [text], len(text)
        while length <= wanted and (chunk := next(chunks, None)) is not None:
            waiting.append(chunk)
            length += len(chunk)
        text = "".join(waiting)
        if length <= wanted:
            yield Part(before, text)
            return
        if stop := _last_line(text, wanted, encode):
            kept = max(0, stop - NEAR)
        elif boundary := _last_boundary(before, text[:wanted], encode):
            kept, stop = boundary
        else:
            wanted *= 2
            continue
        yield Part(before, text[:stop])
        before, text, wanted = text[kept:stop], text[stop:], letters


def _last_line(text: str, stop: int, encode: Tokenize) -> int:
    """The beginning of the last line in 1..stop, or 0.

    A line that begins with a space or a slash does not count: some tokenizers join these to the line end
    before them. That no token spans the line end is checked: few vocabularies have one that does.
    """
    for _ in range(LINES):
        while (end := text.rfind("\n", 0, stop)) >= 0 and (text[end + 1].isspace() or text[end + 1] == "/"):
            stop = end
        first = max(0, end + 1 - NEAR)
        if end < 0 or end + 1 - first in encode([text[first : end + 1 + NEAR]])[0][1]:
            return end + 1
        stop = end
    return 0


def _last_boundary(before: str, text: str, encode: Tokenize) -> tuple[int, int] | None:
    """The last place where a token of any text that begins with `text` must end, and a place before it from
    which tokenizing can begin; None if there is no such place near the end.

    Tokens of a text up to one of its boundaries are the tokens of the text up to there: pre-tokenizers read
    from left to right, no merge of a BPE crosses a boundary, and the best segmentation of a unigram model
    consists of best segmentations. One of the whole text's boundaries is among the last LONGEST_TOKEN
    places of `text`. So a boundary of `text` cut short at each of these places is one of the whole text. That
    only the tail need be tokenized so often follows for a BPE from a sequence of tokens being valid if all
    pairs of neighbours are (Berglund and van der Merwe 2023, arXiv:2309.08715); for other tokenizers it is
    checked over a stretch of AGREEING characters. Left to rounding is which of several segmentations of the
    same score a unigram model chooses.
    """
    if len(text) < 2 * TAIL or text[-LONGEST_TOKEN:].isspace():  # Some special tokens take all space before.
        return None
    origin = len(before) + len(text) - TAIL
    known = [span for span in _spans(*encode([before + text])[0], origin + TAIL) if span[1] >= origin]
    if not known:
        return None
    origin = known[0][1]
    known = [(token, start - origin, stop - origin) for token, start, stop in known]
    tail = (before + text)[origin:]
    shortened = [tail[: len(tail) - i] for i in range(LONGEST_TOKEN)]
    common = set(known)
    for part, tokens in zip(shortened, encode(shortened), strict=True):
        common.intersection_update(_spans(*tokens, len(part)))
    agreed = list(takewhile(lambda span: span[1] < SETTLED or span in common, known))
    for last in reversed(agreed):
        _, start, stop = last
        if (
            start < stop <= len(tail) - 2 * LONGEST_TOKEN
            and stop >= SETTLED + AGREEING
            and _divides(tail, stop)
            and [*_spans(*encode([tail[:stop]])[0], stop)][-1:]
            == [last]  # The token ends between characters.
        ):
            kept = origin - len(before)
            return kept, kept + stop
    return None


def _spans(ids: list[int], starts: list[int], length: int) -> Iterator[tuple[int, int, int]]:
    """Each token's id, its first character, and the next token's first character."""
    return zip(ids, starts, [*starts, length][1:], strict=True)


def _divides(text: str, stop: int) -> bool:
    """Whether no character before `stop` composes with one after it, or changes places with it."""
    before, after = text[max(0, stop - COMPOSED) : stop], text[stop : stop + COMPOSED]
    return all(
        unicodedata.normalize(form, before) + unicodedata.normalize(form, after)
        == unicodedata.normalize(form, before + after)
        for form in ("NFC", "NFKC")
    )
