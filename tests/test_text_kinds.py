"""Kinds of texts: each is read as what it is, or refused in a sentence; what is passed over is said."""

import codecs
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import one_line
from test_corpus import READ, fault, read, save_dataset, write, write_jsonl

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.run.analyze import analyze
from jaxdelta.text.documents import read_documents, read_ids
from jaxdelta.text.from_ids import IdDocuments, load_texts, windows_of_ids
from jaxdelta.text.rows import Reading, TokenIds
from jaxdelta.text.tokenizer import load_encoder
from jaxdelta.text.windows import tokenize

TEXTS = ['The "cat", sat.\r\nOn two lines.', "Über\t漢字 😀", "plain"]
QUICK: dict[str, Any] = {"top_k": 2, "bootstrap": 0, "null_draws": 0, "views": "none"}


def table(rows: Sequence[Sequence[str]], delimiter: str) -> str:
    """As RFC 4180 has it: fields in quotes, quotes doubled, lines that end in CR LF."""
    quoted = (delimiter.join('"' + field.replace('"', '""') + '"' for field in row) for row in rows)
    return "\r\n".join(quoted) + "\r\n"


def rows(key: str = "text") -> list[list[str]]:
    return [["id", key, "more"], *([str(i), text, ""] for i, text in enumerate(TEXTS))]


CONTENTS: dict[str, str] = {
    "a.csv": table(rows(), ","),
    "a.tsv": table(rows(), "\t"),
    "a.jsonl": "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS),
    "a.ndjson": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in TEXTS),
    "strings.json": json.dumps(TEXTS),
    "objects.json": json.dumps([{"id": 1, "text": text} for text in TEXTS], ensure_ascii=False, indent=1),
}


def compressed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zst"):
        import pyarrow

        return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return content


# Kinds


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("name", CONTENTS)
def test_tables_and_objects(name: str, mark: bytes, compression: str, tmp_path: Path) -> None:
    content = compressed(compression.lower(), mark + CONTENTS[name].encode())
    assert read(write(tmp_path / (name + compression), content)) == TEXTS


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "prose", "code.py", "corpus.v2", "data-1.0"])
def test_plain_text_is_as_the_file_has_it(name: str, mark: bytes, compression: str, tmp_path: Path) -> None:
    text = "\r\nTwo lines\rthree\n\n\ufeff with a mark inside.\r\n"
    content = compressed(compression, mark + text.encode())
    assert read(write(tmp_path / (name + compression), content)) == [text]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_field_may_be_long(name: str, tmp_path: Path) -> None:
    long = "a long field, " * 50_000
    path = write(tmp_path / name, table([["text"], [long]], "\t" if name == "a.tsv" else ","))
    assert read(path) == [long]


def test_a_key_may_be_chosen(tmp_path: Path) -> None:
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        assert read(write(tmp_path / name, table(rows("body"), delimiter)), text_key="body") == TEXTS
    objects = write(tmp_path / "a.json", json.dumps([{"body": text} for text in TEXTS]))
    assert read(objects, text_key="body") == TEXTS


NESTED = [{"meta": {"text": text, "deep": {"er": text + "!"}}, "n": 1} for text in TEXTS]


def nested_sources(directory: Path, fields: list[dict[str, Any]]) -> list[Path]:
    import datasets
    import pyarrow
    from pyarrow import parquet

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(fields).save_to_disk(directory / "saved")
    parquet.write_table(pyarrow.Table.from_pylist(fields), directory / "a.parquet")
    return [
        directory / "saved",
        directory / "a.parquet",
        write(directory / "a.json", json.dumps(fields)),
        write(directory / "a.jsonl", "\n".join(map(json.dumps, fields))),
    ]


def test_nested_keys(tmp_path: Path) -> None:
    for source in nested_sources(tmp_path, NESTED):
        assert read(source, text_key="meta.text") == TEXTS, source
        assert read(source, text_key="meta.deep.er") == [text + "!" for text in TEXTS]
        assert "has no " in fault(source, text_key="meta.body")
        assert "has no " in fault(source, text_key="meta.text.more")
        assert "must be a string, not dict" in fault(source, text_key="meta.deep")


