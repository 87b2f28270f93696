"""Rows of files -> the value under a key: a text, or token ids."""

import csv
import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxdelta.errors import JaxDeltaError, UsageError, plain_errors
from jaxdelta.text.file_kinds import BLOCK, LongText, characters, lines, opened, readable
from jaxdelta.text.messages import COMPANIONS, Conversation, chat_key, conversation, is_chat

Document = str | Iterable[str]  # a text, or its consecutive characters in parts where it is long
DEFAULT_TEXT_KEY = "text"
SHOWN = 3  # names in a note


class Row(NamedTuple):
    """The value of a row under the key that was asked for, and the row's place."""

    where: str
    value: Any


class TokenIds(NamedTuple):
    """The token ids of a document, and their place."""

    where: str
    ids: Int32[np.ndarray, " n"]


@dataclasses.dataclass
class Reading:
    """What was passed over while documents were read: rows, and files of a directory."""

    null: int = 0
    empty: int = 0
    directory: Path | None = None
    left_out: list[Path] = dataclasses.field(default_factory=list)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence about each, so far."""
        notes = []
        if count := self.null + self.empty:
            kinds = " and ".join(
                f"{n} {kind}" for n, kind in ((self.empty, "empty"), (self.null, "null")) if n
            )
            notes.append(f"{kinds} row{'s' * (count != 1)} of the text skipped")
        if count := len(self.left_out):
            names = ", ".join(str(path.relative_to(self.directory or "")) for path in self.left_out[:SHOWN])
            more = ", ..." * (count > SHOWN)
            notes.append(f"left out of {self.directory}: {count} file{'s' * (count != 1)} ({names}{more})")
        return tuple(textwrap.shorten(note, 300, placeholder=" ...") for note in notes)


def texts(rows: Iterable[Row], key: str, reading: Reading) -> Iterator[Document | Conversation]:
    """The rows' texts and chats; null and empty ones are counted and left out.

    Raises:
        JaxDeltaError: a value is no text.
    """
    for where, value in rows:
        if isinstance(value, LongText | Conversation):
            yield value
        elif value is None:
            reading.null += 1
        elif value == []:  # a chat without messages
            reading.empty += 1
        elif not isinstance(value, str):
            raise JaxDeltaError(f"{where}: {key!r} must be a string, not {type(value).__name__}")
        elif not value or value.isspace():
            reading.empty += 1
        else:
            check_unicode(value, f"{where}:")
            yield value


def token_ids(rows: Iterable[Row], key: str, reading: Reading) -> Iterator[TokenIds]:
    """The rows' token ids; null and empty ones are counted and left out.

    Raises:
        JaxDeltaError: a value is no list of integers from 0 to 2³¹ - 1.
    """
    for where, value in rows:
        if value is None:
            reading.null += 1
            continue
        if not isinstance(value, list):
            raise JaxDeltaError(f"{where}: {key!r} must be a list of token ids, not {type(value).__name__}")
        for place, token in enumerate(value):
            if type(token) is not int or not 0 <= token < 1 << 31:
                raise JaxDeltaError(f"{where}: {key!r} has {_short(token)} at {place}, which is no token id")
        if value:
            yield TokenIds(where, np.array(value, np.int32))
        else:
            reading.empty += 1


def check_unicode(text: str, where: str) -> None:
    """Raises a JaxDeltaError for half a surrogate pair, which JSON can hold but no tokenizer reads."""
    for start in range(0, len(text), BLOCK):  # a long text is not copied whole
        try:
            text[start : start + BLOCK].encode()
        except UnicodeEncodeError as error:
            raise JaxDeltaError(
                f"{where} is not Unicode (half a character at {start + error.start})"
            ) from error


def json_rows(path: Path, key: str) -> Iterator[Row]:
    """The items of a list: strings, chats, or objects with the text or chat under a key."""
    with opened(path) as file:
        text = "".join(characters(file, path))
    items = _parsed_list(text, path) if text.strip() else []
    del text
    if not isinstance(items, list) or not any(
        all(item is None or fits(item) for item in items) for fits in (_is_string, _is_object, is_chat)
    ):
        raise JaxDeltaError(
            f"{path}: must hold a JSON list of strings, of chats, or of objects with the text under {key!r}"
        )
    if key != DEFAULT_TEXT_KEY and not all(isinstance(item, dict | None) for item in items):
        raise UsageError(f"{key!r} cannot be chosen: the items of {path} have no fields")
    for number, item in enumerate(items, 1):
        where = f"{path}, item {number}"
        if isinstance(item, dict):
            item = value_under(item, key, where)
        yield Row(where, conversation(item, where) if is_chat(item) else item)


def jsonl_rows(path: Path, key: str) -> Iterator[Row]:
    """The objects of a file that has one a line."""
    with opened(path) as file:
        for where, line in lines(file, path):
            if line.isspace():
                continue
            fields = parsed(line, where)
            del line
            if not isinstance(fields, dict):
                raise JaxDeltaError(f"{where}: must be a JSON object with the text under {key!r}")
            yield Row(where, value_under(fields, key, where))


def csv_rows(path: Path, key: str) -> Iterator[Row]:
    """The rows of a table of text under a header: of .csv with commas, of .tsv with tabs between fields."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.suffixes[-2:] else ","
    with opened(path) as file, readable(path, csv.Error):
        table = csv.reader((line for _, line in lines(file, path)), delimiter=delimiter, strict=True)
        header = next(filter(None, table), None)
        if header is None:
            return
        check_column(header, key, path)
        if header.count(key) > 1:
            raise JaxDeltaError(f"{path}: has more than one column {key!r}")
        column = header.index(key)
        for fields in filter(None, table):
            where = f"{path}, line {table.line_num}"
            if len(fields) != len(header):
                raise JaxDeltaError(f"{where}: has {len(fields)} fields, and the header {len(header)}")
            yield Row(where, fields[column])


