"""Reading ahead, and which reads leave nothing in the system's page cache."""

import errno
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxdelta.utils import read_ahead as reading
from jaxdelta.utils.read_ahead import read_ahead, read_into

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux knows reads past the cache")
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


def refusing(monkeypatch: pytest.MonkeyPatch, error: int | None) -> list[int]:
    """Makes reads past the cache fail, or, without an error, succeed anywhere; lists the flags of all."""
    preadv, flags = os.preadv, list[int]()

    def recorded(handle: int, buffers: list[memoryview], offset: int, flag: int = 0) -> int:
        flags.append(flag)
        if flag and error:
            raise OSError(error, os.strerror(error))
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(reading.os, "preadv", recorded)
    return flags


def test_only_what_is_waited_for_stays_in_the_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, second_read = refusing(monkeypatch, None), threading.Event()

    def slow_and_fast(index: int) -> bytes:
        if index in (0, 2):
            time.sleep(0.2)
        found = part(file, index)
        if index == 1:
            second_read.set()
        return found

    found = []
    for index, data in enumerate(read_ahead(slow_and_fast, 4)):
        found.append(data)
        if index == 0:  # the second is there before it is asked for, the first and the third are not
            second_read.wait()
            time.sleep(0.2)
    assert b"".join(found) == CONTENT
    assert flags == [0, 0, reading._DONTCACHE, 0]


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_systems_without_reads_past_the_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    flags = refusing(monkeypatch, error)
    monkeypatch.setattr(reading._reader, "waited_for", False)
    assert part(file, 1) == CONTENT[10_000:20_000]
    assert flags == [reading._DONTCACHE, 0]


def test_other_errors_are_not_hidden(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, errno.EIO)
    monkeypatch.setattr(reading._reader, "waited_for", False)
    with pytest.raises(OSError, match="Input/output error"):
        part(file, 1)


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_file_that_ends_before(file: Path, monkeypatch: pytest.MonkeyPatch, waited_for: bool) -> None:
    monkeypatch.setattr(reading._reader, "waited_for", waited_for)
    with pytest.raises(OSError, match="has become shorter"):
        part(file, 4)
