"""Where the documents of a calibration text come from, and what is said of those that cannot be used."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import one_line

from jaxdelta.errors import JaxDeltaError
from jaxdelta.text import tables
from jaxdelta.text.documents import read_documents, shipped_prompts, shuffled
from jaxdelta.text.rows import Reading

DOCUMENTS = ["The cat sat.\n", "", "Über 漢字 😀", "\n\nlines  \n", "x"]
READ = [document for document in DOCUMENTS if document]  # empty rows are left out
REPO = "owner/data-1.0"


def read(source: Any, **options: Any) -> list[str]:
    return list(read_documents(source, **options))


def fault(source: Any, **options: Any) -> str:
    return one_line(lambda: read(source, **options))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, documents: list[str] = DOCUMENTS, key: str = "text") -> Path:
    return write(path, "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(documents)))


def write_parquet(path: Path, values: list[Any] = DOCUMENTS, key: str = "text", **options: Any) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(values))), key: values}), path, **options)
    return path


def save_dataset(directory: Path, key: str = "text", splits: tuple[str, ...] = ()) -> Path:
    import datasets

    dataset = datasets.Dataset.from_dict({"id": list(range(len(DOCUMENTS))), key: DOCUMENTS})
    whole: Any = datasets.DatasetDict(dict.fromkeys(splits, dataset)) if splits else dataset
    datasets.disable_progress_bars()
    whole.save_to_disk(directory)
    return directory


# Files


def test_shipped_prompts() -> None:
    documents = shipped_prompts()
    assert len(documents) == 25
    assert all(isinstance(document, str) and document.strip() for document in documents)
    assert documents[0] == "The Eiffel Tower is located in"
    assert read(None) == documents


def test_text_file_is_one_document(tmp_path: Path) -> None:
    text = "One.\n\nTwo, 漢字.\n"
    assert read(write(tmp_path / "a.txt", text)) == [text]
    assert read(str(tmp_path / "a.txt")) == [text]
    assert read(write(tmp_path / "no_suffix", '["a"]')) == ['["a"]']


def test_json_file_is_a_list_of_documents(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", json.dumps(DOCUMENTS))) == READ
    escaped = write(tmp_path / "b.json", json.dumps(DOCUMENTS, ensure_ascii=False, indent=2))
    assert read(escaped) == READ


def test_jsonl_file_has_a_document_a_line(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl")
    assert read(file) == READ
    spaced = write(tmp_path / "b.jsonl", b"\n" + file.read_bytes().replace(b"\n", b"\r\n \r\n").rstrip())
    assert read(spaced) == READ
    assert read(write_jsonl(tmp_path / "c.jsonl", key="body"), text_key="body") == READ


def test_parquet_file_has_a_document_a_row(tmp_path: Path) -> None:
    assert read(write_parquet(tmp_path / "a.parquet")) == READ
    assert read(write_parquet(tmp_path / "b.parquet", key="body"), text_key="body") == READ
    many = [str(i) for i in range(5000)]
    assert read(write_parquet(tmp_path / "c.parquet", many, row_group_size=700)) == many


def test_directory_holds_files_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    write(tmp_path / "b" / "c" / "1.txt", "first")
    write_jsonl(tmp_path / "b" / "d.jsonl", ["second", "third"])
    write(tmp_path / "e.JSON", '["fourth"]')
    write_parquet(tmp_path / "f.parquet", ["fifth"])
    for name in ("README.md", "a.csv.bz2", "b/model.safetensors", "txt"):
        write(tmp_path / name, "is not read")
    (tmp_path / "directory.txt").mkdir()
    assert read(tmp_path) == ["first", "second", "third", "fourth", "fifth"]


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "text")
    assert read("~/a.txt") == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", ": is empty"),
        ("a.txt", " \n\t\n", ": is empty"),
        ("a.json", "", ": is empty"),
        ("a.json", "\n", ": is empty"),
        ("a.json", "[]", ": is empty"),
        ("a.json", '["", " "]', ": is empty"),
        ("a.jsonl", "", ": is empty"),
        ("a.jsonl", '{"text": ""}\n\n', ": is empty"),
        ("a.txt", b"caf\xe9 au lait", ": is not UTF-8 text (byte 3)"),
        ("a.txt", "UTF-16".encode("utf-16"), ": is UTF-16, not UTF-8 text"),
        ("a.json", b'["caf\xe9"]', ": is not UTF-8 text (byte 5)"),
        ("a.json", "{", ": is not JSON"),
        ("a.json", "[" * 100_000, ": is not JSON"),
        ("a.json", "plain text", ": is not JSON"),
        ("a.json", '{"text": "a"}', ": must hold a JSON list of strings"),
        ("a.json", '"a"', ": must hold a JSON list of strings"),
        ("a.json", "null", ": must hold a JSON list of strings"),
        ("a.json", '["a", 1]', ": must hold a JSON list of strings"),
        ("a.json", '[["a"]]', ": must hold a JSON list of strings"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', ", line 2: is not JSON"),
        ("a.jsonl", "\n\nplain text", ", line 3: is not JSON"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, ", line 2: is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', ", line 2: is not UTF-8 text (byte 10)"),
        ("a.jsonl", '"a"', ", line 1: must be a JSON object with the text under 'text'"),
        (
            "a.jsonl",
            '{"id": 1, "body": ""}',
            ", line 1: has no 'text', only id, body; choose with --text_key",
        ),
        ("a.jsonl", "{}", ", line 1: has no 'text', only none; choose"),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}', ", line 2: 'text' must be a string, not int"),
        ("a.jsonl", '{"text": null}', ": is empty"),
        ("a.jsonl", '{"text": ["a"]}', ", line 1: 'text' must be a string, not list"),
        ("a.jsonl", '{"text": "abc\\ud800"}', ", line 1: is not Unicode (half a character at 3)"),
        ("a.parquet", "PAR1 not quite", ": cannot be read ("),
        ("a.parquet", "", ": cannot be read ("),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    assert fault(path).startswith(f"{path}{message}")


def test_unusable_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert fault(write_parquet(path, key="body")) == (
        f"{path}: has no column 'text', only id, body; choose with --text_key"
    )
    assert fault(write_parquet(path, [b"a"])) == f"{path}, row 1: 'text' must be a string, not bytes"
    write_parquet(path)
    assert fault(path, text_key="id") == f"{path}, row 1: 'id' must be a string, not int"
    assert fault(write_parquet(path, [""])).startswith(f"{path}: is empty")
    plain = {"compression": "none", "use_dictionary": False}
    content = write_parquet(path, ["a" * 99] * 5000, **plain).read_bytes()
    path.write_bytes(content.replace(b"a" * 99, b"\xff" * 99))
    assert fault(path).startswith(f"{path}: cannot be read (")


@pytest.mark.parametrize("name", ["missing.txt", "missing.json", "missing.jsonl", "missing.parquet", "f/g"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    write(tmp_path / "f", "x")
    assert fault(tmp_path / name).startswith(f"{tmp_path / name}: cannot be read (")


def test_directory_without_texts(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "text")
    assert fault(tmp_path).startswith(f"{tmp_path}: has no file of a kind that is read: .txt, .json, .jsonl,")


def test_a_bad_file_in_a_directory_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "fine")
    bad = write(tmp_path / "b.jsonl", '{"text": "fine"}\nnot so fine\n')
    documents = read_documents(tmp_path)
    assert [next(documents), next(documents)] == ["fine", "fine"]
    with pytest.raises(JaxDeltaError) as raised:
        next(documents)
    assert str(raised.value).startswith(f"{bad}, line 2: is not JSON")


@pytest.mark.parametrize(("library", "name"), [("pyarrow.parquet", "a.parquet"), ("datasets", REPO)])
def test_a_library_is_missing(
    tmp_path: Path, library: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    source = write(tmp_path / name, "") if "." in name[-8:] and "/" not in name else name
    package = library.partition(".")[0]
    assert fault(source) == (
        f"{source}: reading it needs {package}, which is not installed (pip install 'jaxdelta[corpora]')"
    )


# Data sets


def test_dataset_on_disk(tmp_path: Path) -> None:
    assert read(save_dataset(tmp_path / "plain")) == READ
    assert read(save_dataset(tmp_path / "named", key="body"), text_key="body") == READ
    split = save_dataset(tmp_path / "split", splits=("train", "test"))
    assert read(split) == read(split, split="test") == READ


def test_unusable_dataset_on_disk(tmp_path: Path) -> None:
    named = save_dataset(tmp_path / "named", key="body")
    assert fault(named) == f"{named}: has no column 'text', only id, body; choose with --text_key"
    assert fault(named, text_key="id").startswith(f"{named}, row 1: 'id' must be a string, not int")
    split = save_dataset(tmp_path / "split", splits=("valid", "test"))
    assert fault(split) == f"{split}: has no split 'train', only test, valid; choose with --split"
    write(named / "state.json", "{")
    assert fault(named).startswith(f"{named}: cannot be read (")
    write(named / "state.json", "{}")
    assert fault(named).startswith(f"{named}: cannot be read (")
    for file in (split / "test").glob("*.arrow"):
        file.unlink()
    assert fault(split, split="test").startswith(f"{split}: cannot be read (")


class Hub:
    """Serves files in place of the hub's data sets, and remembers what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **files: Any):
        import datasets

        self.asked: list[tuple[str, str | None, str]] = []
        load = datasets.load_dataset

        def load_dataset(repo: str, config: str | None, *, split: str, streaming: bool) -> Any:
            assert streaming
            self.asked.append((repo, config, split))
            return load("parquet", data_files=files, split=split, streaming=True)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "a.parquet", DOCUMENTS * 500)
    hub = Hub(monkeypatch, train=str(file), test=str(write_parquet(tmp_path / "b.parquet", ["b"])))
    assert read(REPO) == READ * 500
    assert read(REPO, split="test", config="small") == ["b"]
    assert hub.asked == [(REPO, None, "train"), (REPO, "small", "test")]
    assert "has no column 'body', only" in fault(REPO, text_key="body")
    message = fault(REPO, split="valid")
    assert message.startswith(f"{REPO}: cannot be read from the hub as a data set (Bad split: valid.")
    assert "train" in message


