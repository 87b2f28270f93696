"""Reading ahead, and what that leaves in the system's page cache.

A run that waits for its weights is glad to find them in the cache the next time. Where it does not wait, the
disk is as good as the cache, and filling the cache takes the time of the cores that compute: on a virtual
machine, whose free memory its host must find again, ten times that of reading.
"""

import errno
import os
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_DONTCACHE = 0x80  # RWF_DONTCACHE in linux/fs.h, since Linux 6.14: what the cache lacked it does not keep
_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL)  # to older ones, and to file systems without it


class _Reader(threading.local):
    waited_for = True


_reader = _Reader()


def read_ahead(read: Callable[[int], T], count: int, start: int = 0) -> Generator[T, None, None]:
    """read(start), ..., read(count - 1), each read on another thread while the one before is in use.

    After one that was there before it was asked for, the next leaves nothing in the page cache.
    """

    def read_next(index: int, waited_for: bool) -> T:
        _reader.waited_for = waited_for
        return read(index)

    with ThreadPoolExecutor(1, "read-ahead") as pool:
        upcoming = [pool.submit(read_next, start, True)]
        for index in range(start + 1, count + 1):
            waited_for = not upcoming[0].done()
            # Handed over without a reference left here, which would keep it in memory.
            item = [upcoming.pop().result()]
            if index < count:
                upcoming.append(pool.submit(read_next, index, waited_for))
            yield item.pop()


def read_into(handle: int, view: memoryview, offset: int) -> None:
    """Fills `view` with an open file's bytes from `offset` on.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    done = 0
    while done < len(view):
        count = _read(handle, view[done:], offset + done)
        if count == 0:
            raise OSError(0, "the file has become shorter")
        done += count


def _read(handle: int, view: memoryview, offset: int) -> int:
    if sys.platform == "linux" and not _reader.waited_for:
        try:
            return os.preadv(handle, [view], offset, _DONTCACHE)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
    return os.preadv(handle, [view], offset)
