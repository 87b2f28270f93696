"""Draws a run: norms, ranks and energy by layer, and |cos| between all layers.

    python scripts/plot_run.py --run=out/demo.json --out=out/demo.png

Takes two seconds. The name's ending chooses the format: png, pdf, svg.
"""

from jaxdelta import console

console.install()

from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402

from jaxdelta.errors import JaxDeltaError, UsageError, extra  # noqa: E402
from jaxdelta.result import Analysis  # noqa: E402

_RUN = flags.DEFINE_string("run", None, "the JSON that delta_svd.py wrote")
_OUT = flags.DEFINE_string("out", None, "the picture: .png, .pdf or .svg")
FORMATS = (".png", ".pdf", ".svg")


def main() -> None:
    """Loads the run and draws it."""
    out = Path(console.value_of(_OUT)).expanduser()
    if out.suffix not in FORMATS:
        raise UsageError(f"out: {out} must end in one of {', '.join(FORMATS)}")
    with extra("figures", "a picture"):
        from jaxdelta.report.figures import overview
    figure = overview(Analysis.load(console.value_of(_RUN)))
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise JaxDeltaError(f"{out}: cannot be written ({error.strerror})") from error
    print(f"Saved: {out}")


if __name__ == "__main__":
    console.run(main, required=["run", "out"])
