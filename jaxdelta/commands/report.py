"""Makes the page of a saved run, and its figures, without computing it again.

    jaxdelta-report --run=demo.json --figures=figures

Takes two seconds without figures. Writes demo.html next to the run.
"""

from jaxdelta.commands import _flags
from jaxdelta.report import write
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.result import whole
from jaxdelta.utils import cli
from jaxdelta.utils.command import Command
from jaxdelta.utils.files import write_together


def main() -> None:
    """The command `jaxdelta-report`; also scripts/report.py."""
    cli.run_command(COMMAND)


def act() -> None:
    """Loads the run, and writes the page and the figures: either all of them or none."""
    run, figures = _flags.required_path("run"), _flags.path("figures")
    if figures:
        write.check_figures(figures)
    page = run.with_suffix(write.PAGE)
    with whole(run):
        files = write.shown(Analysis.load(run), page, figures)
    with write.directory_for(figures):
        write_together(files)
    print("Saved: " + ", ".join(map(str, filter(None, (page, figures)))))


COMMAND = Command(
    action=act,
    about=__doc__ or "",
    options={"Run": _flags.define_run, "Output": _flags.define_figures},
    required={"run": _flags.RUN},
)