def parsed(text: str, where: str) -> Any:
    """The value of a JSON text."""
    with plain_errors(where, {(ValueError, RecursionError): "{}: is not JSON ({})"}):
        return json.loads(text)


def value_under(fields: Mapping[str, Any], key: str, where: str | Path) -> Any:
    """The value under a key, or else along the key's dots; null if an object on the way is null.

    Where the default key is missing, the value under one of a chat's. Messages become a Conversation.

    Raises:
        JaxDeltaError: there is none, or messages are no chat.
    """
    for value in _values(fields, chat_key(fields, key, DEFAULT_TEXT_KEY)):
        return conversation(value, str(where), fields) if is_chat(value) else value
    raise JaxDeltaError(f"{where}: has no {key!r}, only {names(fields)}; choose with --text_key")


def wanted_columns(columns: Iterable[str], key: str, where: str | Path) -> list[str]:
    """The column that a key, or the beginning of a key with dots, names; then those read with a chat's.

    Raises:
        JaxDeltaError: there is none.
    """
    columns = list(columns)
    key = chat_key(columns, key, DEFAULT_TEXT_KEY)
    found = next((name for name in (key, *(head for head, _ in _divided(key))) if name in columns), None)
    if found is None:
        check_column(columns, key, where)
    return [str(found), *(name for name in COMPANIONS if name in columns and name != found)]


def check_column(columns: list[str], key: str, where: str | Path) -> None:
    """Raises a JaxDeltaError if there is no such column."""
    if key not in columns:
        raise JaxDeltaError(f"{where}: has no column {key!r}, only {names(columns)}; choose with --text_key")


def names(found: Iterable[str]) -> str:
    """Names for a message."""
    return textwrap.shorten(", ".join(map(str, found)) or "none", 200, placeholder=" ...")


def _values(fields: Mapping[str, Any], key: str) -> Iterator[Any]:
    if key in fields:
        yield fields[key]
    for head, rest in _divided(key):
        inner = fields.get(head, ...)
        if inner is None:
            yield None
        elif isinstance(inner, dict):
            yield from _values(inner, rest)


def _divided(key: str) -> Iterator[tuple[str, str]]:
    """A key divided at each of its dots."""
    return ((key[:i], key[i + 1 :]) for i, letter in enumerate(key) if letter == ".")


def _parsed_list(text: str, path: Path) -> Any:
    try:
        return parsed(text, str(path))
    except JaxDeltaError as error:
        if "Extra data" in str(error):
            raise JaxDeltaError(f"{error}; name it .jsonl if each line is an object") from error
        raise


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _short(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, default=str), 40, placeholder=" ...")
