"""Compares two reports on the same model and text, key by key.

    python scripts/compare_reference.py --reference=torch.json --candidate=jax.json

Either file may come from scripts/delta_svd.py, from scripts/reference_torch.py or from the original
reference, which has fewer keys. Prints the largest deviation of each key. The exit status is 0 if all
comparable numbers are within tolerance, 1 if one is not or the files do not match, 2 for a bad flag.

- Lengths, ranks and shares: |r - c| <= rtol |r|.
- Cosines, their means, captures: ||r| - |c|| <= atol_cos, as the sign of a singular vector is arbitrary. The
  sign of `cos_delta_h_mean` is not, and counts.
- Leading directions, if .safetensors or .npz files are next to both: 1 - |<v_r, v_c>| <= atol_cos/10.

A leading direction is determined only if σ_1 stands out: σ_1 > gap σ_2 in both files. A number that depends
on directions is compared if all of them are determined; others are skipped and listed.

The original reference takes the last state after the final RMSNorm, jaxdelta before it by default. If two
files differ in this, the last row is compared with the other file's `last_layer_normed`, and numbers that
depend on the last layer's direction are skipped and listed.
"""

import json
import math
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from safetensors import SafetensorError, safe_open

FLAGS = flags.FLAGS

SAME_RUN = ("num_layers", "n_calib_tokens", "hidden")
LENGTHS = ("frob", "token_norm_mean", "token_norm_std", "h_norm_mean", "rel_step_mean", "rel_step_std")
SHARES = ("parallel_frac", "eff_rank", "top1_frac", "top3_frac", "top10_frac")
COSINES = ("cos_delta_h_mean", "top1_cos_adjacent", "intra_cos_mean", "cross_cos_mean", "capture", "top1_cos")

DIRECTION_SHARE = 0.1  # of the cosines' tolerance
ZERO = 1e-9  # deviations of smaller numbers are relative to this
# Float32 states resolve a singular value to about 1e-7 σ_1: a relative 1e-4 of this share.
NOISE = 1e-3
PLACES_SHOWN = 6

Report = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]


class MismatchError(Exception):
    """Files that cannot be read or are not of the same run; users see the message only."""


@dataclass(frozen=True)
class Place:
    """Where a number is, the layers whose leading directions it depends on, its smallest scale."""

    label: str
    layers: tuple[int, ...] = ()
    scale: float = field(default=ZERO, compare=False)


Figures = dict[Place, Any]
Rule = tuple[float, Callable[[Any, Any, Place], float]]  # a tolerance, and the deviation it limits
Worst = tuple[float, str, Any, Any]  # a deviation, where, and both sides' numbers


@dataclass(frozen=True)
class Row:
    """A key's largest deviation, how many numbers were compared, and the places skipped for each reason."""

    key: str
    deviation: float
    tolerance: float
    where: str
    reference: Any
    candidate: Any
    compared: int
    skipped: Mapping[str, tuple[str, ...]]

    @property
    def verdict(self) -> str:
        """`ok`, `FAIL`, or `skipped` if nothing could be compared."""
        if not self.compared:
            return "skipped"
        return "ok" if self.deviation <= self.tolerance else "FAIL"


def absolute(r: float, c: float, _: Place) -> float:
    """|r - c|; 0 if both are undefined, infinite if one is."""
    if r == c or (math.isnan(r) and math.isnan(c)):
        return 0.0
    return abs(r - c) if math.isfinite(r - c) else math.inf


def relative(r: float, c: float, place: Place) -> float:
    """|r - c| / max(|r|, scale)."""
    difference = absolute(r, c, place)
    return difference if math.isinf(difference) else difference / max(place.scale, abs(r))


def different(r: str, c: str, _: Place) -> float:
    """0 if equal, else 1."""
    return float(r != c)


def number(value: float | None) -> float:
    """A number of a report; null, which means undefined, becomes NaN."""
    return math.nan if value is None else float(value)


def last_state(report: Report) -> str:
    """`residual` or `normed`; always the latter in the original reference, which has no `run`."""
    run = report.get("run")
    return run.get("last_state", "normed") if isinstance(run, Mapping) else "normed"


