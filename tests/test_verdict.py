"""The verdict: every rule decided both ways, and every reason given."""

from typing import Any

import pytest

from jaxdelta.statistics.across_layers.verdict import verdicts

N = 10


def phase(name: str, **changes: Any) -> dict[str, Any]:
    """A phase that its prediction holds for, but for these changes."""
    shared = {
        "layers": N,
        "intra": {"value": 0.4, "interval": [0.3, 0.5], "null_mean": 0.1, "null_p": 0.01},
        "stacked_rank": {"value": 4.0, "interval": [3.0, 4.9]},
        "dimensions_90": 4,
    }
    own = {
        "layers": N,
        "intra": {"value": 0.1, "interval": [0.05, 0.2], "null_mean": 0.1, "null_p": 0.4},
        "stacked_rank": {"value": 9.0, "interval": [8.1, 9.5]},
        "dimensions_90": 8,
    }
    row = {"phase": name, **(own if name == "E" else shared)}
    for key, change in changes.items():
        row[key] = row[key] | change if isinstance(change, dict) else change
    return row


def verdict(row: dict[str, Any], gap_p: float | None = 0.01) -> dict[str, Any]:
    tests = {"phases": [{"phase": row["phase"], "p_value": gap_p}]}
    [decided] = verdicts({"phases": [row], "phase_test": tests})
    return decided


ABOVE = "|cos| within the phase is not above chance"
LAGS = "layers equally far away are as close, or too few to tell"
RANK = "the rank of the v_L may exceed 0.5 of their number"


@pytest.mark.parametrize(
    "changes, gap_p, decided, why",
    [
        ({}, 0.01, "supported", "few dimensions, shared within the phase"),
        ({"intra": {"null_p": 0.05}}, 0.05, "supported", "few dimensions, shared within the phase"),
        (
            {"stacked_rank": {"interval": [3.0, 5.0]}},
            0.01,
            "supported",
            "few dimensions, shared within the phase",
        ),
        (
            {"intra": {"interval": [0.01, 0.09]}},
            0.01,
            "contradicted",
            "less |cos| within the phase than chance",
        ),
        (
            {"stacked_rank": {"interval": [8.1, 9.0]}},
            0.01,
            "contradicted",
            "the rank of the v_L is above 0.8 of their number",
        ),
        ({"intra": {"null_p": 0.06}}, 0.01, "undecided", ABOVE),
        ({"intra": {"interval": [0.1, 0.5]}}, 0.01, "undecided", ABOVE),
        ({}, 0.06, "undecided", LAGS),
        ({}, None, "undecided", LAGS),
        ({"stacked_rank": {"interval": [3.0, 5.1]}}, 0.01, "undecided", RANK),
        ({"stacked_rank": {"interval": [8.0, 9.0]}}, 0.01, "undecided", RANK),
        (
            {"intra": {"null_p": 0.5}, "stacked_rank": {"interval": [4.0, 6.0]}},
            0.5,
            "undecided",
            f"{ABOVE}; {LAGS}; {RANK}",
        ),
    ],
)
def test_a_shared_phase(changes: dict[str, Any], gap_p: float | None, decided: str, why: str) -> None:
    row = verdict(phase("C", **changes), gap_p)
    assert (row["prediction"], row["verdict"], row["why"]) == ("shared", decided, why)


BELOW = "the rank of the v_L may be below 0.8 of their number"
MORE = "more |cos| within the phase than chance"


@pytest.mark.parametrize(
    "changes, decided, why",
    [
        ({}, "supported", "a direction of its own for every layer"),
        ({"stacked_rank": {"interval": [8.0, 9.5]}}, "supported", "a direction of its own for every layer"),
        (
            {"stacked_rank": {"interval": [6.0, 7.9]}},
            "contradicted",
            "the rank of the v_L is below 0.8 of their number",
        ),
        ({"stacked_rank": {"interval": [7.0, 9.0]}}, "undecided", BELOW),
        ({"stacked_rank": {"interval": [7.0, 8.0]}}, "undecided", BELOW),
        ({"intra": {"null_p": 0.05}}, "undecided", MORE),
        (
            {"intra": {"null_p": 0.01}, "stacked_rank": {"interval": [7.0, 9.0]}},
            "undecided",
            f"{BELOW}; {MORE}",
        ),
    ],
)
@pytest.mark.parametrize("gap_p", [0.01, 0.9, None])
def test_a_phase_of_own_directions(
    changes: dict[str, Any], decided: str, why: str, gap_p: float | None
) -> None:
    row = verdict(phase("E", **changes), gap_p)
    assert (row["prediction"], row["verdict"], row["why"]) == ("own", decided, why)


@pytest.mark.parametrize("name", ["C", "E"])
@pytest.mark.parametrize(
    "changes, lacking, why",
    [
        (
            {"layers": 1, "intra": {"value": None}},
            ("interval", "null_p"),
            "one layer: nothing to compare within",
        ),
        ({}, ("interval", "null_p"), "no intervals: they need several documents and --bootstrap"),
        ({}, ("interval",), "no intervals: they need several documents and --bootstrap"),
        ({}, ("null_p",), "no null: it needs --null_draws"),
    ],
)
def test_what_is_missing_is_named(
    name: str, changes: dict[str, Any], lacking: tuple[str, ...], why: str
) -> None:
    row = phase(name, **changes)
    row["intra"] = {key: value for key, value in row["intra"].items() if key not in lacking}
    if "interval" in lacking:
        del row["stacked_rank"]["interval"]
    decided = verdict(row, None)
    assert (decided["verdict"], decided["why"]) == ("undecided", why)


def test_nothing_is_said_of_other_phases_and_the_order_is_kept() -> None:
    rows = [phase("A"), phase("E"), phase("C"), phase("mine")]
    tests = [
        {"phase": row["phase"], "p_value": p} for row, p in zip(rows, (0.1, 0.2, 0.03, 0.4), strict=True)
    ]
    found = verdicts({"phases": rows, "phase_test": {"phases": tests[::-1]}})
    assert [row["phase"] for row in found] == ["A", "E", "C", "mine"]
    assert [row["gap_p"] for row in found] == [0.1, 0.2, 0.03, 0.4]
    assert [row["verdict"] for row in found] == [None, "supported", "supported", None]
    assert [row["why"] is None for row in found] == [True, False, False, True]
    for row, given in zip(found, rows, strict=True):
        assert row["intra"] == given["intra"] and row["dimensions_90"] == given["dimensions_90"]
