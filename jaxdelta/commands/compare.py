"""Compares saved runs by relative depth: sizes, base and instruct, two texts, a
run and its control.

    jaxdelta-compare base.json instruct.json --out=both.html

Takes three seconds and needs no model. Prints tables; with --out it also writes
them with charts as one page.
"""

from pathlib import Path

from absl import flags

from jaxdelta.commands import _flags
from jaxdelta.errors import UsageError
from jaxdelta.utils import cli
from jaxdelta.utils.command import Command
from jaxdelta.utils.files import check_writable, given_path, write_together


def main() -> None:
    """The command `jaxdelta-compare`; also scripts/compare_runs.py."""
    cli.run_command(COMMAND)


def act(*names: str) -> None:
    """Reads the runs, writes the page if asked for, and prints the tables."""
    paths, out = [given_path(name, "run") for name in names], _flags.path("out")
    check(paths, out)
    # Imported after the check, since it takes a second.
    from jaxdelta.report.compare import compare, page, tables

    runs = [compare.load(path) for path in paths]
    labels = flags.FLAGS.labels or compare.labels_of(runs, paths)
    comparison = compare.compare(runs, labels, flags.FLAGS.bands)
    if out:
        write_together({out: page.page_file(comparison)})
    if not flags.FLAGS.quiet:
        print(tables.tables(comparison) + (f"\n\nSaved: {out}" if out else ""))


def check(paths: list[Path], out: Path | None) -> None:
    """Fails before any work."""
    if len(paths) < 2:
        raise UsageError(f"name two runs or more, as in {cli.program_name()} a.json b.json")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a run is named twice; there is nothing to compare it with but itself")
    if out is None and flags.FLAGS.quiet:
        raise UsageError("--quiet without --out would produce no output")
    if out:
        if out.suffix != ".html":
            raise UsageError(f"out: {out} must end in .html")
        check_writable(out)


def define_comparison() -> None:
    """Defines the flags that choose what is compared."""
    flags.DEFINE_list(
        "labels",
        None,
        "names of the runs, separated by commas (default: the models, or the files where those are the same)",
    )
    flags.DEFINE_integer(
        "bands", None, "bands of depth (default: ten, or the number of layers of the shallowest run)"
    )


def define_output() -> None:
    """Defines the flags that choose what is written and printed."""
    flags.DEFINE_string("out", None, "page to write, .html (default: none, only the tables)")
    flags.DEFINE_bool("quiet", False, "no tables, only the page")


COMMAND = Command(
    action=act,
    about=__doc__ or "",
    options={"What is compared": define_comparison, "Output": define_output},
    arguments="RUN.json RUN.json ...",
)
