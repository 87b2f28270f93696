"""Sets saved runs beside each other by relative depth: sizes, base and instruct, two texts, a control.

    python scripts/compare_runs.py out/base.json out/instruct.json --out=out/both.html

Takes three seconds and needs no model. Prints tables; with --out it also writes one page, with charts.
"""

from jaxdelta.utils import cli

cli.install()

from pathlib import Path

from absl import flags

from jaxdelta.errors import UsageError
from jaxdelta.utils.files import check_writable, write_together

_OUT = flags.DEFINE_string("out", None, "the page to write: .html (default: none, the tables only)")
_LABELS = flags.DEFINE_list(
    "labels",
    None,
    "the runs' names, separated by commas (default: the models', or the files' where those are the same)",
)
_BANDS = flags.DEFINE_integer(
    "bands", None, "bands of depth (default: ten, or the layers of the shallowest run)"
)
_QUIET = flags.DEFINE_bool("quiet", False, "no tables, only the page")


def main(*names: str) -> None:
    """Reads the runs, writes the page if one is wanted, and prints the tables."""
    paths = [Path(name).expanduser() for name in names]
    out = None if _OUT.value is None else Path(_OUT.value).expanduser()
    check(paths, out)
    # Only now: it takes a second to import, for which a wrong name need not wait.
    from jaxdelta.report.compare import compare
    from jaxdelta.report.compare import page as compare_page
    from jaxdelta.report.compare import tables as compare_table

    runs = [compare.load(path) for path in paths]
    labels = _LABELS.value or compare.labels_of(runs, paths)
    found = compare.compare(runs, labels, _BANDS.value)
    if out:
        write_together({out: compare_page.page_file(found)})
    if not _QUIET.value:
        print(compare_table.tables(found) + (f"\n\nSaved: {out}" if out else ""))


def check(paths: list[Path], out: Path | None) -> None:
    """Fails before any work."""
    if len(paths) < 2:
        raise UsageError("name two runs or more, as in compare_runs.py A.json B.json")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a run is named twice; there is nothing to compare it with but itself")
    if out is None and _QUIET.value:
        raise UsageError("quiet: without --out nothing would come of it")
    if out:
        if out.suffix != ".html":
            raise UsageError(f"out: {out} must end in .html")
        check_writable(out)


if __name__ == "__main__":
    cli.run(main, arguments=True)
