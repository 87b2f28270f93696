"""Pools runs over several texts of one model, from the moments that they kept.

    jaxdelta --model=demo --calibration=a.txt --keep_moments=a --out=a.json
    jaxdelta --model=demo --calibration=b.txt --keep_moments=b --out=b.json
    jaxdelta-merge --runs=a,b --out=both.json

The numbers are those of one run over both texts; the model is not needed.
"""

from absl import flags

from jaxdelta.commands import _flags
from jaxdelta.report import write
from jaxdelta.report.tables import tables
from jaxdelta.run.merge import merge_runs
from jaxdelta.utils import cli, files
from jaxdelta.utils.command import Command


def main() -> None:
    """The command `jaxdelta-merge`; also scripts/merge_runs.py."""
    cli.run_command(COMMAND)


def act() -> None:
    """Adds up the moments of the runs, writes the files of one run, and prints its tables."""
    out = _flags.required_path("out")
    files.check_output(out, write.PAGE)
    result = merge_runs(flags.FLAGS.runs)
    written = result.save(out, write.shown(result, out.with_suffix(write.PAGE), None))
    print(tables(result))
    print("\nSaved: " + ", ".join(map(str, written)))


def define_runs() -> None:
    """Defines --runs."""
    flags.DEFINE_list("runs", None, "directories that --keep_moments wrote, separated by commas")


COMMAND = Command(
    action=act,
    about=__doc__ or "",
    options={"Runs": define_runs, "Output": _flags.define_out_json},
    required={
        "runs": "the directories that --keep_moments wrote, e.g. --runs=a,b",
        "out": _flags.OUT_JSON,
    },
)
