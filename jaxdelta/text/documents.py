"""The documents of a calibration text: prompts, files, directories and data sets -> an iterator of strings.

Documents are read as they are taken, so a run reads only as many as its tokens need.
"""

import importlib
import itertools
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxdelta.errors import JaxDeltaError, extra, plain_errors
from jaxdelta.text.messages import COMPANIONS, Conversation, chat_key, conversation, is_chat
from jaxdelta.utils.hub import GATED, HUB_ID, silent

DEFAULT_TEXT_KEY, DEFAULT_SPLIT = "text", "train"
SHUFFLE_BUFFER = 10_000  # documents
BATCH_ROWS = 1000


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
) -> Iterator[str | Conversation]:
    """The documents of a source, one after the other, read as they are taken.

    A .json holds a list of strings or chats; a line of a .jsonl an object with the text under `text_key`; a
    .parquet a column of that name; any other file is one document. A directory is a data set as
    `Dataset.save_to_disk` writes it, or else all .txt, .json, .jsonl and .parquet files under it, by name.
    A name like `owner/name` that does not exist here is streamed from the Hugging Face hub.

    Args:
        source: a file, a directory or a data set; None for the package's prompts.
        text_key: the field or column that holds the text or a chat's messages; where the default one is
            missing, `messages` or `conversations`.
        split: of a data set that has several.
        config: of a data set on the hub that has several configurations.

    Raises:
        JaxDeltaError: when unusable input is reached; it names the file, and the line or row.
    """
    if source is None:
        return iter(shipped_prompts())
    path = Path(os.path.expanduser(source))
    if _is_hub_id(str(source)) and not os.path.exists(path):
        documents = _hub_rows(str(source), text_key, split, config)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        documents = _saved_rows(path, text_key, split)
    elif path.is_dir():
        documents = itertools.chain.from_iterable(_read_file(file, text_key) for file in _files(path))
    else:
        documents = _read_file(path, text_key)
    return _not_empty(documents, source)


def shuffled(documents: Iterable[Any], seed: int, buffer: int = SHUFFLE_BUFFER) -> Iterator[Any]:
    """The documents in random order, drawn from a buffer; uniformly random if it holds them all."""
    rng = np.random.default_rng(seed)
    waiting: list[Any] = []
    for document in documents:
        if len(waiting) < buffer:
            waiting.append(document)
            continue
        drawn = int(rng.integers(buffer))
        yield waiting[drawn]
        waiting[drawn] = document
    yield from (waiting[i] for i in rng.permutation(len(waiting)))


