"""Output files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxdelta.errors import JaxDeltaError, UsageError


def check_output(path: Path) -> None:
    """Fails now, before any work, if `path` cannot be written later.

    Raises:
        UsageError: the name does not end in .json.
        JaxDeltaError: the directory is missing or not writable.
    """
    if path.suffix != ".json":
        raise UsageError(f"out: {path} must end in .json")
    if not path.parent.is_dir():
        raise JaxDeltaError(f"{path.parent}: no such directory; create it first")
    if path.is_dir():
        raise JaxDeltaError(f"{path}: is a directory")
    probe = _temporary(path)
    with _plain_errors(path.parent):
        probe.touch()
        probe.unlink()


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes all files under temporary names beside them, then renames them, the last one last.

    Raises:
        JaxDeltaError: a file cannot be written; none has been changed then.
    """
    temporary = {path: _temporary(path) for path in contents}
    try:
        for path, data in contents.items():
            with _plain_errors(path), open(temporary[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            with _plain_errors(path):
                os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JaxDeltaError(f"{path}: cannot be written ({error.strerror})") from error
