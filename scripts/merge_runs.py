"""Puts runs over several texts of one model together, from the moments that they kept.

    python scripts/delta_svd.py --model=demo --calibration=a.txt --keep_moments=out/a --out=out/a.json
    python scripts/delta_svd.py --model=demo --calibration=b.txt --keep_moments=out/b --out=out/b.json
    python scripts/merge_runs.py --runs=out/a,out/b --out=out/both.json

The figures are those of one run over both texts; the model is not needed.
"""

from jaxdelta.utils import cli

cli.install()

from pathlib import Path

from absl import flags

from jaxdelta.report import write
from jaxdelta.report.tables import tables
from jaxdelta.run.merge import merge_runs
from jaxdelta.utils import files

_RUNS = flags.DEFINE_list("runs", None, "directories that --keep_moments wrote, separated by commas")
_OUT = flags.DEFINE_string("out", None, "the JSON to write; .safetensors and .html are written beside it")


def main() -> None:
    """Adds up the moments of the runs, writes the files of one run, and prints its tables."""
    out = Path(cli.value_of(_OUT)).expanduser()
    files.check_output(out, write.PAGE)
    result = merge_runs([Path(run).expanduser() for run in cli.value_of(_RUNS)])
    written = result.save(out, write.shown(result, out.with_suffix(write.PAGE), None))
    print(tables(result))
    print("\nSaved: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    cli.run(main, required=["runs", "out"])
