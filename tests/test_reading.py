"""Reading ahead, and reading bytes into a buffer."""

import threading
from pathlib import Path

import numpy as np
import pytest

from jaxdelta.utils.read_ahead import read_ahead, read_into

CONTENT = np.random.default_rng(0).bytes(40_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return path


def part(file: Path, index: int) -> bytes:
    """The index-th ten thousand bytes."""
    buffer = bytearray(10_000)
    with open(file, "rb") as opened:
        read_into(opened.fileno(), memoryview(buffer), 10_000 * index)
    return bytes(buffer)


def test_the_next_item_is_read_while_one_is_in_use(file: Path) -> None:
    read = [threading.Event() for _ in range(4)]

    def recorded(index: int) -> bytes:
        content = part(file, index)
        read[index].set()
        return content

    contents = []
    for index, content in enumerate(read_ahead(recorded, 4)):
        contents.append(content)
        assert index == 3 or read[index + 1].wait(10)
        assert index >= 2 or not read[index + 2].is_set()
    assert b"".join(contents) == CONTENT


def test_a_later_start(file: Path) -> None:
    assert b"".join(read_ahead(lambda index: part(file, index), 4, start=2)) == CONTENT[20_000:]


def test_a_file_that_ends_before(file: Path) -> None:
    with pytest.raises(OSError, match="has become shorter"):
        part(file, 4)
