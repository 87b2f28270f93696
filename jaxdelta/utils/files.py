"""Output files and directories that appear whole or not at all."""

import contextlib
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxdelta.errors import JaxDeltaError, UsageError, plain_errors

_POINTER = b"version https://git-lfs.github.com/spec/"
_UNWRITABLE = {OSError: "{}: cannot be written ({})"}


def check_whole(path: Path) -> None:
    """Fails if a file is only a stand-in for its content.

    Raises:
        JaxDeltaError: a git-lfs pointer, a link to a file that is gone, or no regular file.
    """
    if not os.path.exists(path) and os.path.islink(path):
        raise JaxDeltaError(
            f"{path}: is a link to a file that is gone ({os.readlink(path)}); fetch the model again "
            "(`hf download`)"
        )
    if not os.path.isfile(path):
        raise JaxDeltaError(f"{path}: is not a regular file")
    with plain_errors(path, {OSError: "{}: cannot be read ({})"}), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise JaxDeltaError(
                f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in its directory"
            )


def json_path(path: str | Path) -> Path:
    """A path that ends in .json, else a UsageError."""
    path = Path(path)
    if path.suffix != ".json":
        raise UsageError(f"out: {path} must end in .json")
    return path


def check_output(path: Path, *endings: str) -> None:
    """Fails now, before any work, if a run's files cannot be written later.

    Args:
        path: the JSON; the .safetensors has its name.
        endings: those of further files of that name.

    Raises:
        UsageError: the name does not end in .json.
        JaxDeltaError: the directory is missing or not writable.
    """
    path = json_path(path)
    check_writable(path, *map(path.with_suffix, (".safetensors", *endings)))


def check_writable(*paths: Path) -> None:
    """Fails now, before any work, if files of one directory cannot be written later.

    Raises:
        JaxDeltaError: the directory is missing or not writable, or a name is a directory's.
    """
    probe = _temporary(max(paths, key=lambda path: len(path.name)))
    with plain_errors(paths[0], _UNWRITABLE):
        _check_parent(probe)
        _refuse_directories(paths)
        try:
            probe.touch()
        finally:
            _remove([probe])


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes all files under temporary names next to them, then renames them, the last one last.

    Raises:
        JaxDeltaError: a file cannot be written; none has changed then.
    """
    temporary = {path: _temporary(path) for path in contents}
    _refuse_directories(contents)
    with contextlib.ExitStack() as locks:
        try:
            for path, data in contents.items():
                with plain_errors(path, _UNWRITABLE), open(temporary[path], "wb") as file:
                    locks.enter_context(locked(temporary[path]))
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for path in contents:
                with plain_errors(path, _UNWRITABLE):
                    os.replace(temporary[path], path)
        finally:
            _remove(temporary.values())
    for path in contents:
        _remove_abandoned(path)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, under a temporary name next to `path`; it is renamed to `path` at the end.

    Raises:
        JaxDeltaError: `path` exists and is no empty directory, or its contents cannot be written.
    """
    path = path.absolute()
    check_new(path)
    temporary = _temporary(path)
    with plain_errors(path, _UNWRITABLE):
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
        JaxDeltaError: it exists and is no empty directory, or its parent is missing.
    """
    path = path.absolute()
    with plain_errors(path, _UNWRITABLE):
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise JaxDeltaError(f"{path}: is there already; remove it, or choose another name")
        _check_parent(path)


def link_or_copy(file: Path, name: Path) -> None:
    """Gives a file a second name; copies it where the file system has no links, or it is on another one."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Locks a file or a directory until the end of the block, or of the process.

    Yields False where another process holds it, or the file system has no locks.

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
    """Worker threads may recreate the directory for a few seconds after a failure."""
    absent = 0
    for _ in range(200):
        absent = 0 if directory.exists() else absent + 1
        if absent == 4:
            return
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.05)


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise JaxDeltaError(f"{path.parent}: no such directory; create it first")


def _refuse_directories(paths: Iterable[Path]) -> None:
    """A rename onto a directory would fail after other files had been renamed."""
    for path in paths:
        if path.is_dir():
            raise JaxDeltaError(f"{path}: is a directory")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary files of killed processes: no process holds them."""
    for abandoned in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), locked(abandoned) as ours:
            if ours:
                abandoned.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
