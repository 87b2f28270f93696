"""Makes the page of a saved run, and its figures, without computing anything again.

    python scripts/report.py --run=out/demo.json --figures=out/figures

Takes two seconds without figures. Writes out/demo.html beside the run.
"""

from jaxdelta import console

console.install()

from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402

from jaxdelta.files import write_together  # noqa: E402
from jaxdelta.report import output  # noqa: E402
from jaxdelta.result import Analysis  # noqa: E402

_RUN = flags.DEFINE_string("run", None, "the JSON that delta_svd.py wrote")
_FIGURES = flags.DEFINE_string("figures", None, "a directory for every figure as PNG and PDF, with captions")


def main() -> None:
    """Loads the run, and writes the page and the figures: all of them, or none."""
    run = Path(console.value_of(_RUN)).expanduser()
    figures = None if _FIGURES.value is None else Path(_FIGURES.value).expanduser()
    if figures:
        output.check_figures(figures)
    page = run.with_suffix(output.PAGE)
    files = output.shown(Analysis.load(run), page, figures)
    with output.directory_for(figures):
        write_together(files)
    print("Saved: " + ", ".join(map(str, filter(None, (page, figures)))))


if __name__ == "__main__":
    console.run(main, required=["run"])
