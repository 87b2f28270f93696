"""Rows of .parquet files and of data sets, saved on disk or streamed from the Hugging Face hub."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdelta.errors import JaxDeltaError, plain_errors
from jaxdelta.text.file_kinds import library, readable
from jaxdelta.text.rows import Row, names, value_under, wanted_columns
from jaxdelta.utils.hub import GATED, silent

BATCH_ROWS = 64  # decoded at once; a row may be a book


def parquet_rows(path: Path, key: str) -> Iterator[Row]:
    """The rows of a .parquet; only the columns of the key and of a chat's tools are read."""
    lib, parquet = (library(name, path) for name in ("pyarrow.lib", "pyarrow.parquet"))
    with readable(path, OSError, ValueError, lib.ArrowException), parquet.ParquetFile(path) as file:
        columns = wanted_columns(file.schema_arrow.names, key, path)
        number = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            for row in range(len(batch)):
                number += 1
                where = f"{path}, row {number}"
                fields = {name: batch.column(name)[row].as_py() for name in columns}
                yield Row(where, value_under(fields, key, where))


def is_saved(path: Path) -> bool:
    """Whether a directory is a data set as `Dataset.save_to_disk` or `DatasetDict.save_to_disk` writes it."""
    return (path / "state.json").is_file() or has_splits(path)


def has_splits(path: Path) -> bool:
    """Whether a directory is a saved DatasetDict."""
    return (path / "dataset_dict.json").is_file()


def split_directory(path: Path, split: str) -> Path:
    """The directory of a split of a saved data set.

    Raises:
        JaxDeltaError: there is no such split.
    """
    if not has_splits(path):
        return path
    if not (path / split / "state.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        raise JaxDeltaError(f"{path}: has no split {split!r}, only {names(splits)}; choose with --split")
    return path / split


def saved_rows(path: Path, key: str, directory: Path) -> Iterator[Row]:
    """The rows of a data set on disk, or of a split in its directory; they are mapped into memory."""
    datasets = library("datasets", path)
    with readable(path, OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError):
        yield from dataset_rows(datasets.load_from_disk(str(directory)), key, path)


def hub_rows(repo: str, key: str, split: str, config: str | None) -> Iterator[Row]:
    """The rows of a data set of the hub, fetched as they are taken."""
    datasets = library("datasets", repo)
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
        yield from dataset_rows(dataset, key, repo)


def dataset_rows(dataset: Any, key: str, where: str | Path) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`, or of one that is streamed."""
    if dataset.column_names is not None:  # A stream may not know them before its first row.
        dataset = dataset.select_columns(wanted_columns(dataset.column_names, key, where))
    number = 0
    for batch in dataset.iter(BATCH_ROWS):
        columns = wanted_columns(batch, key, where)
        for values in zip(*(batch[name] for name in columns), strict=True):
            number += 1
            place = f"{where}, row {number}"
            yield Row(place, value_under(dict(zip(columns, values, strict=True)), key, place))


def _shortened(error: Exception) -> str:
    """A message of several lines, such as a choice of configurations, as one."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