def flatten(report: Report, rows: Sequence[Report]) -> dict[str, Figures]:
    """All numbers of a report by key and place; `rows` are the layers' rows to compare."""
    scalars = (*LENGTHS, *SHARES, "cos_delta_h_mean")
    flat = {key: {Place(f"L={L}"): number(row[key]) for L, row in enumerate(rows)} for key in scalars}
    flat["phase"] = {Place(f"L={L}"): row["phase"] for L, row in enumerate(rows)}
    flat["top_singvals"] = {
        Place(f"L={L} σ_{i}", scale=max(ZERO, NOISE * row["top_singvals"][0])): number(sigma)
        for L, row in enumerate(rows)
        for i, sigma in enumerate(row["top_singvals"], start=1)
    }
    flat["top1_cos_adjacent"] = {
        Place(f"L={L}→{L + 1}", (L, L + 1)): abs(number(cosine))
        for L, cosine in enumerate(report["top1_cos_adjacent"])
    }
    return flat | flatten_tables(report, [row["phase"] for row in rows])


def flatten_tables(report: Report, phases: Sequence[str]) -> dict[str, Figures]:
    """Overlap and capture of the phases; the original reference only prints them."""
    tables: dict[str, Figures] = {}
    for line in report.get("phase_overlap", ()):
        inside = tuple(L for L, phase in enumerate(phases) if phase == line["phase"])
        # A phase of one layer has no pairs: its 1.0 is a convention and depends on no direction.
        layers = {"intra_cos_mean": inside if len(inside) > 1 else (), "cross_cos_mean": range(len(phases))}
        for key in layers:
            place = Place(f"phase {line['phase']}", tuple(layers[key]))
            tables.setdefault(key, {})[place] = number(line[key])
    for line in report.get("block_capture", ()):
        inside = tuple(L for L, phase in enumerate(phases) if phase == line["phase"])
        tables.setdefault("capture", {})[Place(f"L={line['L']}", inside)] = number(line["capture"])
    return tables


def read_figures(report: Report, name: str, normed: bool) -> dict[str, Figures]:
    """Flattens a report, `normed`: with the last row after the final norm; a missing key: MismatchError."""
    try:
        rows = list(report["per_layer"])
        expected = report["num_layers"], report["num_layers"] - 1
        if (len(rows), len(report["top1_cos_adjacent"])) != expected:
            raise ValueError(f"{len(rows)} rows and {len(report['top1_cos_adjacent'])} cosines of neighbours")
        if normed and last_state(report) != "normed":
            rows[-1] = report["last_layer_normed"]
        return flatten(report, rows)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else error
        raise MismatchError(f"the {name} is not a report of this kind: {what}") from error


def undetermined(flats: Sequence[dict[str, Figures]], num_layers: int, gap: float) -> dict[int, str]:
    """Layers whose leading direction is undetermined in either file, and why."""
    doubts = {}
    for flat in flats:
        for L in range(num_layers):
            first, second = (flat["top_singvals"].get(Place(f"L={L} σ_{i}"), math.nan) for i in (1, 2))
            if not first > gap * second:
                doubts[L] = "σ_2 unknown" if math.isnan(second) else f"σ_1 / σ_2 <= {gap:g}"
    return doubts


def add_arrays(
    flats: Sequence[dict[str, Figures]], sides: Sequence[Arrays | None], shape: tuple[int, int]
) -> None:
    """Adds |<v_i, v_j>| of all pairs of layers, and |<v, v_r>| as `directions`, which is 1 for v_r itself."""
    for flat, arrays in zip(flats, sides, strict=True):
        if arrays is None:
            continue
        found = arrays["directions"].shape[::2], arrays["top1_cos"].shape
        if found != (shape, shape[:1] * 2):
            raise MismatchError(f"arrays of {found[0]} where the report has {shape} layers and columns")
        pairs = ((i, j) for j in range(shape[0]) for i in range(j))
        cosines = np.abs(arrays["top1_cos"]).tolist()
        flat["top1_cos"] = {Place(f"L={i},{j}", (i, j)): cosines[i][j] for i, j in pairs}
        flat["directions"] = {Place(f"L={L}", (L,)): 1.0 for L in range(shape[0])}
    both = [arrays for arrays in sides if arrays is not None]
    if len(both) == len(sides):
        v_r, v_c = (np.asarray(arrays["directions"][:, 0], np.float64) for arrays in both)
        lengths = np.linalg.norm(v_r, axis=1) * np.linalg.norm(v_c, axis=1)
        cosines = np.abs(np.sum(v_r * v_c, axis=1)) / np.maximum(lengths, ZERO)
        flats[1]["directions"] = dict(zip(flats[0]["directions"], cosines.tolist(), strict=True))


