"""The validation of intervals, tests and nulls on planted truth: all of it runs, and says what fails."""

import re
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from test_reference_scripts import ROOT, load_script, run_script

from jaxdelta.errors import JaxDeltaError
from jaxdelta.statistics.intervals import t_interval

BENCHMARKS = ROOT / "benchmarks"
validation = load_script("validate_statistics", BENCHMARKS)


def test_every_quick_check_passes(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    result = run_script("validate_statistics", "--quick", f"--table={table}", folder=BENCHMARKS)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = table.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + 16 + 2 + 3 + 4 + 4 + 1
    assert all(re.search(r"\| pass +\|$", line) for line in lines[2:])


def test_a_failed_line_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags.FLAGS(["validate_statistics.py"])
    wrong = validation.Check("truth", "found", "nothing", False)
    monkeypatch.setattr(validation, "CHECKS", {"one": lambda quick: [wrong]})
    with pytest.raises(JaxDeltaError, match="1 of 1 lines fail"):
        validation.main()
    assert "FAIL" in capsys.readouterr().out


def test_the_table_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n| old |\n|-----|\n| row |\n\nafter\n", encoding="utf-8")
    validation.write(page, "| new |")
    assert page.read_text(encoding="utf-8") == "before\n\n| new |\n\nafter\n"


def test_a_figure_that_one_document_decides_has_a_wide_interval() -> None:
    """Its spread is known from one number: Student's quantile is that of few degrees of freedom."""
    rng = np.random.default_rng(0)
    even = 10 + rng.normal(size=25)
    uneven = np.full(25, 10.0)
    uneven[0] += even.std() * 25 / np.sqrt(24)  # as much spread as `even` has
    (low, high), (lower, higher) = (t_interval(10.0, values) for values in (even, uneven))
    assert high - low == pytest.approx(2 * 2.064 * even.std() * np.sqrt(24), rel=0.15)
    assert higher - lower > 2 * (high - low)
