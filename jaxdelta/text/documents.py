"""The documents of a calibration text: prompts, files, directories and data sets -> an iterator of documents.

Documents are read as they are taken, so a run reads only as many as its tokens need.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.text import tables
from jaxdelta.text.file_kinds import (
    KINDS,
    PLAIN,
    check_file,
    file_text,
    in_a_directory,
    kind_of,
    named_as_file,
    readable,
    standard_input,
)
from jaxdelta.text.messages import Conversation
from jaxdelta.text.rows import (
    DEFAULT_TEXT_KEY,
    Document,
    Reading,
    Row,
    TokenIds,
    csv_rows,
    json_rows,
    jsonl_rows,
    texts,
    token_ids,
)
from jaxdelta.utils.hub import HUB_ID

DEFAULT_SPLIT = "train"
STANDARD_INPUT = "-"
SHUFFLE_BUFFER = 10_000  # documents

Item = TypeVar("Item")


def shipped_prompts() -> list[str]:
    """The package's 25 prompts."""
    file = resources.files("jaxdelta") / "data" / "calibration_prompts.json"
    return list(json.loads(file.read_text(encoding="utf-8")))


def read_documents(
    source: str | Path | None = None,
    *,
    text_key: str = DEFAULT_TEXT_KEY,
    split: str = DEFAULT_SPLIT,
    config: str | None = None,
    reading: Reading | None = None,
) -> Iterator[Document | Conversation]:
    """The documents of a source, one after the other, read as they are taken.

    A .txt, like prose and programs of other suffixes, is one document, with its own line ends. A .json holds
    a list of strings or of objects; each line of a .jsonl or .ndjson is an object; a .csv, .tsv or .parquet
    is a table. The text is under `text_key`, which may go into nested objects: `meta.text`. All but .parquet
    may end in .gz or .zst too. A directory is a data set as `Dataset.save_to_disk` writes it, or else all its
    files of these suffixes that are not hidden, by name. `-` is standard input. A name like `owner/name` that
    does not exist here is streamed from the Hugging Face hub.

    A long document of a file is an iterable of its parts, else it is a string. Rows without text are left
    out. A byte order mark is not part of a text.

    Args:
        source: a file, a directory or a data set; None for the package's prompts.
        text_key: the field or column that holds the text or a chat's messages; where the default one is
            missing, `messages` or `conversations`.
        split: of a data set that has several.
        config: of a data set on the hub that has several configurations.
        reading: collects what is passed over.

    Raises:
        UsageError: an option that this source cannot have.
        JaxDeltaError: the source does not exist or is of no kind that is read; later, unusable input is
            reached. It names the file, and the line or row.
    """
    reading = reading or Reading()
    flag = None if text_key == DEFAULT_TEXT_KEY else "text_key"
    rows = _rows(source, Key(text_key, flag), split, config, reading)
    return _not_empty(texts(rows, text_key, reading), source)


def read_ids(
    source: str | Path | None,
    ids_key: str,
    *,
    split: str = DEFAULT_SPLIT,
    config: str | None = None,
    reading: Reading | None = None,
) -> Iterator[TokenIds]:
    """The token ids of a source's documents, which it holds as lists under `ids_key`; as `read_documents`."""
    reading = reading or Reading()
    rows = _rows(source, Key(ids_key, "ids_key"), split, config, reading)
    return _not_empty(token_ids(rows, ids_key, reading), source)


def ahead(documents: Iterator[Item]) -> Iterator[Item]:
    """The same documents, the first of which is read now."""
    first = next(documents, None)
    return documents if first is None else chain([first], documents)


def shuffled(documents: Iterable[Item], seed: int, buffer: int = SHUFFLE_BUFFER) -> Iterator[Item]:
    """The documents in random order, drawn from a buffer; uniformly random if it holds them all."""
    rng = np.random.default_rng(seed)
    waiting: list[Item] = []
    for document in documents:
        if len(waiting) < buffer:
            waiting.append(document)
            continue
        drawn = int(rng.integers(buffer))
        yield waiting[drawn]
        waiting[drawn] = document
    yield from (waiting[i] for i in rng.permutation(len(waiting)))