def condense(
    key: str,
    sides: Sequence[Figures | None],
    rule: Rule,
    doubts: Mapping[int, str],
    veto: str = "",
) -> Row:
    """The row of a key from the numbers of both sides, unless a side has none or there is a veto."""
    nothing: Worst = (0.0, "", math.nan, math.nan)
    tolerance, deviation = rule
    absent = [name for name, side in zip(("reference", "candidate"), sides, strict=True) if side is None]
    if veto := f"not with the {' and '.join(absent)}" if absent else veto:
        return Row(key, 0.0, tolerance, *nothing[1:], 0, {veto: ()})
    reference, candidate = (side or {} for side in sides)
    compared: list[Worst] = []
    skipped: dict[str, tuple[str, ...]] = {}
    for place in reference | candidate:
        # A number that one side lacks deviates infinitely.
        r, c = reference.get(place, math.nan), candidate.get(place, math.nan)
        if reason := next((doubts[layer] for layer in place.layers if layer in doubts), ""):
            skipped[reason] = (*skipped.get(reason, ()), place.label)
        else:
            compared.append((deviation(r, c, place), place.label, r, c))
    top = max(compared, key=lambda figure: figure[0], default=nothing)
    return Row(key, top[0], tolerance, *top[1:], len(compared), skipped)


def compare(
    reference: Report,
    candidate: Report,
    reference_arrays: Arrays | None = None,
    candidate_arrays: Arrays | None = None,
    *,
    rtol: float = 1e-4,
    atol_cos: float = 1e-4,
    gap: float = 1.01,
) -> list[Row]:
    """Compares two reports and, if both are given, their arrays.

    Args:
        reference: contents of one JSON file.
        candidate: contents of the other.
        reference_arrays: `directions` (N, k, d) and `top1_cos` (N, N) of the reference.
        candidate_arrays: those of the candidate.
        rtol: tolerated relative deviation of lengths, ranks and shares.
        atol_cos: tolerated absolute deviation of cosines.
        gap: smallest σ_1 / σ_2 at which a leading direction is compared.

    Returns:
        One row per key.

    Raises:
        MismatchError: the reports are of runs of different shapes, or lack required keys.
    """
    reports = {"reference": reference, "candidate": candidate}
    if differ := [key for key in SAME_RUN if reference.get(key) != candidate.get(key)]:
        values = ", ".join(f"{key} ({reference.get(key)} and {candidate.get(key)})" for key in differ)
        raise MismatchError(f"reference and candidate differ in {values}")
    conventions = [last_state(report) for report in reports.values()]
    mixed = conventions[0] != conventions[1]
    flats = [read_figures(report, name, normed=mixed) for name, report in reports.items()]
    doubts = undetermined(flats, reference["num_layers"], gap)
    if mixed:
        doubts[reference["num_layers"] - 1] = f"last state {conventions[0]} / {conventions[1]}"
    # Files may keep different numbers of singular values, and the basis of a block depends on that number.
    common = flats[0]["top_singvals"].keys() & flats[1]["top_singvals"].keys()
    same_k = all(len(flat["top_singvals"]) == len(common) for flat in flats)
    vetoes = {} if same_k else {"capture": "of different numbers of directions"}
    for flat in flats:
        flat["top_singvals"] = {
            place: sigma for place, sigma in flat["top_singvals"].items() if place in common
        }
    add_arrays(flats, [reference_arrays, candidate_arrays], (reference["num_layers"], reference["hidden"]))
    rules: dict[str, Rule] = {"phase": (0.0, different), "directions": (DIRECTION_SHARE * atol_cos, absolute)}
    rules |= dict.fromkeys((*LENGTHS, *SHARES, "top_singvals"), (rtol, relative))
    rules |= dict.fromkeys(COSINES, (atol_cos, absolute))
    return [
        condense(key, [flat.get(key) for flat in flats], rule, doubts, vetoes.get(key, ""))
        for key, rule in rules.items()
    ]


