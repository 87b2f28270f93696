"""Verdicts on the hypothesis h_{L+1} = h_L + T_shared(h_L) + γ_L·v_L·f(…), phase by phase.

It predicts for phase C that the v_L share few dimensions, and for phase E that each layer has its own
direction, so that the stacked v_L have a rank close to their number. The rules (docs/definitions.md):

    shared   supported: more |cos| within the phase than the layers' covariance gives by chance (p ≤ 0.05,
             and interval above the null's mean), more than with layers equally far away (p ≤ 0.05), and at
             most half as many dimensions as layers (interval below N/2).
             contradicted: interval of |cos| below the null's mean, or interval of the rank above 0.8 N.
    own      supported: rank at least 0.8 N (interval above it), and no more |cos| than chance (p > 0.05).
             contradicted: rank below 0.8 N (interval below it).
    undecided otherwise, and if a statistic or its interval is missing.
"""

from typing import Any

PREDICTIONS = {"C": "shared", "E": "own"}
IN_WORDS = {"shared": "v_L share few dimensions", "own": "every layer has its own v_L", None: "–"}
ALPHA, SHARED_RANK, OWN_RANK = 0.05, 0.5, 0.8
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


def verdicts(relations: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per phase: the prediction, the statistics with intervals and nulls, and the verdict.

    `relations` is the result of `compare_layers`. `verdict` is None for a phase without a prediction.
    """
    tests = {row["phase"]: row for row in relations["phase_test"]["phases"]}
    return [_verdict(row, tests[row["phase"]]["p_value"]) for row in relations["phases"]]


def _verdict(row: dict[str, Any], gap_p: float | None) -> dict[str, Any]:
    prediction = PREDICTIONS.get(row["phase"])
    copied = {key: row[key] for key in ("phase", "layers", "intra", "stacked_rank", "dimensions_90")}
    decided: dict[str, str | None] = {"verdict": None, "why": None}
    if prediction:
        missing = _missing(row, gap_p)
        verdict, why = (UNDECIDED, missing) if missing else _RULES[prediction](row, gap_p)
        decided = {"verdict": verdict, "why": why}
    return {"prediction": prediction} | copied | {"gap_p": gap_p} | decided


def _missing(row: dict[str, Any], gap_p: float | None) -> str | None:
    if row["layers"] < 2:
        return "one layer: nothing to compare within"
    if "interval" not in row["intra"]:
        return "no intervals: they need several documents and --bootstrap"
    if "null_p" not in row["intra"]:
        return "no null: it needs --null_draws"
    return None


def _shared(row: dict[str, Any], gap_p: float | None) -> tuple[str, str]:
    intra, rank = row["intra"], relative_rank(row)["interval"]
    if intra["interval"][1] < intra["null_mean"]:
        return CONTRADICTED, "less |cos| within the phase than chance"
    if rank[0] > OWN_RANK:
        return CONTRADICTED, f"the rank of the v_L is above {OWN_RANK:g} of their number"
    failed = {
        "|cos| within the phase is not above chance": intra["null_p"] > ALPHA
        or intra["interval"][0] <= intra["null_mean"],
        "layers equally far away are as close, or too few to tell": gap_p is None or gap_p > ALPHA,
        f"the rank of the v_L may exceed {SHARED_RANK:g} of their number": rank[1] > SHARED_RANK,
    }
    return _unless(failed, "few dimensions, shared within the phase")


def _own(row: dict[str, Any], gap_p: float | None) -> tuple[str, str]:
    rank = relative_rank(row)["interval"]
    if rank[1] < OWN_RANK:
        return CONTRADICTED, f"the rank of the v_L is below {OWN_RANK:g} of their number"
    failed = {
        f"the rank of the v_L may be below {OWN_RANK:g} of their number": rank[0] < OWN_RANK,
        "more |cos| within the phase than chance": row["intra"]["null_p"] <= ALPHA,
    }
    return _unless(failed, "a direction of its own for every layer")


_RULES = {"shared": _shared, "own": _own}


def relative_rank(row: dict[str, Any]) -> dict[str, Any]:
    """The effective rank of a phase's stacked v_L divided by their number, with its interval if it has one.

    The value is None for a phase of one layer and for a row without `stacked_rank`.
    """
    rank, layers = row.get("stacked_rank"), row["layers"]
    if rank is None or layers < 2:
        return {"value": None}
    divided = {"value": rank["value"] / layers}
    return divided | ({"interval": [end / layers for end in rank["interval"]]} if "interval" in rank else {})


def _unless(failed: dict[str, bool], otherwise: str) -> tuple[str, str]:
    reasons = [reason for reason, holds in failed.items() if holds]
    return (UNDECIDED, "; ".join(reasons)) if reasons else (SUPPORTED, otherwise)
