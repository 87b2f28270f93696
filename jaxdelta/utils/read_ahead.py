"""Reading the next item while the last one is in use, and reading bytes into a buffer."""

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(read: Callable[[int], T], count: int, start: int = 0) -> Generator[T, None, None]:
    """read(start), ..., read(count - 1), each read on another thread while the previous one is in use."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        upcoming = [pool.submit(read, start)]
        for index in range(start + 1, count + 1):
            item = [upcoming.pop().result()]  # A reference left here would keep a used item in memory.
            if index < count:
                upcoming.append(pool.submit(read, index))
            yield item.pop()


def read_into(handle: int, view: memoryview, offset: int) -> None:
    """Fills `view` with an open file's bytes from `offset` on.

    Raises:
        OSError: the file cannot be read, or ends too early.
    """
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            raise OSError(0, "the file has become shorter")
        done += count
