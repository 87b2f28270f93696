"""The comparison of two runs finds what differs, and nothing else."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from same_statistics import differences, main

REPORT: dict[str, Any] = {
    "model": "demo",
    "run": {"seconds": 3.0},
    "per_layer": [{"frob": 200.0, "phase": "A", "intervals": {"frob": [190.0, 0.5]}}, {"frob": None}],
}


def found(change: Any) -> float:
    report = copy.deepcopy(REPORT)
    change(report)
    return max(difference for difference, _ in differences(REPORT, report))


def test_a_difference_is_relative_to_the_larger_of_the_number_and_one() -> None:
    assert found(lambda report: report["per_layer"][0].update(frob=200.2)) == pytest.approx(1e-3)
    assert found(
        lambda report: report["per_layer"][0].update(intervals={"frob": [190.0, 0.6]})
    ) == pytest.approx(1e-2)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.update(model="other"),
        lambda report: report["per_layer"].pop(),
        lambda report: report["per_layer"][0].pop("phase"),
        lambda report: report["per_layer"][1].update(frob=1.0),
        lambda report: report["per_layer"][0].update(frob=math.nan),
        lambda report: report.update(more=1),
    ],
)
def test_what_is_no_number_has_to_be_the_same(change: Any) -> None:
    assert math.isinf(found(change))


def test_how_a_run_was_made_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(REPORT))
    second.write_text(json.dumps(REPORT | {"run": {"seconds": 4.0}}))
    assert main([str(first), str(second), "--tolerance=0"]) == 0
    second.write_text(json.dumps(REPORT | {"model": "other"}))
    assert main([str(first), str(second)]) == 1
    assert ".model: inf" in capsys.readouterr().err
