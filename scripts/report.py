"""Makes the page of a saved run, and its figures, without computing anything again.

    python scripts/report.py --run=out/demo.json --figures=out/figures

Takes two seconds without figures. Writes out/demo.html beside the run.
"""

from jaxdelta.utils import cli

cli.install()

from pathlib import Path

from absl import flags

from jaxdelta.report import write
from jaxdelta.report.analysis import Analysis
from jaxdelta.utils.files import write_together

_RUN = flags.DEFINE_string("run", None, "the JSON that delta_svd.py wrote")
_FIGURES = flags.DEFINE_string("figures", None, "a directory for every figure as PNG and PDF, with captions")


def main() -> None:
    """Loads the run, and writes the page and the figures: all of them, or none."""
    run = Path(cli.value_of(_RUN)).expanduser()
    figures = None if _FIGURES.value is None else Path(_FIGURES.value).expanduser()
    if figures:
        write.check_figures(figures)
    page = run.with_suffix(write.PAGE)
    files = write.shown(Analysis.load(run), page, figures)
    with write.directory_for(figures):
        write_together(files)
    print("Saved: " + ", ".join(map(str, filter(None, (page, figures)))))


if __name__ == "__main__":
    cli.run(main, required=["run"])
