"""Output files and directories that appear whole or not at all."""

import contextlib
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxdelta.errors import JaxDeltaError, UsageError, plain_errors

# What a caller gives for a path: `given_path` checks it, so that the tests' type checker need not.
if TYPE_CHECKING:
    GivenPath = str | os.PathLike[str]
else:
    GivenPath = object

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


def given_path(path: GivenPath, name: str = "path") -> Path:
    """A path as a user gives it, `~` expanded.

    Raises:
        UsageError: it is no path, naming the argument `name`.
    """
    try:
        text = os.fspath(path)
        if isinstance(text, str) and text and "\0" not in text:
            return Path(os.path.expanduser(text))  # unlike pathlib's, it raises no RuntimeError
    except TypeError:
        pass
    raise UsageError(f"{name} must be a path, not {path!r:.80}")


def json_path(path: GivenPath) -> Path:
    """A path that ends in .json, `~` expanded, else a UsageError."""
    path = given_path(path, "out")
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
    """Fails now, before any work, if files cannot be written later.

    Raises:
        JaxDeltaError: a directory is missing or not writable, or a name is a directory's.
    """
    longest: dict[Path, Path] = {}
    for path in map(_target, paths):
        longest[path.parent] = max(longest.get(path.parent, path), path, key=lambda path: len(path.name))
    for path in longest.values():
        probe = _temporary(path)
        with plain_errors(path, _UNWRITABLE):
            _check_parent(probe)
            _refuse_directories(paths)
            try:
                probe.touch()
            finally:
                _remove([probe])


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes all files under temporary names next to them, then renames them, the last one last.

    A link stays, and the file that it names is replaced.

    Raises:
        JaxDeltaError: a file cannot be written; none has changed then.
    """
    _refuse_directories(contents)
    targets = {path: _target(path) for path in contents}
    if len(set(targets.values())) < len(contents):
        raise JaxDeltaError(f"{', '.join(map(str, contents))}: two of these are links to one file")
    contents = {targets[path]: data for path, data in contents.items()}
    temporary = {path: _temporary(path) for path in contents}
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


def _target(path: Path) -> Path:
    """The file that a link names, which may be missing; or the path itself."""
    if not os.path.islink(path):  # unlike pathlib's, it raises nothing
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise JaxDeltaError(f"{path}: is a link that leads back to itself; remove it")
    return target


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