def test_a_key_with_dots_comes_first(tmp_path: Path) -> None:
    fields = [{"meta": {"text": "nested"}, "meta.text": text} for text in TEXTS]
    for source in nested_sources(tmp_path, fields):
        assert read(source, text_key="meta.text") == TEXTS, source
    dotted = [{"a.b": {"c": text}} for text in TEXTS]
    (tmp_path / "more").mkdir()
    for source in nested_sources(tmp_path / "more", dotted):
        assert read(source, text_key="a.b.c") == TEXTS, source


# Standard input


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def pipe(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return pipe


def test_standard_input(piped: Callable[[bytes], None]) -> None:
    piped(codecs.BOM_UTF8 + "Über\r\n\n漢字".encode())
    assert read("-") == ["Über\r\n\n漢字"]
    piped(b"many words " * 100_000)
    assert "".join(next(read_documents("-"))) == "many words " * 100_000
    piped(b"ab\xff")
    assert fault("-") == "standard input: is not UTF-8 text (byte 2); convert it first"
    piped(b"ab\0")
    assert fault("-") == "standard input: has a zero byte at 2, so it is not UTF-8 text"
    piped(b"")
    assert fault("-").startswith("standard input: is empty;")
    with pytest.raises(UsageError, match="text_key: standard input has no fields"):
        read("-", text_key="body")


def test_nothing_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdin in (None, Terminal()):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UsageError, match="- is standard input, and no text comes from there"):
            read_documents("-")


# Refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", "%PDF-1.7", ": .pdf is not a kind that is read: .txt, .json, .jsonl, .ndjson, .csv, .tsv,"),
        ("a.docx", "PK", ": .docx is not a kind that is read"),
        ("a.html", "<p>text</p>", ": .html is not a kind that is read"),
        ("a.xml", "<p>text</p>", ": .xml is not a kind that is read"),
        ("a.parquet.gz", "", ": .parquet.gz is not a kind that is read"),
        ("a.html.zst", "", ": .html.zst is not a kind that is read"),
        ("a.txt", "%PDF-1.7 and so on", ": is a PDF; it is not a text"),
        ("a", b"PK\x03\x04 and so on", ": is a zip archive"),
        ("a.txt", gzip.compress(b"text", mtime=0), ": is compressed; name it .gz"),
        ("a.jsonl.7z", b"7z\xbc\xaf\x27\x1c", ": is not UTF-8 text (byte 2)"),
        ("a.md", b"text\0more", ": has a zero byte at 4, so it is not UTF-8 text"),
        ("a.csv", "text\nUTF-16".encode("utf-16"), ": is UTF-16, not UTF-8 text; convert it first"),
        ("a.jsonl", "{}".encode("utf-32"), ": is UTF-32, not UTF-8 text; convert it first"),
        ("a.json", codecs.BOM_UTF16_BE + "[]".encode("utf-16-be"), ": is UTF-16, not UTF-8 text"),
        ("a.txt", "no mark".encode("utf-16-le"), ": has a zero byte at 1"),
        ("a.txt.gz", "no gzip", ": cannot be read (Not a gzipped file"),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 999, mtime=0)[:-12],
            ": cannot be read (Compressed file ended before",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"text" * 9, mtime=0)[:-8] + b"12345678",
            ": cannot be read (CRC check failed",
        ),
        ("a.txt.zst", "no zstd", ": cannot be read (ZSTD decompress failed"),
        ("a.txt.zst", compressed(".zst", b"text" * 999)[:-4], ": cannot be read (Truncated compressed"),
        ("a.txt.gz", gzip.compress("caf\xe9".encode("latin1"), mtime=0), ": is not UTF-8 text (byte 3)"),
        ("a.json", '[{"text": "a"}, "b"]', ": must hold a JSON list of strings, of chats, or of objects"),
        ("a.json", '[{"body": "a"}]', ", item 1: has no 'text', only body; choose with --text_key"),
        ("a.json", '["a", "b\\ud800"]', ", item 2: is not Unicode (half a character at 1)"),
        ("a.csv", "body\nb\n", ": has no column 'text', only body; choose with --text_key"),
        ("a.csv", "id;text\n1;b\n", ": has no column 'text', only id;text;"),
        ("a.csv", "text,text\na,b\n", ": has more than one column 'text'"),
        ("a.csv", "id,text\n1,a\n2,b,c\n", ", line 3: has 3 fields, and the header 2"),
        ("a.tsv", "id\ttext\n1\n", ", line 2: has 1 fields, and the header 2"),
        ("a.csv", 'text\n"a" b\n', ": cannot be read (',' expected after '\"')"),
        ("a.csv", 'text\n"never closed\n', ": cannot be read (unexpected end of data)"),
        ("a.csv", b"text\n\xff\n", ", line 2: is not UTF-8 text (byte 0)"),
        ("a.csv", "text\n", ": is empty"),
        ("a.csv", "", ": is empty"),
        ("a.ndjson", '{"text": "a"}\n[]', ", line 2: must be a JSON object with the text under 'text'"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    assert fault(path).startswith(f"{path}{message}")


def test_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is a pipe, not a file; for standard input give --calibration=-" in fault(tmp_path / "pipe.txt")
    assert "is a device or a socket" in fault("/dev/null")
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    assert "link.jsonl: cannot be read (No such file" in fault(tmp_path / "link.jsonl")
    (tmp_path / "a.jsonl").mkdir()
    assert "a.jsonl: has no file of a kind that is read" in fault(tmp_path / "a.jsonl")
    for name in ("a" * 5000, "a\0.txt"):
        assert ": cannot be read (" in fault(name)
    for name in ("", "  "):
        with pytest.raises(UsageError, match="calibration: the name is empty; leave it out"):
            read_documents(name)


def test_options_that_cannot_apply(tmp_path: Path) -> None:
    text, lines = write(tmp_path / "a.txt", "x"), write_jsonl(tmp_path / "a.jsonl", TEXTS)
    strings = write(tmp_path / "a.json", '["a"]')
    saved, split = save_dataset(tmp_path / "saved"), save_dataset(tmp_path / "split", splits=("train",))
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.txt", "x")
    for source, option, message in (
        (text, {"text_key": "body"}, f"text_key: {text} has no fields"),
        (None, {"text_key": "body"}, "text_key: the default text has no fields"),
        (tmp_path / "texts", {"text_key": "body"}, "has no fields"),
        (strings, {"text_key": "body"}, "have no fields"),
        (lines, {"split": "test"}, f"split: {lines} has no splits"),
        (saved, {"split": "test"}, f"split: {saved} has no splits"),
        (lines, {"config": "small"}, f"dataset_config: {lines} has no configurations"),
        (split, {"config": "small"}, f"dataset_config: {split} has no configurations"),
        (None, {"config": "small"}, "has no configurations"),
    ):
        with pytest.raises(UsageError) as raised:
            read(source, **option)
        assert message in str(raised.value)
    assert read(split, split="train") == READ


# What is passed over


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    values = ["a", None, "", "b", " \n", None, "c"]
    fields = [{"meta": {"text": value}, "text": value} for value in values]
    fields[1]["meta"] = None
    for key in ("text", "meta.text"):
        for source in nested_sources(tmp_path / key, fields) if (tmp_path / key).mkdir() is None else []:
            reading = Reading()
            assert read(source, text_key=key, reading=reading) == ["a", "b", "c"], source
            assert reading.notes == ("2 empty and 2 null rows of the text skipped",)
    for name, content in (("a.csv", "id,text\n1,a\n2,\n3,b\n"), ("a.json", '["a", "", "b"]')):
        reading = Reading()
        assert read(write(tmp_path / name, content), reading=reading) == ["a", "b"]
        assert reading.notes == ("1 empty row of the text skipped",)


def test_hidden_files_and_other_kinds_are_left_out(tmp_path: Path) -> None:
    for name in ("b/.ipynb_checkpoints/a-checkpoint.txt", "._a.txt", ".git/config.txt", "b/.hidden.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, b"\xff\0 not read")
    for name in ("README.md", "b/model.safetensors", "script.py", "a.pdf"):
        write(tmp_path / name, "not read")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(".")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b" / "c.csv", "text\ntwo\n")
    write(tmp_path / "d.txt.gz", gzip.compress(b"three"))
    reading = Reading()
    assert read(tmp_path, reading=reading) == ["one", "two", "three"]
    assert reading.notes == (f"left out of {tmp_path}: 10 files (._a.txt, .git, README.md, ...)",)


def test_notes_are_short(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / (f"{number}" + "n" * 150 + ".md"), "not read")
    write(tmp_path / "a.txt", "one")
    reading = Reading()
    read(tmp_path, reading=reading)
    assert max(map(len, reading.notes)) <= 300


def test_notes_are_said_and_kept(tmp_path: Path) -> None:
    path, said = write_jsonl(tmp_path / "a.jsonl", ["The cat sat on the mat.", "", "And then it slept."]), []
    run = analyze("demo", path, listener=said.append, **QUICK)
    assert run.run["notes"] == ["1 empty row of the text skipped"]
    assert " note: 1 empty row of the text skipped" in said


def test_the_text_is_looked_at_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr("jaxdelta.run.inputs.open_checkpoint", opened)
    for source, options in (
        (tmp_path / "misspelt.txt", {}),
        ("", {}),
        (write(tmp_path / "a.pdf", "%PDF"), {}),
        (write(tmp_path / "a.jsonl", "no JSON"), {}),
        (write(tmp_path / "a.txt", "text"), {"text_key": "body"}),
        ("owner/no-such-data", {}),
        (None, {"ids_key": "input_ids"}),
    ):
        with pytest.raises(JaxDeltaError):
            analyze("owner/model", source, **options)


# Token ids

IDS = [[5, 7, 1, 2], [9], [], None, [3, 3, 3, 8, 4, 4]]
GIVEN = [ids for ids in IDS if ids]


def id_sources(directory: Path, values: Sequence[Any] = IDS) -> list[Path]:
    return nested_sources(directory, [{"input_ids": value, "labels": 0} for value in values])


def test_token_ids(tmp_path: Path) -> None:
    for source in id_sources(tmp_path):
        reading = Reading()
        found = list(read_ids(source, "input_ids", reading=reading))
        assert [document.ids.tolist() for document in found] == GIVEN, source
        assert reading.notes == ("1 empty and 1 null rows of the text skipped",)
        assert found[1].where.startswith(str(source))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, -5], ", line 2: 'input_ids' has -5 at 1, which is no token id"),
        ([True, 2], ", line 2: 'input_ids' has true at 0"),
        ([1, 2, 3.0], ", line 2: 'input_ids' has 3.0 at 2"),
        ([1, None], ", line 2: 'input_ids' has null at 1"),
        ([[1, 2]], ", line 2: 'input_ids' has [1, 2] at 0"),
        (["1"], ", line 2: 'input_ids' has \"1\" at 0"),
        ([2**40], ", line 2: 'input_ids' has 1099511627776 at 0"),
        ("1 2 3", ", line 2: 'input_ids' must be a list of token ids, not str"),
        (7, ", line 2: 'input_ids' must be a list of token ids, not int"),
        ({"a": 1}, ", line 2: 'input_ids' must be a list of token ids, not dict"),
    ],
)
def test_what_is_no_token_id(value: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"input_ids": ids}) for ids in ([1, 2], value)))
    assert one_line(lambda: list(read_ids(path, "input_ids"))).startswith(f"{path}{message}")