class Key(NamedTuple):
    """The field or column that is wanted, and the flag that chose it, if one did."""

    name: str
    flag: str | None


_KEYS = ("text_key", "ids_key")
_NOUNS = {**dict.fromkeys(_KEYS, "fields"), "split": "splits", "dataset_config": "configurations"}


def _rows(
    source: str | Path | None, key: Key, split: str, config: str | None, reading: Reading
) -> Iterator[Row]:
    """The rows of a source. It is looked for now, and options that it cannot have are refused."""
    split_flag, config_flag = "split" * (split != DEFAULT_SPLIT), "dataset_config" * (config is not None)

    def allow(*flags: str) -> None:
        for flag in filter(None, (key.flag, split_flag, config_flag)):
            if flag not in flags:
                raise UsageError(f"{flag}: {_name(source)} has no {_NOUNS[flag]}")

    if source is None:
        allow()
        return (Row(_name(source), prompt) for prompt in shipped_prompts())
    if str(source) == STANDARD_INPUT:
        allow()
        _check_standard_input()
        return (Row(_name(source), standard_input()) for _ in range(1))
    if not str(source).strip():
        raise UsageError("calibration: the name is empty; leave it out for the package's prompts")
    path = Path(os.path.expanduser(source))
    if _is_hub_id(str(source)) and not os.path.lexists(path):
        return tables.hub_rows(str(source), key.name, split, config)
    with readable(path, OSError, ValueError):
        if path.is_dir():
            return _directory_rows(path, key, split, allow, reading)
    check_file(path)
    allow(*(_KEYS if kind_of(path) != PLAIN else ()))
    return _file_rows(path, key.name)


def _directory_rows(
    path: Path, key: Key, split: str, allow: Callable[..., None], reading: Reading
) -> Iterator[Row]:
    if tables.is_saved(path):
        allow(*_KEYS, *(["split"] if tables.has_splits(path) else []))
        return tables.saved_rows(path, key.name, tables.split_directory(path, split))
    files = _files(path, reading)
    keyed = [file for file in files if kind_of(file) != PLAIN]
    allow(*(_KEYS if keyed else ()))
    if key.flag == "ids_key" and keyed != files:
        raise UsageError(f"ids_key: {next(file for file in files if file not in keyed)} has no fields")
    return chain.from_iterable(_file_rows(file, key.name) for file in files)


def _file_rows(path: Path, key: str) -> Iterator[Row]:
    match kind_of(path):
        case ".json":
            return json_rows(path, key)
        case ".jsonl" | ".ndjson":
            return jsonl_rows(path, key)
        case ".csv" | ".tsv":
            return csv_rows(path, key)
        case ".parquet":
            return tables.parquet_rows(path, key)
    return (Row(str(path), file_text(path)) for _ in range(1))


def _files(directory: Path, reading: Reading) -> list[Path]:
    """The files of texts in a directory, by name; not hidden ones, links to directories, other kinds."""

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    reading.directory = directory
    for place, directories, files in os.walk(directory, onerror=fail):
        unread = [name for name in directories if name.startswith(".") or Path(place, name).is_symlink()]
        directories[:] = [name for name in directories if name not in unread]
        for path in (Path(place, name) for name in [*unread, *files]):
            wanted = not path.name.startswith(".") and in_a_directory(path) and path.is_file()
            (found if wanted else reading.left_out).append(path)
    reading.left_out.sort()
    if not found:
        raise JaxDeltaError(
            f"{directory}: has no file of a kind that is read: {', '.join(KINDS)}, also with .gz or .zst"
        )
    return sorted(found)


def _is_hub_id(source: str) -> bool:
    return "/" in source and bool(HUB_ID.fullmatch(source)) and not named_as_file(source)


def _check_standard_input() -> None:
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UsageError("calibration: - is standard input, and no text comes from there; pipe one into it")


def _name(source: str | Path | None) -> str:
    if source is None:
        return "the default text"
    return "standard input" if str(source) == STANDARD_INPUT else str(source)


def _not_empty(documents: Iterable[Item], source: str | Path | None) -> Iterator[Item]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise JaxDeltaError(
            f"{_name(source)}: is empty; a calibration text needs at least a few hundred tokens"
        )