def check_unicode(text: str, where: str) -> None:
    """Raises a JaxDeltaError for half a surrogate pair, which JSON can hold but no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JaxDeltaError(f"{where} is not Unicode (half a character at {error.start})") from error


def _is_hub_id(source: str) -> bool:
    is_file = Path(source).suffix.lower() in (".txt", *_READERS)
    return "/" in source and bool(HUB_ID.fullmatch(source)) and not is_file


def _not_empty(documents: Iterable[Any], source: str | Path) -> Iterator[Any]:
    empty = True
    for document in documents:
        empty = empty and isinstance(document, str) and not document.strip()
        yield document
    if empty:
        raise JaxDeltaError(f"{source}: is empty; a calibration text needs at least a few hundred tokens")


def _files(directory: Path) -> list[Path]:
    known = (".txt", *_READERS)
    files = sorted(f for f in directory.rglob("*") if f.suffix.lower() in known and f.is_file())
    if not files:
        raise JaxDeltaError(f"{directory}: has no file of a kind that is read: {', '.join(known)}")
    return files


def _read_file(path: Path, text_key: str) -> Iterator[Any]:
    return _READERS.get(path.suffix.lower(), _text_file)(path, text_key)


def _text_file(path: Path, text_key: str) -> Iterator[str]:
    yield _whole(path)


def _json_file(path: Path, text_key: str) -> Iterator[Any]:
    text = _whole(path)
    documents = _parsed(text, str(path)) if text.strip() else []
    refusal = f"{path}: must hold a JSON list of strings or chats, one a document"
    if not isinstance(documents, list):
        raise JaxDeltaError(refusal)
    for number, document in enumerate(documents, 1):
        where, row = f"{path}, item {number}", document if isinstance(document, dict) else None
        if row is not None and is_chat(row.get(key := chat_key(row, text_key, DEFAULT_TEXT_KEY))):
            document = row[key]
        if not isinstance(document, str) and not is_chat(document):
            raise JaxDeltaError(refusal)
        yield document if isinstance(document, str) else conversation(document, where, row)


def _jsonl_file(path: Path, text_key: str) -> Iterator[Any]:
    with _readable(path, OSError), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            fields = _parsed(_decoded(line, where), where)
            if not isinstance(fields, dict):
                raise JaxDeltaError(f"{where}: must be a JSON object with the text under {text_key!r}")
            key = chat_key(fields, text_key, DEFAULT_TEXT_KEY)
            if key not in fields:
                raise JaxDeltaError(
                    f"{where}: has no {text_key!r}, only {_names(fields)}; choose with --text_key"
                )
            yield _text_or_chat(fields, key, where)


def _parquet_file(path: Path, text_key: str) -> Iterator[Any]:
    lib, parquet = (_library(name, path) for name in ("pyarrow.lib", "pyarrow.parquet"))
    with _readable(path, OSError, ValueError, lib.ArrowException), parquet.ParquetFile(path) as file:
        columns = _columns(file.schema_arrow.names, text_key, path)
        batches = file.iter_batches(BATCH_ROWS, columns=columns)
        yield from _rows((batch.to_pylist() for batch in batches), columns[0], path)


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".json": _json_file,
    ".jsonl": _jsonl_file,
    ".parquet": _parquet_file,
}


def _whole(path: Path) -> str:
    with _readable(path, OSError):
        return _decoded(path.read_bytes(), str(path))


def _readable(path: Path, *errors: type[Exception]) -> AbstractContextManager[None]:
    return plain_errors(path, {errors: "{}: cannot be read ({})"})


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JaxDeltaError(f"{where}: is not UTF-8 text (byte {error.start}); convert it first") from error


def _parsed(text: str, where: str) -> Any:
    with plain_errors(where, {(ValueError, RecursionError): "{}: is not JSON ({})"}):
        return json.loads(text)


def _saved_rows(path: Path, text_key: str, split: str) -> Iterator[Any]:
    """The rows of a data set on disk, which is mapped into memory, not read at once."""
    datasets = _library("datasets", path)
    directory = path
    if (path / "dataset_dict.json").is_file():
        directory = path / split
        if not (directory / "state.json").is_file():
            splits = sorted(file.parent.name for file in path.glob("*/state.json"))
            raise JaxDeltaError(f"{path}: has no split {split!r}, only {_names(splits)}; choose with --split")
    with _readable(path, OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError):
        yield from _dataset_rows(datasets.load_from_disk(str(directory)), text_key, path)


def _hub_rows(repo: str, text_key: str, split: str, config: str | None) -> Iterator[Any]:
    datasets = _library("datasets", repo)
    from huggingface_hub import errors, utils

    known = datasets.exceptions
    messages = {
        (ConnectionError, errors.OfflineModeIsEnabled): "{}: no such file or directory here, and the hub "
        "cannot be reached; check the network, or give a file",
        known.DatasetNotFoundError: "{}: no such file or directory here and no such data set on the hub "
        "(if it is private: `hf auth login`)",
        (OSError, ValueError, RuntimeError, known.DatasetsError, errors.HTTPError): "{}: cannot be read from "
        "the hub as a data set ({})",
    }
    with silent(datasets.logging, utils.logging), plain_errors(repo, messages, reason=_shortened):
        try:
            dataset = datasets.load_dataset(repo, config, split=split, streaming=True)
        except known.DatasetNotFoundError as error:
            if "gated" in str(error):
                raise JaxDeltaError(GATED.format(repo)) from error
            raise
        yield from _dataset_rows(dataset, text_key, repo)


def _shortened(error: Exception) -> str:
    """A message of several lines, such as a choice of configurations, as one."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")


def _dataset_rows(dataset: Any, text_key: str, where: str | Path) -> Iterator[Any]:
    if dataset.column_names is not None:  # A stream may not know them before its first row.
        dataset = dataset.select_columns(_columns(dataset.column_names, text_key, where))

    def batches() -> Iterator[list[dict[str, Any]]]:
        for batch in dataset.iter(BATCH_ROWS):
            _columns(list(batch), text_key, where)
            yield [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]

    yield from _rows(batches(), text_key, where)


def _rows(batches: Iterable[list[dict[str, Any]]], text_key: str, where: str | Path) -> Iterator[Any]:
    for number, row in enumerate(itertools.chain.from_iterable(batches), 1):
        yield _text_or_chat(row, chat_key(row, text_key, DEFAULT_TEXT_KEY), f"{where}, row {number}")


def _text_or_chat(row: dict[str, Any], key: str, where: str) -> str | Conversation:
    value = row[key]
    if is_chat(value):
        return conversation(value, where, row)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise JaxDeltaError(f"{where}: {key!r} must be a string, not {kind}")
    check_unicode(value, f"{where}:")
    return value


def _columns(names: list[str], text_key: str, where: str | Path) -> list[str]:
    """The columns to read: of the text or chat, and of what a chat's template is given with it."""
    key = chat_key(names, text_key, DEFAULT_TEXT_KEY)
    if key not in names:
        raise JaxDeltaError(
            f"{where}: has no column {text_key!r}, only {_names(names)}; choose with --text_key"
        )
    return [key, *(name for name in COMPANIONS if name in names)]


def _names(names: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(map(str, names)) or "none", 200, placeholder=" ...")


def _library(name: str, where: str | Path) -> Any:
    with extra("corpora", f"{where}: reading it"):
        return importlib.import_module(name)
