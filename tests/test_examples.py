"""The notebooks run from end to end, and what they show was made by them."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MACHINE = re.compile(r"/(home|root|tmp|work|usr|opt|Users)/")


def kinds(cell: Any) -> list[str]:
    """What a cell shows: the kinds of its outputs."""
    return [kind for output in cell.get("outputs", []) for kind in sorted(output.get("data", {"text": ""}))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What makes the tests' two devices is not a reader's.
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    stored = nbformat.read(path, as_version=4)
    run = copy.deepcopy(stored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's own, here; the kernel is another process.
        from nbclient import NotebookClient

        NotebookClient(run, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for old, new in zip(stored.cells, run.cells, strict=True):
        assert kinds(old) == kinds(new), f"{old.id}: store the notebook anew, see BUILD.md"
        assert not any(output.get("name") == "stderr" for output in new.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_small_and_of_no_machine(path: Path) -> None:
    assert path.stat().st_size < 1e6
    assert not MACHINE.search(path.read_text(encoding="utf-8"))
