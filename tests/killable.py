"""scripts/delta_svd.py as a function, for processes that are forked when all is imported."""

import os
import runpy
import sys
from pathlib import Path

from orbax.checkpoint import v1  # noqa: F401

import jaxdelta.report.write
import jaxdelta.run.analyze  # noqa: F401

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "delta_svd.py"


def delta_svd(flags: list[str], log: Path) -> None:
    """Runs the script; what it prints goes to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(SCRIPT), *flags]
    runpy.run_path(str(SCRIPT), run_name="__main__")
