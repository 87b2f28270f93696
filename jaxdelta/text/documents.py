"""The documents of a calibration text: prompts, files, directories and data sets -> an iterator of strings.

Nothing is read before it is asked for: a run takes as many documents as its tokens need.
"""

import contextlib
import importlib
import itertools
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxdelta.errors import JaxDeltaError, extra, first_line

DEFAULT_TEXT_KEY, DEFAULT_SPLIT = "text", "train"
SHUFFLE_BUFFER = 10_000  # documents
BATCH_ROWS = 1000
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)


def shipped_prompts() -> list[str]:
    """The 25 prompts that ship with the package."""
    file = resources.files("jaxdelta") / "data" / "calibration_prompts.json"
    return list(json.loads(file.read_text(encoding="utf-8")))


def read_documents(
    source: str | Path | None = None,
    *,
    text_key: str = DEFAULT_TEXT_KEY,
    split: str = DEFAULT_SPLIT,
    config: str | None = None,
) -> Iterator[str]:
    """The documents of a source, one after the other, read as they are taken.

    A .json holds a list of strings; each line of a .jsonl an object with the text under `text_key`; a
    .parquet a column of that name; any other file is one document. A directory is a data set as
    `Dataset.save_to_disk` writes it, or else all .txt, .json, .jsonl and .parquet files under it, by name.
    What does not exist here and looks like `owner/name` is streamed from the Hugging Face hub.

    Args:
        source: where they are; without it the prompts of the package.
        text_key: the field or column that holds the text.
        split: of a data set that has several.
        config: which of the configurations of a data set on the hub, where it has several.

    Raises:
        JaxDeltaError: when what cannot be used is reached; it names the file, and the line or row.
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


def shuffled(documents: Iterable[str], seed: int, buffer: int = SHUFFLE_BUFFER) -> Iterator[str]:
    """The documents in random order, drawn from a buffer: all of them alike, where it holds them all."""
    rng = np.random.default_rng(seed)
    held: list[str] = []
    for document in documents:
        if len(held) < buffer:
            held.append(document)
            continue
        place = int(rng.integers(buffer))
        yield held[place]
        held[place] = document
    yield from (held[place] for place in rng.permutation(len(held)))


def check_unicode(text: str, where: str) -> None:
    """JSON can hold half of a surrogate pair, which no tokenizer can read: a JaxDeltaError then."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JaxDeltaError(f"{where} is not Unicode (half a character at {error.start})") from error


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and Path(source).suffix.lower() not in (".txt", *_READERS)


def _not_empty(documents: Iterable[str], source: str | Path) -> Iterator[str]:
    empty = True
    for document in documents:
        empty = empty and not document.strip()
        yield document
    if empty:
        raise JaxDeltaError(f"{source}: is empty; a calibration text needs at least a few hundred tokens")


def _files(directory: Path) -> list[Path]:
    known = (".txt", *_READERS)
    files = sorted(f for f in directory.rglob("*") if f.suffix.lower() in known and f.is_file())
    if not files:
        raise JaxDeltaError(f"{directory}: has no file of a kind that is read: {', '.join(known)}")
    return files


def _read_file(path: Path, text_key: str) -> Iterator[str]:
    return _READERS.get(path.suffix.lower(), _text_file)(path, text_key)


def _text_file(path: Path, text_key: str) -> Iterator[str]:
    yield _whole(path)


def _json_file(path: Path, text_key: str) -> Iterator[str]:
    text = _whole(path)
    documents = _parsed(text, str(path)) if text.strip() else []
    if not isinstance(documents, list) or not all(isinstance(document, str) for document in documents):
        raise JaxDeltaError(f"{path}: must hold a JSON list of strings, one a document")
    yield from documents


def _jsonl_file(path: Path, text_key: str) -> Iterator[str]:
    with _readable(path, OSError), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            found = _parsed(_decoded(line, where), where)
            if not isinstance(found, dict):
                raise JaxDeltaError(f"{where}: must be a JSON object with the text under {text_key!r}")
            if text_key not in found:
                raise JaxDeltaError(
                    f"{where}: has no {text_key!r}, only {_names(found)}; choose with --text_key"
                )
            yield _string(found[text_key], text_key, where)


