"""scripts/delta_svd.py as a function, for processes that are forked when all is imported."""

import os
import runpy
import sys
from pathlib import Path

from orbax.checkpoint import v1  # noqa: F401

import jaxdelta.report.write
import jaxdelta.run.analyze  # noqa: F401
from jaxdelta.spectra import scheduler

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "delta_svd.py"


def delta_svd(flags: list[str], log: Path, in_batches: bool) -> None:
    """Runs the script, its layers in batches as on an accelerator or not; what it prints goes to `log`."""
    scheduler.in_batches = lambda: in_batches
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(SCRIPT), *flags]
    runpy.run_path(str(SCRIPT), run_name="__main__")