def test_the_hub_cannot_be_reached() -> None:
    """datasets itself, with HF_HUB_OFFLINE=1."""
    assert fault(REPO) == (
        f"{REPO}: no such file or directory here, and the hub cannot be reached; check the network, or give "
        "a file"
    )


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("DatasetNotFoundError", "Dataset 'x' doesn't exist on the Hub.", "no such data set on the hub"),
        ("DatasetNotFoundError", "Dataset 'x' is a gated dataset on the Hub.", "is gated; accept its terms"),
        (
            "DataFilesNotFoundError",
            "No (supported) data files.",
            "as a data set (No (supported) data files.)",
        ),
        ("ValueError", "Config name is missing.\nPick one:\n['a', 'b']", "(Config name is missing. Pick one"),
        ("RuntimeError", "Dataset scripts are no longer supported", "(Dataset scripts are no longer"),
        ("OSError", "Read timed out.", "(Read timed out.)"),
        ("ConnectionError", "Couldn't reach it", "the hub cannot be reached"),
    ],
)
def test_errors_of_the_hub(kind: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    import datasets

    def load_dataset(*args: Any, **options: Any) -> Any:
        raise (getattr(datasets.exceptions, kind, None) or getattr(builtins, kind))(text)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = fault(REPO)
    assert said.startswith(f"{REPO}: ")
    assert message in said


def test_a_path_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write(tmp_path / REPO, "text")
    assert read(REPO) == ["text"]
    for name in ("owner/missing.jsonl", "./owner/missing", "a/b/c", "missing", "/owner/missing", "../o/m"):
        assert fault(name).startswith(f"{Path(name)}: cannot be read ("), name


# Laziness and order


def test_no_more_is_read_than_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\nno JSON')
    assert list(itertools.islice(read_documents(file), 2)) == ["a", "b"]
    monkeypatch.setattr(tables, "BATCH_ROWS", 10)
    table = write_parquet(tmp_path / "a.parquet", ["a"] * 30 + ["\n"], row_group_size=10)
    reading = Reading()
    assert list(itertools.islice(read_documents(table, reading=reading), 30)) == ["a"] * 30
    assert reading.empty == 0
    write(tmp_path / "b.json", "no JSON")
    assert next(read_documents(tmp_path)) == "a"


def test_shuffled_is_the_same_documents_by_the_seed() -> None:
    documents = [str(i) for i in range(500)]
    for buffer in (1, 7, 499, 500, 10_000):
        found = list(shuffled(documents, 0, buffer))
        assert sorted(found) == sorted(documents)
        assert found == list(shuffled(iter(documents), 0, buffer))
        assert (found == documents) == (buffer == 1)
    assert list(shuffled(documents, 1)) != list(shuffled(documents, 0))
    assert list(shuffled([], 0)) == []


def test_shuffled_holds_no_more_than_its_buffer() -> None:
    taken = []

    def documents() -> Iterator[str]:
        for i in itertools.count():
            taken.append(i)
            yield str(i)

    assert len(set(itertools.islice(shuffled(documents(), 0, 20), 30))) == 30
    assert len(taken) == 50