def test_sources_without_token_ids(tmp_path: Path) -> None:
    text, lines = write(tmp_path / "a.txt", "1 2 3"), write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for source in (None, "-", text):
        with pytest.raises(UsageError, match=r"ids_key: .* has no fields"):
            read_ids(source, "input_ids")
    with pytest.raises(UsageError, match=r"ids_key: .*a\.txt has no fields"):
        read_ids(tmp_path, "input_ids")
    assert "has no 'input_ids', only id, text" in one_line(lambda: list(read_ids(lines, "input_ids")))
    with pytest.raises(UsageError, match="text_key: ids_key is given too"):
        analyze("demo", lines, ids_key="input_ids", text_key="body")
    with pytest.raises(UsageError, match="ids_key: needs a file"):
        analyze("demo", ["a text"], ids_key="input_ids")


def given(documents: Sequence[Sequence[int]]) -> IdDocuments:
    rows = [TokenIds(f"row {i}", np.array(ids, np.int32)) for i, ids in enumerate(documents)]
    return IdDocuments(rows, joined=True)


@pytest.mark.parametrize("layout", ["stream", "packed"])
@pytest.mark.parametrize(("max_tokens", "seq_len"), [(100, 100), (6, 4), (9, 3), (10, 5), (2, 2)])
def test_ids_in_windows_are_those_of_a_text(layout: str, max_tokens: int, seq_len: int) -> None:
    """Texts of one token a letter; those of a stream are one document here, since nothing is put between."""
    texts = ["abcdefg", "h", "ijklm", "nop"]
    sizes: dict[str, Any] = {
        "max_tokens": max_tokens,
        "vocab_size": 256,
        "layout": layout,
        "seq_len": seq_len,
    }

    def letters(found: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        return [([ord(letter) for letter in text], list(range(len(text)))) for text in found]

    wanted = tokenize(["".join(texts)] if layout == "stream" else texts, letters, **sizes)
    found = windows_of_ids(given([list(map(ord, text)) for text in texts]), **sizes)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.positions, wanted.positions)
    np.testing.assert_array_equal(found.documents < 0, wanted.documents < 0)
    if layout == "packed":
        assert found.fingerprint == wanted.fingerprint
    else:
        owners = np.repeat(range(4), list(map(len, texts)))[: found.count]
        assert found.documents[found.documents >= 0].tolist() == owners.tolist()
    assert found.text(0, 1) == f"<{found.ids[0, 1]}>"


