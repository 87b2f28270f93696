"""Files of texts: their kinds by suffix, opened, decompressed, checked and decoded as they are read."""

import codecs
import contextlib
import gzip
import importlib
import io
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from jaxdelta.errors import JaxDeltaError, extra, plain_errors

PLAIN = ".txt"
KEYED = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # rows with fields
COMPRESSED = (".gz", ".zst")
KINDS = (PLAIN, *KEYED)
# Prose and programs, which are read as they are.
_PLAIN_TOO = frozenset(
    ".text .md .markdown .rst .adoc .org .tex .bib .log .diff .patch .py .pyi .js .mjs .ts .jsx .tsx .c .h"  # noqa: SIM905
    " .cc .cpp .hpp .cs .cu .java .kt .scala .go .rs .rb .php .pl .r .jl .lua .sh .bash .zsh .sql .swift"
    " .m .hs .ml .clj .ex .erl .css .cfg .ini .toml .yaml .yml".split()
)
_MAGIC = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive, as .docx and .epub are",
    b"\x1f\x8b": "compressed; name it .gz",
    b"\x28\xb5\x2f\xfd": "compressed; name it .zst",
    b"BZh": "compressed by bzip2; only .gz and .zst are read",
    b"\xfd7zXZ": "compressed by xz; only .gz and .zst are read",
    b"PAR1": "a parquet table; name it .parquet",
    b"{\\rtf": "RTF",
}
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
BLOCK = 1 << 18  # bytes read at once


def kind_of(path: Path) -> str | None:
    """The suffix of a file's kind in small letters: `.txt` for all plain text; None if it is not known."""
    suffix = Path(_without_compression(path)).suffix
    if suffix in KEYED:
        return None if suffix == ".parquet" and _compression(path) else suffix
    plain = suffix in (PLAIN, *_PLAIN_TOO) or not suffix[1:].isalpha()  # of `data-1.0` the suffix is .0
    return PLAIN if plain else None


def named_as_file(name: str) -> bool:
    """Whether a name ends as files that are read, and as hardly any data set on a hub."""
    suffixes = Path(name.lower()).suffixes
    return bool(suffixes) and suffixes[-1] in (*KINDS, *COMPRESSED)


def in_a_directory(path: Path) -> bool:
    """Whether a file in a directory is one of its texts. README.md and programs are not."""
    kind = kind_of(path)
    return kind in KEYED or Path(_without_compression(path)).suffix == PLAIN


def check_file(path: Path) -> None:
    """Raises a JaxDeltaError if a path is no file, or one of a kind that is not read."""
    with readable(path, OSError, ValueError):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise JaxDeltaError(f"{path}: is {what}, not a file; for standard input give --calibration=-")
    if kind_of(path) is None:
        suffix = "".join(path.suffixes[-2 if _compression(path) else -1 :])
        raise JaxDeltaError(
            f"{path}: {suffix} is not a kind that is read: {', '.join(KINDS)}, and all but .parquet with .gz "
            "or .zst; name plain text .txt"
        )
    with opened(path):
        pass


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed as they are read.

    Raises:
        JaxDeltaError: now or later, it cannot be read, is damaged, or is no text though its kind is one.
    """
    with readable(path, OSError, EOFError, ValueError, zlib.error), _decompressed(path) as file:
        if kind_of(path) != ".parquet":
            _check_beginning(file.peek(1 << 12), path)
        yield file


def characters(file: Any, where: str | Path) -> Iterator[str]:
    """The text of a file of UTF-8 in blocks, without a byte order mark."""
    decoder, taken = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        block = file.read(BLOCK)
        waiting, ended = len(decoder.getstate()[0]), not block
        if taken == 0:
            _check_beginning(block, where)
            if block.startswith(codecs.BOM_UTF8):
                taken, block = len(codecs.BOM_UTF8), block.removeprefix(codecs.BOM_UTF8)
        try:
            text = decoder.decode(block, final=ended)
        except UnicodeDecodeError as error:
            raise _not_utf8(where, taken - waiting + error.start) from error
        if ended:
            return
        taken += len(block)
        yield text


def lines(file: Iterable[bytes], path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file with their line ends, without a byte order mark; each with its place."""
    number = 0
    for line in file:
        number += 1  # noqa: SIM113  enumerate would hold the line, which can be long
        where = f"{path}, line {number}"
        try:
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error.start) from error
        del line
        yield where, text


class LongText:
    """A text of several blocks, read as they are taken."""

    def __init__(self, blocks: Callable[[], Iterator[str]]):
        self.blocks = blocks

    def __iter__(self) -> Iterator[str]:
        return self.blocks()


def file_text(path: Path) -> str | LongText:
    """The text of a file."""

    def blocks() -> Iterator[str]:
        with opened(path) as file:
            yield from characters(file, path)

    first = list(islice(blocks(), 2))
    return LongText(blocks) if len(first) > 1 else "".join(first)


def standard_input() -> str | LongText:
    """The text of standard input, which can be read once."""
    blocks = characters(sys.stdin.buffer, "standard input")
    first = list(islice(blocks, 2))
    return LongText(lambda: chain(first, blocks)) if len(first) > 1 else "".join(first)


def readable(where: str | Path, *errors: type[Exception]) -> AbstractContextManager[None]:
    """Turns these errors into a JaxDeltaError."""
    return plain_errors(where, {errors: "{}: cannot be read ({})"})


def library(name: str, where: str | Path) -> Any:
    """A module of the extra `corpora`."""
    with extra("corpora", f"{where}: reading it"):
        return importlib.import_module(name)


def _compression(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else None


def _without_compression(path: Path) -> str:
    return path.name.lower().removesuffix(_compression(path) or "")


def _decompressed(path: Path) -> Any:
    match _compression(path):
        case ".gz":
            return gzip.open(path)
        case ".zst":
            path.stat()  # in the system's words, if it is not there
            return io.BufferedReader(library("pyarrow", path).input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _check_beginning(head: bytes, path: str | Path) -> None:
    for mark, encoding in _OTHER_MARKS.items():
        if head.startswith(mark):
            raise JaxDeltaError(f"{path}: is {encoding}, not UTF-8 text; convert it first")
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise JaxDeltaError(f"{path}: is {what}; it is not a text")
    if b"\0" in head:
        raise JaxDeltaError(f"{path}: has a zero byte at {head.index(0)}, so it is not UTF-8 text")


def _not_utf8(where: str | Path, byte: int) -> JaxDeltaError:
    return JaxDeltaError(f"{where}: is not UTF-8 text (byte {byte}); convert it first")
