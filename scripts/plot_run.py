"""Draws a run: norms, ranks and energy by layer, and |cos| between all layers.

    python scripts/plot_run.py --run=out/demo.json --out=out/demo.png

Takes two seconds. The name's ending chooses the format: png, pdf, svg.
"""

from jaxdelta.utils import cli

cli.install()

from pathlib import Path

from absl import flags

from jaxdelta.errors import JaxDeltaError, UsageError, extra
from jaxdelta.report.analysis import Analysis

_RUN = flags.DEFINE_string("run", None, "the JSON that delta_svd.py wrote")
_OUT = flags.DEFINE_string("out", None, "the picture: .png, .pdf or .svg")
FORMATS = (".png", ".pdf", ".svg")


def main() -> None:
    """Loads the run and draws it."""
    out = Path(cli.value_of(_OUT)).expanduser()
    if out.suffix not in FORMATS:
        raise UsageError(f"out: {out} must end in one of {', '.join(FORMATS)}")
    with extra("figures", "a picture"):
        from jaxdelta.report.charts.with_matplotlib import overview
    figure = overview(Analysis.load(cli.value_of(_RUN)))
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise JaxDeltaError(f"{out}: cannot be written ({error.strerror})") from error
    print(f"Saved: {out}")


if __name__ == "__main__":
    cli.run(main, required=["run", "out"])