def test_ids_beyond_the_vocabulary() -> None:
    sizes: dict[str, Any] = {"max_tokens": 9, "vocab_size": 9, "layout": "stream", "seq_len": 9}
    message = one_line(windows_of_ids, given([[1, 2], [3, 9, 1]]), **sizes)
    assert message == "row 1: has token 9 at 1, the model has 9: they do not belong together"
    assert "has 1 token; at least 2" in one_line(windows_of_ids, given([[1]]), **sizes)
    assert "has 0 tokens; at least 2" in one_line(windows_of_ids, IdDocuments([], joined=True), **sizes)


def test_a_run_of_ids_is_the_run_of_their_text(tmp_path: Path, tiny_checkpoint: Path) -> None:
    text = "The cat sat on the mat, and looked at the moon."
    ids = load_encoder(tiny_checkpoint)([text])[0][0]
    path = write(tmp_path / "a.jsonl", json.dumps({"input_ids": ids}))
    found = analyze(tiny_checkpoint, path, ids_key="input_ids", **QUICK)
    wanted = analyze(tiny_checkpoint, [text], **QUICK)
    assert found.run["text_fingerprint"] == wanted.run["text_fingerprint"]
    assert found.run["flags"]["ids_key"] == "input_ids"
    assert found.per_layer == wanted.per_layer
    assert found.text == wanted.text


def test_texts_of_ids(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text_of = load_texts(tiny_checkpoint)
    assert text_of is not None
    assert [text_of(token) for token in load_encoder(tiny_checkpoint)([" a b"])[0][0]] == [*" a b"]
    assert load_texts(tmp_path) is None
    write(tmp_path / "tokenizer.json", "damaged")
    assert load_texts(tmp_path) is None