def _parquet_file(path: Path, text_key: str) -> Iterator[str]:
    lib, parquet = (_library(name, path) for name in ("pyarrow.lib", "pyarrow.parquet"))
    with _readable(path, OSError, ValueError, lib.ArrowException), parquet.ParquetFile(path) as file:
        _check_column(file.schema_arrow.names, text_key, path)
        batches = file.iter_batches(BATCH_ROWS, columns=[text_key])
        yield from _strings((batch.column(0).to_pylist() for batch in batches), text_key, path)


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".json": _json_file,
    ".jsonl": _jsonl_file,
    ".parquet": _parquet_file,
}


def _whole(path: Path) -> str:
    with _readable(path, OSError):
        return _decoded(path.read_bytes(), str(path))


@contextlib.contextmanager
def _readable(path: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise JaxDeltaError(f"{path}: cannot be read ({reason})") from error


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JaxDeltaError(f"{where}: is not UTF-8 text (byte {error.start}); convert it first") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise JaxDeltaError(f"{where}: is not JSON ({error})") from error


def _saved_rows(path: Path, text_key: str, split: str) -> Iterator[str]:
    """Of a data set saved on disk, whose files are mapped into memory and not read at once."""
    datasets = _library("datasets", path)
    directory = path
    if (path / "dataset_dict.json").is_file():
        directory = path / split
        if not (directory / "state.json").is_file():
            splits = sorted(file.parent.name for file in path.glob("*/state.json"))
            raise JaxDeltaError(f"{path}: has no split {split!r}, only {_names(splits)}; choose with --split")
    with _readable(path, OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError):
        dataset = datasets.load_from_disk(str(directory))
        yield from _dataset_rows(dataset, text_key, path)


def _hub_rows(repo: str, text_key: str, split: str, config: str | None) -> Iterator[str]:
    datasets = _library("datasets", repo)
    with _plain_hub_errors(repo, datasets):
        dataset = datasets.load_dataset(repo, config, split=split, streaming=True)
        yield from _dataset_rows(dataset, text_key, repo)


def _dataset_rows(dataset: Any, text_key: str, where: str | Path) -> Iterator[str]:
    if dataset.column_names is not None:  # a stream may not know them before its first row
        _check_column(dataset.column_names, text_key, where)
        dataset = dataset.select_columns([text_key])

    def batches() -> Iterator[list[Any]]:
        for batch in dataset.iter(BATCH_ROWS):
            _check_column(list(batch), text_key, where)
            yield batch[text_key]

    yield from _strings(batches(), text_key, where)


def _strings(batches: Iterable[list[Any]], text_key: str, where: str | Path) -> Iterator[str]:
    for number, value in enumerate(itertools.chain.from_iterable(batches), 1):
        yield _string(value, text_key, f"{where}, row {number}")


def _string(value: Any, text_key: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise JaxDeltaError(f"{where}: {text_key!r} must be a string, not {kind}")
    check_unicode(value, f"{where}:")
    return value


def _check_column(names: list[str], text_key: str, where: str | Path) -> None:
    if text_key not in names:
        raise JaxDeltaError(
            f"{where}: has no column {text_key!r}, only {_names(names)}; choose with --text_key"
        )


def _names(names: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(map(str, names)) or "none", 200, placeholder=" ...")


def _library(name: str, where: str | Path) -> Any:
    with extra("corpora", f"{where}: reading it"):
        return importlib.import_module(name)


@contextlib.contextmanager
def _plain_hub_errors(repo: str, datasets: Any) -> Iterator[None]:
    """The errors of the hub and of what is read from it, told in one line each."""
    from huggingface_hub import errors, utils

    # They log every retry; the one line below says it all.
    verbosity = datasets.logging.get_verbosity(), utils.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    utils.logging.set_verbosity(utils.logging.CRITICAL)
    try:
        yield
    except (ConnectionError, errors.OfflineModeIsEnabled) as error:
        raise JaxDeltaError(
            f"{repo}: no such file or directory here, and the hub cannot be reached; check the network, or "
            "give a file"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise JaxDeltaError(
                f"{repo}: is gated; accept its terms on the hub, then log in with `hf auth login`"
            ) from error
        raise JaxDeltaError(
            f"{repo}: no such file or directory here and no such data set on the hub (if it is private: "
            "`hf auth login`)"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, errors.HTTPError) as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        raise JaxDeltaError(f"{repo}: cannot be read from the hub as a data set ({reason})") from error
    finally:
        datasets.logging.set_verbosity(verbosity[0])
        utils.logging.set_verbosity(verbosity[1])
