"""Puts runs over several texts of one model together, from the moments that they kept.

    python scripts/delta_svd.py --model=demo --calibration=a.txt --keep_moments=out/a --out=out/a.json
    python scripts/delta_svd.py --model=demo --calibration=b.txt --keep_moments=out/b --out=out/b.json
    python scripts/merge_runs.py --runs=out/a,out/b --out=out/both.json

The figures are those of one run over both texts; the model is not needed.
"""

from jaxdelta import console

console.install()

from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402

from jaxdelta import files  # noqa: E402
from jaxdelta.merging import merge_runs  # noqa: E402
from jaxdelta.report import output  # noqa: E402
from jaxdelta.report.tables import tables  # noqa: E402

_RUNS = flags.DEFINE_list("runs", None, "directories that --keep_moments wrote, separated by commas")
_OUT = flags.DEFINE_string("out", None, "the JSON to write; .safetensors and .html are written beside it")


def main() -> None:
    """Adds up the moments of the runs, writes the files of one run, and prints its tables."""
    out = Path(console.value_of(_OUT)).expanduser()
    files.check_output(out, output.PAGE)
    result = merge_runs([Path(run).expanduser() for run in console.value_of(_RUNS)])
    written = result.save(out, output.shown(result, out.with_suffix(output.PAGE), None))
    print(tables(result))
    print("\nSaved: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    console.run(main, required=["runs", "out"])
