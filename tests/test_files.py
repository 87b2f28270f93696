"""Output files appear whole or not at all, and leave no temporary ones."""

import errno
import os
from pathlib import Path

import pytest

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.utils.files import check_output, locked, write_together


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_writes_all(tmp_path: Path) -> None:
    contents = {tmp_path / "a.bin": b"\x00\xff", tmp_path / "a.json": b"{}"}
    write_together(contents)
    assert {path: path.read_bytes() for path in contents} == contents
    assert names(tmp_path) == ["a.bin", "a.json"]


def test_overwrites(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"a much longer content from before")
    write_together({tmp_path / "a.json": b"{}"})
    assert (tmp_path / "a.json").read_bytes() == b"{}"


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    (tmp_path / "a.json").write_bytes(b"before")

    def fail(*args: object) -> None:
        raise error

    if failing == "write":
        opened = open

        def open_full(path: Path, mode: str) -> object:
            file = opened(path, mode, buffering=0)
            if path.name.startswith(".b"):
                file.close()
                fail()
            return file

        monkeypatch.setattr("builtins.open", open_full)
    else:
        monkeypatch.setattr(os, failing, fail)
    wanted = JaxDeltaError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted) as raised:
        write_together({tmp_path / "a.json": b"after", tmp_path / "b.bin": b"after"})
    monkeypatch.undo()
    if wanted is JaxDeltaError:
        assert "cannot be written (No space left on device)" in str(raised.value)
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"before"


def test_a_directory_in_the_way_of_one_keeps_both_away(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(JaxDeltaError, match=r"a\.json: is a directory"):
        write_together({tmp_path / "a.bin": b"1", tmp_path / "a.json": b"2"})
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_unwritable(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxDeltaError, match="cannot be written"):
        write_together({tmp_path / parent / "a.json": b"{}"})
    with pytest.raises(JaxDeltaError, match="no such directory"):
        check_output(tmp_path / parent / "a.json")
    assert names(tmp_path) == ["file"]


def test_check_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("before")
    check_output(tmp_path / "a.json")
    check_output(tmp_path / "b.json")
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json.gz", ".json", "a.JSON"])
def test_check_of_the_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"out: .* must end in \.json"):
        check_output(tmp_path / name)


def test_check_finds_what_would_fail_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.safetensors").mkdir()
    for name, message in {
        "a.json": "a.json: is a directory",
        "b.json": "b.safetensors: is a directory",
        "c" * 240 + ".json": "cannot be written",  # its .safetensors has too long a name
        "c" * 300 + ".json": "cannot be written",
        "d" * 300 + "/a.json": "cannot be written",
    }.items():
        with pytest.raises(JaxDeltaError, match=message):
            check_output(tmp_path / name)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # To root everything is permitted.
    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(JaxDeltaError, match=r"cannot be written \(Permission denied\)"):
        check_output(tmp_path / "e.json")
    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(JaxDeltaError, match=r"cannot be written \(Permission denied\)"):
        check_output(tmp_path / "e.json")
    monkeypatch.undo()
    assert names(tmp_path) == ["a.json", "b.safetensors"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """But not what a living one is writing, nor what only looks like it."""
    left, living, other = (tmp_path / f".{name}.tmp" for name in ("a.json.7", "a.json.8", "b.json.7"))
    for path in (left, living, other):
        path.touch()
    with locked(living):
        write_together({tmp_path / "a.json": b"{}"})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", living.name, other.name}
