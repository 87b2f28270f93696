"""A calibration text given as a Python value: texts, rows of a table, or token ids."""

import itertools
import operator
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxdelta.errors import UsageError
from jaxdelta.text.from_ids import IdDocuments
from jaxdelta.text.rows import TokenIds
from jaxdelta.text.tokens import Tokens
from jaxdelta.utils.arrays import as_numpy

IDS, MASK = "input_ids", "attention_mask"
_CHAT_KEYS = {"role", "from", "messages", "conversations"}  # of a message, or of a row with messages
_LONG = 1000  # characters; no name of a file is longer
_GIVE = "give a file, a list of texts, a table with text_key, token ids, or Tokens"


def read_value(value: Any, text_key: str) -> str | Path | Tokens | IdDocuments | Iterator[Any] | None:
    """What a caller gives for a text: a name to be read, Tokens, documents of ids, or of text.

    Documents are strings; chats, which are lists of messages, pass as they are. None stays.

    Raises:
        UsageError: any other type, now or when the item is taken; it is named, with its place.
    """
    if value is None or isinstance(value, Tokens):
        return value
    if isinstance(value, str | os.PathLike):
        return _name(value)
    if isinstance(value, bytes | bytearray | memoryview):
        raise UsageError(f"calibration must not be {_kind(value)}: decode it, and give [text]")
    if isinstance(value, Mapping) and IDS not in value:
        keys = reprlib.repr(list(value))
        hint = "choose one of its splits" if _package(value) == "datasets" else _GIVE
        raise UsageError(f"calibration must not be a {_kind(value)} with the keys {keys}; {hint}")
    if isinstance(value, Mapping) or _is_encoding(value):
        return IdDocuments(_encoded(value, "calibration"))
    if _package(value) in ("datasets", "pandas", "polars", "pyarrow") and not isinstance(value, list):
        value = _column(value, text_key)
    elif _is_array(value):
        value = _items_of_array(value)
    if isinstance(value, Set):
        raise UsageError("calibration must not be a set: its documents have no order; give a list")
    if not isinstance(value, Iterable) or isinstance(value, type):
        raise UsageError(f"calibration must not be {_kind(value)}; {_GIVE}")
    return _documents(iter(value))


def _name(value: Any) -> str | Path:
    """The name of a file or a data set, and no text itself."""
    name = os.fspath(value)
    if not isinstance(name, str):
        raise UsageError("calibration must not be a path of bytes")
    if "\0" in name or (("\n" in name or len(name) > _LONG) and not os.path.exists(name)):
        raise UsageError(f"calibration: {name[:40]!r}... is a text itself, not a file: pass [text]")
    return value if isinstance(value, str) else Path(name)


def _column(table: Any, text_key: str) -> Any:
    """The column of a table, of whatever library; a single column as it is."""
    names = getattr(table, "column_names", None)
    if names is None:
        names = getattr(table, "columns", None)
    if _kind(table) == "LazyFrame":
        raise UsageError("calibration must not be a LazyFrame: give its collect()")
    if names is None:
        if not hasattr(table, "column_names"):
            return table.to_pylist() if hasattr(table, "to_pylist") else table
        return (row[text_key] for row in _rows_with(table, text_key))
    names = list(names)
    if text_key not in names:
        raise UsageError(
            f"calibration: the {_kind(table)} has no column {text_key!r}, only {reprlib.repr(names)}; choose "
            "with text_key"
        )
    if _package(table) == "datasets":
        return (row[text_key] for row in table.select_columns([text_key]))
    column = table[text_key]
    if hasattr(column, "columns"):
        raise UsageError(f"calibration: the {_kind(table)} has several columns {text_key!r}")
    return column.to_pylist() if hasattr(column, "to_pylist") else column


def _rows_with(rows: Iterable[Any], text_key: str) -> Iterator[Any]:
    """The rows of a stream that does not know its columns."""
    for row in rows:
        if text_key not in row:
            names = reprlib.repr(list(row))
            raise UsageError(f"calibration has no column {text_key!r}, only {names}; choose with text_key")
        yield row


def _items_of_array(value: Any) -> Any:
    """The texts or the rows of ids in an array."""
    array = as_numpy(value, "calibration")
    if array.dtype.kind in "OUT":
        return array.tolist() if array.ndim else [array.item()]
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        raise UsageError(
            f"calibration must be whole numbers (ids) in one or two axes, not {array.dtype} of shape "
            f"{array.shape}"
        )
    return array if array.ndim == 2 else [array]


