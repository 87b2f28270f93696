"""A registration is all that a statistic needs: the JSON, charts, comparisons and definitions follow."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from updates import WIDE, K, from_rows, tokens, update

from jaxdelta.report.charts.layers import axis
from jaxdelta.spectra.views import RAW
from jaxdelta.statistics.layer_row import layer_row
from jaxdelta.statistics.per_layer import registry
from jaxdelta.statistics.per_layer.registry import Statistic, registered, shown, statistic
from jaxdelta.text.groups import ResamplingGroups

definitions = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "docs" / "definitions.py")))


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that forgets what the test registers."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture
def third(scratch: None) -> Iterator[Statistic]:
    @statistic("third", needs="spectrum", interval="unit", label="third value", unit="of σ_1", range=(0, 1))
    def third(singular_values: np.ndarray) -> np.ndarray:
        """σ_3/σ_1.

        Of no use.
        """
        return singular_values[..., 2] / singular_values[..., 0]

    yield next(one for one in registered("spectrum") if one.name == "third")


def test_one_registration_is_enough(third: Statistic) -> None:
    sample = ResamplingGroups.of(tokens(WIDE[0]), 20, 0)
    layer = from_rows(update(WIDE), sample, views=(RAW,))
    row = layer_row(0, "A", layer, sample, K, WIDE[1])
    values = layer.views[RAW].singular_values
    assert row["third"] == pytest.approx(values[2] / values[0])
    low, high = row["intervals"]["third"]
    assert low < row["third"] < high
    json.dumps(row, allow_nan=False)
    assert third in shown("ranks") and third.panel == "Third value"
    assert (axis(third).label, axis(third).range) == ("of σ_1", (0, 1))
    assert "| `third` | σ_3/σ_1 | 0 … 1 | unit |  |  |" in definitions.table()


def test_a_registration_that_makes_no_sense(scratch: None) -> None:
    def nothing(view: object) -> None:
        """Nothing."""

    with pytest.raises(ValueError, match="eff_rank: is registered already"):
        statistic("eff_rank", needs="view", label="rank")(nothing)
    with pytest.raises(ValueError, match=r"a: needs must be one of tokens, .*, not 'rows'"):
        statistic("a", needs="rows", label="a")(nothing)
    with pytest.raises(ValueError, match="a: interval must be one of linear, log, unit"):
        statistic("a", needs="spectrum", interval="cubic", label="a")(nothing)
    with pytest.raises(ValueError, match="only statistics of tokens or the spectrum"):
        statistic("a", needs="view", interval="log", label="a")(nothing)
    with pytest.raises(ValueError, match="needs a docstring"):
        statistic("a", needs="view", label="a")(lambda view: None)


def test_the_definitions_are_those_of_the_registry() -> None:
    page = definitions.PAGE.read_text(encoding="utf-8")
    assert definitions.with_table(page) == page, "run python docs/definitions.py"
    with pytest.raises(ValueError, match="no <!-- statistics"):
        definitions.with_table("# A page without marks")


def test_every_statistic_says_what_it_is() -> None:
    for one in registered():
        assert one.definition and one.label[0].upper() + one.label[1:] == one.title
        assert one.figure is None or one.unit, one.name
        assert one.function.__doc__.splitlines()[0].endswith("."), one.name