def read_report(path: Path) -> Report:
    """The contents of a JSON file."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MismatchError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(report, dict):
        raise MismatchError(f"{path} holds no report")
    return report


def read_arrays(path: Path) -> Arrays | None:
    """The arrays next to a report, under jaxdelta's names; None if there are none."""
    tensors, archive = path.with_suffix(".safetensors"), path.with_suffix(".npz")
    try:
        if tensors.exists():
            with safe_open(tensors, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in ("directions", "top1_cos")}
        if archive.exists():
            with np.load(archive) as file:
                return {"directions": file["top_dirs"], "top1_cos": file["top1_cos"]}
    except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        raise MismatchError(f"cannot read the arrays next to {path}: {error}") from error
    return None


def print_rows(rows: Sequence[Row]) -> None:
    """Prints the table, then what was skipped and why."""
    line = "{:<18} {:>9} {:>9}  {:<12} {:>13} {:>13} {:>8}  {}"
    print(
        line.format("key", "deviation", "tolerance", "where", "reference", "candidate", "compared", "verdict")
    )
    for row in rows:
        pair = [side if isinstance(side, str) else f"{side:.7g}" for side in (row.reference, row.candidate)]
        shown = [f"{row.deviation:.1e}", row.where, *pair] if row.compared else ["-"] * 4
        deviation, where, *pair = shown
        print(
            line.format(row.key, deviation, f"{row.tolerance:.0e}", where, *pair, row.compared, row.verdict)
        )
    for row in rows:
        total = row.compared + sum(map(len, row.skipped.values()))
        for reason, places in row.skipped.items():
            listed = ", ".join(places[:PLACES_SHOWN]) + ", ..." * (len(places) > PLACES_SHOWN)
            count = f"{len(places)} of {total} {row.key} ({listed})" if places else row.key
            print(f"skipped {count}: {reason}")


def define_flags() -> None:
    """Defines the flags; called only when run as a script, so that tests can import several scripts."""
    flags.DEFINE_string("reference", None, "JSON file to compare with", required=True)
    flags.DEFINE_string("candidate", None, "JSON file to check", required=True)
    flags.DEFINE_float("rtol", 1e-4, "largest relative deviation of lengths and shares", lower_bound=0)
    flags.DEFINE_float("atol_cos", 1e-4, "largest absolute deviation of cosines", lower_bound=0)
    flags.DEFINE_float("gap", 1.01, "smallest σ_1 / σ_2 at which directions are compared", lower_bound=1)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake ends in one line and status 2, instead of absl's page of help and 1."""
    try:
        if rest := FLAGS(argv)[1:]:
            raise flags.Error(f"unexpected argument {rest[0]!r}")
    except flags.Error as error:
        print(f"compare_reference: {error}", file=sys.stderr)
        sys.exit(2)
    return argv


def main(_: Sequence[str]) -> int:
    """Returns the exit status: 0 if all comparable numbers agree, else 1."""
    paths = Path(FLAGS.reference), Path(FLAGS.candidate)
    try:
        reports, arrays = [read_report(path) for path in paths], [read_arrays(path) for path in paths]
        rows = compare(*reports, *arrays, rtol=FLAGS.rtol, atol_cos=FLAGS.atol_cos, gap=FLAGS.gap)
    except MismatchError as error:
        print(f"compare_reference: {error}", file=sys.stderr)
        return 1
    for name, path, report in zip(("reference", "candidate"), paths, reports, strict=True):
        print(f"{name} {path}: {report['num_layers']} layers, last state {last_state(report)}")
    print_rows(rows)
    failed = [row.key for row in rows if row.verdict == "FAIL"]
    print(f"DIFFERENT: {', '.join(failed)}" if failed else "equal within tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
