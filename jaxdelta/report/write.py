"""The files that show a run: the page, and every figure as a picture."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from jaxdelta.errors import JaxDeltaError, extra
from jaxdelta.report.result import PAGE as PAGE
from jaxdelta.report.result import Result


def check_figures(directory: Path) -> None:
    """Checks before any work that figures can be drawn and written.

    Raises:
        JaxDeltaError: matplotlib or the directory's parent is missing, or `directory` is a file.
    """
    with extra("figures", "a figure"):
        if importlib.util.find_spec("matplotlib") is None:  # importing it would take a second
            raise ModuleNotFoundError(name="matplotlib")
    if directory.exists() and not directory.is_dir():
        raise JaxDeltaError(f"{directory}: is not a directory")
    if not directory.absolute().parent.is_dir():
        raise JaxDeltaError(f"{directory.parent}: no such directory; create it first")


def shown(analysis: Result, page: Path | None, figures: Path | None) -> dict[Path, bytes]:
    """The content of the page and of the pictures in the directory `figures`; None leaves either out."""
    files: dict[Path, bytes] = {}
    if page:
        from jaxdelta.report.page import page_file

        files[page] = page_file(analysis)
    if figures:
        from jaxdelta.report.charts.with_matplotlib import pictures

        files |= pictures(analysis, figures)
    return files


@contextlib.contextmanager
def directory_for(figures: Path | None) -> Iterator[None]:
    """Makes the figures' directory, and removes it again if the block fails.

    Raises:
        JaxDeltaError: the directory cannot be made.
    """
    if figures is None or figures.exists():
        yield
        return
    try:
        figures.mkdir()
    except OSError as error:
        raise JaxDeltaError(f"{figures}: cannot be made ({error.strerror})") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            figures.rmdir()
        raise
