"""Output files that appear whole or not at all."""

import contextlib
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxdelta.errors import JaxDeltaError, UsageError


def json_path(path: str | Path) -> Path:
    """A path that ends in .json.

    Raises:
        UsageError: it does not.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise UsageError(f"out: {path} must end in .json")
    return path


def check_output(path: Path, *beside: str) -> None:
    """Fails now, before any work, if `path` cannot be written later, or a file beside it.

    Args:
        path: the JSON; .safetensors is written beside it.
        beside: other endings of files that will be.

    Raises:
        UsageError: the name does not end in .json.
        JaxDeltaError: the directory is missing or not writable.
    """
    path = json_path(path)
    check_writable(path, *map(path.with_suffix, (".safetensors", *beside)))


def check_writable(path: Path, *beside: Path) -> None:
    """Fails now, before any work, if `path` cannot be written later, or one of the others in its directory.

    Raises:
        JaxDeltaError: the directory is missing or not writable, or a name is a directory's.
    """
    probe = _temporary(max((path, *beside), key=lambda one: len(one.name)))
    with _plain_errors(path):
        if not path.parent.is_dir():
            raise JaxDeltaError(f"{path.parent}: no such directory; create it first")
        _refuse_directories([path, *beside])
        try:
            probe.touch()
        finally:
            _remove([probe])


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes all files under temporary names beside them, then renames them, the last one last.

    Raises:
        JaxDeltaError: a file cannot be written; none has been changed then.
    """
    temporary = {path: _temporary(path) for path in contents}
    _refuse_directories(contents)
    with contextlib.ExitStack() as held:
        try:
            for path, data in contents.items():
                with _plain_errors(path), open(temporary[path], "wb") as file:
                    held.enter_context(locked(temporary[path]))
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for path in contents:
                with _plain_errors(path):
                    os.replace(temporary[path], path)
        finally:
            _remove(temporary.values())
    for path in contents:
        _remove_left(path)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to be filled, under a temporary name beside `path`, which it takes when all went well.

    Raises:
        JaxDeltaError: `path` is there and not an empty directory, or it or what is in it cannot be written.
    """
    path = path.absolute()
    check_new(path)
    with _plain_errors(path):
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            _remove_while_written(temporary)
            raise


def check_new(path: Path) -> None:
    """Fails now, before any work, if `path` cannot become a directory later.

    Raises:
        JaxDeltaError: it is there and not an empty directory, or there is nothing that it could be in.
    """
    path = path.absolute()
    with _plain_errors(path):
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise JaxDeltaError(f"{path}: is there already; remove it, or choose another name")
        if not path.parent.is_dir():
            raise JaxDeltaError(f"{path.parent}: no such directory; create it first")


def link_or_copy(file: Path, name: Path) -> None:
    """The file under another name, too; a copy where that is on another file system, or it knows no links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds a file or a directory; False where another process does, or the file system knows no locks.

    The system ends it with the process, however that ends.

    Raises:
        OSError: it cannot be opened.
    """
    handle, ours = os.open(path, os.O_RDONLY), False
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        yield ours
    finally:
        os.close(handle)


def _remove_while_written(directory: Path) -> None:
    """Threads that have not heard of the failure may make it anew, for up to some seconds."""
    absent = 0
    for _ in range(200):
        absent = 0 if directory.exists() else absent + 1
        if absent == 4:
            return
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.05)


def _refuse_directories(paths: Iterable[Path]) -> None:
    """A rename onto a directory fails, and then the files renamed before it would be there without it."""
    for path in paths:
        if path.is_dir():
            raise JaxDeltaError(f"{path}: is a directory")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_left(path: Path) -> None:
    """What processes that were killed left of a file: nobody holds it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), locked(left) as ours:
            if ours:
                left.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JaxDeltaError(f"{path}: cannot be written ({error.strerror})") from error