def _documents(items: Iterator[Any]) -> IdDocuments | Iterator[Any]:
    """Texts or documents of ids, by the first item."""
    try:
        first = next(items)
    except StopIteration:
        raise UsageError("calibration is empty: it has no document") from None
    items = itertools.chain([first], items)
    if _is_whole(first):
        return IdDocuments([TokenIds("calibration", _ids(list(items), "calibration"))])
    if _is_ids(first):
        return IdDocuments(itertools.chain.from_iterable(map(_encoded, items, _places())))
    checked = map(_text, items, _places())
    return itertools.chain([next(checked)], checked)  # the first is checked now


def _places() -> Iterator[str]:
    return (f"calibration, item {number}" for number in itertools.count())


def _text(item: Any, where: str) -> Any:
    """A text, or a chat as it is."""
    if isinstance(item, str):
        return str(item)
    messages = item if isinstance(item, list | tuple | np.ndarray) else [item]
    if len(messages) and all(isinstance(part, Mapping) and _CHAT_KEYS & part.keys() for part in messages):
        return item
    hint = "leave it out" if item is None or isinstance(item, float) else _GIVE
    raise UsageError(f"{where} must be a text, not {_kind(item)}; {hint}")


def _is_ids(item: Any) -> bool:
    """Whether an item has the form of a document's ids."""
    if isinstance(item, Mapping):
        return IDS in item
    if isinstance(item, list | tuple):
        return not item or _is_whole(item[0])
    return _is_encoding(item) or (_is_array(item) and as_numpy(item, "calibration").dtype.kind not in "OUT")


def _encoded(item: Any, where: str) -> Iterator[TokenIds]:
    """The documents of a tokenizer's output, of one text or several, without padding; or plain ids."""
    if _is_encoding(item):
        item = {IDS: item.ids, MASK: item.attention_mask}
    if not isinstance(item, Mapping):
        yield TokenIds(where, _ids(item, where))
        return
    rows = _rows(item[IDS], f"{where}, {IDS}")
    masks: list[Any] = [None] * len(rows)
    if item.get(MASK) is not None:
        masks = _rows(item[MASK], f"{where}, {MASK}")
        if len(masks) != len(rows):
            raise UsageError(f"{where}: {MASK} has {len(masks)} rows, {IDS} has {len(rows)}")
    for number, (row, mask) in enumerate(zip(rows, masks, strict=False)):
        place = f"{where}, {IDS}" + f", row {number}" * (len(rows) > 1)
        yield TokenIds(place, _ids(row if mask is None else _unpadded(row, mask, place), place))


def _rows(value: Any, where: str) -> list[Any]:
    """The rows of ids in a list or an array of one or two axes."""
    value = as_numpy(value, where) if _is_array(value) else value
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        raise UsageError(f"{where} must be ids, not {_kind(value)}")
    return [value] if _is_whole(value[0]) else list(value)


def _unpadded(row: Any, mask: Any, where: str) -> list[Any]:
    """The ids where the mask is 1."""
    kept = np.asarray(mask)
    if kept.shape != (len(row),) or not np.isin(kept, (0, 1)).all():
        raise UsageError(f"{where}: {MASK} must be 0 or 1 for each id")
    places = np.flatnonzero(kept)
    if len(places) and places[-1] - places[0] >= len(places):
        raise UsageError(f"{where}: {MASK} leaves out ids between others, not only padding at an end")
    return [row[place] for place in places]


def _ids(value: Any, where: str) -> Int32[np.ndarray, " n"]:
    items = as_numpy(value, where) if _is_array(value) else value
    if not isinstance(items, list | tuple | np.ndarray):
        raise UsageError(f"{where} must be ids, not {_kind(value)}")
    if not len(items):
        raise UsageError(f"{where} has no ids; leave it out")
    plain = isinstance(items, np.ndarray) and items.dtype.kind in "iu" and items.ndim == 1
    if not plain and (wrong := [place for place, item in enumerate(items) if not _is_whole(item)]):
        item = items[wrong[0]]
        raise UsageError(f"{where}: {reprlib.repr(item)} at {wrong[0]} is no id, but {_kind(item)}")
    array = np.asarray(items)
    if wrong := np.flatnonzero((array < 0) | (array > np.iinfo(np.int32).max)).tolist():
        raise UsageError(
            f"{where}: {array[wrong[0]]} at {wrong[0]} is no id; drop padding and ignored labels"
        )
    return array.astype(np.int32)


def _is_whole(value: Any) -> bool:
    if isinstance(value, bool | np.bool_) or getattr(value, "ndim", None):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "dtype") and hasattr(value, "shape")


def _is_encoding(value: Any) -> bool:
    """Whether a value is an Encoding of the package tokenizers."""
    return _package(value) == "tokenizers" and hasattr(value, "ids")


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _kind(value: Any) -> str:
    return type(value).__name__
