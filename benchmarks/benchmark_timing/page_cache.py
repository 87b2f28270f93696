"""Reads files into the system's page cache, or drops them from it."""

import os
from collections.abc import Sequence
from pathlib import Path


def read_all(files: Sequence[Path]) -> None:
    """Reads the files from beginning to end into one buffer."""
    buffer = bytearray(64 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(files: Sequence[Path]) -> None:
    """Drops the files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
