"""Draws a saved run: norms, ranks and energy by layer, and |cos| between all
layers.

    jaxdelta-plot --run=demo.json --out=demo.png

Takes two seconds. The suffix chooses the format: .png, .pdf or .svg.
"""

from absl import flags

from jaxdelta.commands import _flags
from jaxdelta.errors import JaxDeltaError, UsageError, extra
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.result import whole
from jaxdelta.utils import cli
from jaxdelta.utils.command import Command

FORMATS = (".png", ".pdf", ".svg")


def main() -> None:
    """The command `jaxdelta-plot`; also scripts/plot_run.py."""
    cli.run_command(COMMAND)


def act() -> None:
    """Loads the run and draws it."""
    out = _flags.required_path("out")
    if out.suffix not in FORMATS:
        raise UsageError(f"out: {out} must end in one of {', '.join(FORMATS)}")
    with extra("figures", "a picture"):
        from jaxdelta.report.charts.with_matplotlib import overview
    with whole(flags.FLAGS.run):
        figure = overview(Analysis.load(flags.FLAGS.run))
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise JaxDeltaError(f"{out}: cannot be written ({error.strerror})") from error
    print(f"Saved: {out}")


def define_output() -> None:
    """Defines --out."""
    flags.DEFINE_string("out", None, "picture to write: .png, .pdf or .svg")


COMMAND = Command(
    action=act,
    about=__doc__ or "",
    options={"Run": _flags.define_run, "Output": define_output},
    required={"run": _flags.RUN, "out": "the picture to write, e.g. --out=demo.png"},
)
