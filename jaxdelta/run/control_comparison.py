"""Comparison of a run with a control's run."""

import dataclasses
from typing import Any

from jaxdelta.errors import JaxDeltaError
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.result import whole
from jaxdelta.run.alike import differences, traits
from jaxdelta.run.context import RunContext
from jaxdelta.statistics.per_layer.registry import shown
from jaxdelta.utils.files import GivenPath

TABLE = ("eff_rank", "top1_frac", "rel_step_mean")  # shown on the terminal


def load_control(path: GivenPath) -> Analysis:
    """Reads a control's run.

    Raises:
        JaxDeltaError: a file is missing or damaged, or it holds a run without --control.
    """
    control = Analysis.load(path)
    with whole(path):
        try:
            _record(control, None)
            traits(control)
        except JaxDeltaError as error:
            raise JaxDeltaError(f"{path}: {error}") from error
    return control


def check_control(control: Analysis, run: Analysis | RunContext) -> None:
    """Fails before any work if the control does not match the run; for `analyze(before=)`.

    Raises:
        JaxDeltaError: text, weights, sizes, phases or options differ; the message names all differences.
    """
    if different := differences(traits(control), traits(run)):
        raise JaxDeltaError(f"compare_control: the control is of another run: {different}")


def compare_control(analysis: Analysis, control: Analysis, file: str | None = None) -> Analysis:
    """The analysis with a control's statistics in its field `control`; `file` is recorded as their origin.

    Raises:
        JaxDeltaError: `control` is no control's run, or does not match the analysis.
    """
    check_control(control, analysis)
    return dataclasses.replace(analysis, control=_record(control, file))


def _record(control: Analysis, file: str | None) -> dict[str, Any]:
    flags = control.run["flags"]
    if not flags.get("control"):
        raise JaxDeltaError("is not a control's run; make one with --control")
    return {
        "name": flags["control"],
        "seed": flags["seed"],
        "file": file,
        "calibration_loss": control.run["calibration_loss"],
        "per_layer": [_statistics(row) for row in control.per_layer],
        "top1_cos_adjacent": control.top1_cos_adjacent,
        "phase_overlap": control.phase_overlap,
    }


def _statistics(row: dict[str, Any]) -> dict[str, Any]:
    """The statistics of a control that tables and charts show; older files lack some."""
    names = (statistic.name for statistic in shown("norms", "ranks") if statistic.name in row)
    return {key: row[key] for key in ("L", *TABLE)} | {name: row[name] for name in names}
