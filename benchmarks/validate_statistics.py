"""Validates the statistics: plants a known truth, and prints measured next to expected values.

    python benchmarks/validate_statistics.py                           # a minute or two on two cores
    python benchmarks/validate_statistics.py --table=docs/validation.md  # also puts the table into that file
    python benchmarks/validate_statistics.py --quick                   # few data sets, wide tolerances

No model is needed: updates are generated arrays. Exit status 1 if a line of the table fails.

Axes: N layers, G documents, n tokens, d hidden size, k directions a layer.
"""

from jaxdelta.utils import cli

cli.install()

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxdelta.errors import JaxDeltaError
from jaxdelta.spectra.linalg import one_blas_thread
from jaxdelta.spectra.scheduler import OneByOne, summarise_batch
from jaxdelta.spectra.view_summary import LayerSummary, MeasurementPlan
from jaxdelta.spectra.views import MASKED, RAW
from jaxdelta.statistics.across_layers.nulls import adjacent_null, layer_draws, phase_nulls
from jaxdelta.statistics.across_layers.overlap import overlaps
from jaxdelta.statistics.across_layers.phase_test import segment_test
from jaxdelta.statistics.across_layers.phases import Phases, default_phases
from jaxdelta.statistics.across_layers.subspaces import inner_products, shared_subspaces
from jaxdelta.statistics.across_layers.table import compare_layers, stacked_directions
from jaxdelta.statistics.intervals import p_value
from jaxdelta.statistics.layer_row import layer_row, view_rows
from jaxdelta.statistics.per_layer.ranks import (
    effective_rank,
    participation_ratio,
    roy_vetterli_rank,
    stable_rank,
)
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.sweep.sweep import Update
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.text.tokens import Tokens

_QUICK = flags.DEFINE_bool("quick", False, "few data sets and wide tolerances, to check that everything runs")
_TABLE = flags.DEFINE_string(
    "table", None, "Markdown file in which to replace the table, or to write if it is missing"
)
_ONLY = flags.DEFINE_list("only", [], "names of checks: coverage, phases, subspaces, sinks, nulls, ranks")

DOCUMENTS, TOKENS, HIDDEN, TOP = 25, 300, 32, 4
PHASES = Phases(tuple("AAABBB"))
BOOTSTRAP = 200
DEPTH = 28  # layers in the phase test
LAYERS = default_phases(DEPTH)
LEVEL = 0.05
ACROSS = ("adjacent", "intra", "cross", "stacked_rank", "capture", "leave_one_out")
COLUMNS = ("planted", "required", "measured", "")

Interval = tuple[float, float, float]  # estimate, low, high


@dataclasses.dataclass(frozen=True)
class Check:
    """A line of the table."""

    planted: str
    required: str
    measured: str
    passed: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """The line's cells, in the order of COLUMNS."""
        return self.planted, self.required, self.measured, "pass" if self.passed else "FAIL"


def main() -> None:
    """Runs the chosen checks and prints the table; fails where a line does."""
    chosen = {name: check for name, check in CHECKS.items() if not _ONLY.value or name in _ONLY.value}
    checks = [line for check in chosen.values() for line in check(_QUICK.value)]
    table = markdown(checks)
    print(table)
    if _TABLE.value:
        write(Path(_TABLE.value), table)
    if failed := sum(not line.passed for line in checks):
        raise JaxDeltaError(f"{failed} of {len(checks)} lines fail")


def markdown(checks: list[Check]) -> str:
    """The checks as a Markdown table whose columns are as wide as their widest cell."""
    rows = [COLUMNS, *(line.cells for line in checks)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write(path: Path, table: str) -> None:
    """Replaces the table of the file by this one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else [""]
    places = [i for i, line in enumerate(lines) if line.startswith("|")] or [len(lines) - 1]
    lines[places[0] : places[-1] + 1] = table.splitlines()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class World:
    """Layers with planted updates; every document has its own mean update and its own scale.

    δ_i = s_g (√ρ a_g + √(1-ρ) z_i + e_1) diag(σ) Q_L + 0.02 c_g h_i for token i of document g: a_g and z_i
    standard normal and half common to all layers, Q_L (d, d) orthogonal and half common to the layers of a
    phase, ln s_g and ln c_g normal. So 20 % of a loading's variance is the document's.
    """

    rho, spread = 0.2, 0.2

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sigma = 0.75 ** np.arange(HIDDEN)
        shared = {name: rng.normal(size=(HIDDEN, HIDDEN)) for name in PHASES.names}
        own = [shared[name] + 0.7 * rng.normal(size=(HIDDEN, HIDDEN)) for name in PHASES.of_layer]
        self.axes = [np.linalg.qr(rows.T)[0].T for rows in own]
        self.state = rng.normal(size=HIDDEN)

    def text(self, rng: np.random.Generator) -> tuple[Tokens, list[tuple[np.ndarray, np.ndarray]]]:
        """A text, and every layer's δ and h."""
        document = np.repeat(np.arange(DOCUMENTS), document_lengths(rng))

        def scale(spread: float) -> np.ndarray:
            return np.exp(spread * rng.normal(size=DOCUMENTS))[document][:, None]

        def loads() -> np.ndarray:
            by_document = rng.normal(size=(DOCUMENTS, HIDDEN))[document]
            return np.sqrt(self.rho) * by_document + np.sqrt(1 - self.rho) * rng.normal(
                size=by_document.shape
            )

        written, common = scale(self.spread), loads()
        h, layers = scale(self.spread) * (4 * self.state + 3 * loads()), []
        for axes in self.axes:
            load = (common + loads()) / np.sqrt(2)
            load[:, 0] += 1
            delta = written * (load * self.sigma) @ axes + 0.02 * scale(0.5) * h
            layers.append((delta, h))
            h = h + delta
        return tokens_of(document), layers


def document_lengths(rng: np.random.Generator) -> np.ndarray:
    """25 lengths from 5 to 20 with a sum of 300, so that compiled shapes are the same for all texts."""
    lengths = rng.integers(5, 21, DOCUMENTS)
    while missing := TOKENS - lengths.sum():
        place = rng.integers(DOCUMENTS)
        lengths[place] = np.clip(lengths[place] + np.sign(missing), 5, 20)
    return lengths


def tokens_of(document: np.ndarray) -> Tokens:
    """Tokens of these documents; a first one, which is in no update, is added."""
    owners = np.concatenate([document[:1], document])[None].astype(np.int32)
    return Tokens(np.zeros_like(owners), owners)


def measured(
    layers: list[tuple[np.ndarray, np.ndarray]], sample: ResamplingGroups, k: int, views: Any = (RAW,)
) -> list[LayerSummary]:
    """The package's summaries of these δ and h."""
    shape = layers[0][0].shape
    nothing = jnp.zeros(shape, jnp.float32)
    updates = [Update(jnp.asarray(x, jnp.float32), nothing, jnp.asarray(h, jnp.float32)) for x, h in layers]
    with jax.enable_x64(True), one_blas_thread():
        plan = MeasurementPlan(k, views=views, resampled=True)
        return summarise_batch(updates, plan, OneByOne(sample.groups))


def coverage(quick: bool) -> list[Check]:
    """How often 95 % intervals contain the statistic's mean over all data sets."""
    world, sets = World(), 40 if quick else 500
    least, most = (0.85, 1.0) if quick else (0.93, 0.97)
    found = [intervals_of(world, seed) for seed in range(sets)]
    lines = []
    for name in (*(one.name for one in registered() if one.interval), *ACROSS):
        values = np.array([[one[key] for key in one if key[0] == name] for one in found])
        target = values[:, :, 0].mean(axis=0)
        covered = float(np.mean((values[:, :, 1] <= target) & (target <= values[:, :, 2])))
        lines.append(
            Check(
                f"{DOCUMENTS} documents, each its own mean and scale: interval of {name}",
                f"{least:.0%} - {most:.0%} of {sets} texts cover",
                f"{covered:.1%}",
                least <= covered <= most,
            )
        )
    return lines


def intervals_of(world: World, seed: int) -> dict[tuple[str, int], Interval]:
    """Every interval of a text, by statistic and layer (or pair of layers, or phase)."""
    tokens, layers = world.text(np.random.default_rng((1, seed)))
    sample = ResamplingGroups.of(tokens, BOOTSTRAP, seed)
    figures = measured(layers, sample, TOP)
    found = {}
    for index, layer in enumerate(figures):
        row = layer_row(index, PHASES.of_layer[index], layer, sample, TOP, HIDDEN)
        for name, (low, high) in row["intervals"].items():
            found[name, index] = (figure(row, name), low, high)
    relations = compare_layers([layer.views[RAW] for layer in figures], PHASES, sample, TOP, 0, 0)
    for index, row in enumerate(relations["adjacent"]):
        found["adjacent", index] = (row["abs_cos"], *row["interval"])
    for key in ("phases", "layers"):
        for index, row in enumerate(relations[key]):
            for name in ACROSS:
                if name in row:
                    found[name, index] = (row[name]["value"], *row[name]["interval"])
    return found


def figure(row: dict[str, Any], name: str) -> float:
    """A statistic of a layer's row by its name among the intervals: γ is σ_1."""
    return row["top_singvals"][0] if name == "gamma" else row[name]


def phases(quick: bool) -> list[Check]:
    """How often the phase test rejects, without phases and with them."""
    sets, few = (60, 20) if quick else (2000, 400)
    most, least = (0.15, 0.8) if quick else (0.06, 0.9)
    drift, planted = rejected(walk, sets), rejected(in_phases, few)
    return [
        Check(
            f"random walk of v over {DEPTH} layers, no phases",
            f"phase test's p <= 0.05 in at most {most:.0%} of {sets}",
            f"{drift:.1%}",
            drift <= most,
        ),
        Check(
            "such a walk, and a direction for each phase",
            f"phase test's p <= 0.05 in at least {least:.0%} of {few}",
            f"{planted:.1%}",
            planted >= least,
        ),
    ]


def rejected(draw: Callable[[np.random.Generator], np.ndarray], sets: int) -> float:
    """The share of `sets` draws of directions whose phase test has a p-value of at most LEVEL."""
    found = (draw(np.random.default_rng((2, seed))) for seed in range(sets))
    return float(np.mean([segment_test(np.abs(v @ v.T), LAYERS).p_value <= LEVEL for v in found]))


def walk(rng: np.random.Generator) -> np.ndarray:
    """Unit vectors (N, d), each a step in a random direction from the one before; fast or slow."""
    rows, step = [unit(rng.normal(size=HIDDEN))], rng.uniform(0.15, 1)
    while len(rows) < DEPTH:
        rows.append(unit(rows[-1] + step * unit(rng.normal(size=HIDDEN))))
    return np.stack(rows)


def in_phases(rng: np.random.Generator) -> np.ndarray:
    """The walk, with a direction of its own added for each phase."""
    own = {name: unit(rng.normal(size=HIDDEN)) for name in LAYERS}
    return unit(walk(rng) + np.stack([own[name] for name in LAYERS]))


def unit(x: np.ndarray) -> np.ndarray:
    """Normalises the vectors along the last axis."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def subspaces(quick: bool) -> list[Check]:
    """Recovery of eight directions shared by the layers of a phase, under noise."""
    sets, k, d = 5 if quick else 40, 8, 64
    members = np.repeat(np.eye(2, dtype=bool), 4, axis=1)
    worst, inside, outside = [], [], []
    for seed in range(sets):
        rng = np.random.default_rng((3, seed))
        truth = np.linalg.qr(rng.normal(size=(d, k)))[0].T
        bases = [truth] * 4 + [np.linalg.qr(rng.normal(size=(d, k)))[0].T for _ in range(4)]
        noise = 0.1 * rng.normal(size=(8, TOKENS, d))
        deltas = [rng.normal(size=(TOKENS, k)) @ basis + e for basis, e in zip(bases, noise, strict=True)]
        sample = ResamplingGroups.of(tokens_of(np.arange(TOKENS) * DOCUMENTS // TOKENS), 0, seed)
        figures = [layer.views[RAW] for layer in measured([(x, x) for x in deltas], sample, k)]
        directions = stacked_directions(figures, k)
        phase = shared_subspaces(inner_products(directions), members)[0]
        found = phase.whole.T @ directions.reshape(-1, d)[phase.rows]
        sine = np.linalg.norm(found - found @ truth.T @ truth, 2)
        each = [np.linalg.norm(e, 2) / f.singular_values[k - 1] for e, f in zip(noise, figures, strict=True)]
        bound = max(each[:4])
        worst.append(sine / (bound / (1 - bound)))
        alone = overlaps(directions, members).leave_one_out[0]
        inside.append(alone[:4].min())
        outside.append(alone[4:].mean())
    chance = k / d
    return [
        Check(
            "8 shared directions in 4 of 8 layers, noise of 0.1",
            "sine of the largest angle within Wedin's bound",
            f"at most {max(worst):.2f} of it",
            max(worst) <= 1,
        ),
        Check(
            "leave_one_out of the layers that share",
            "0.95 or more",
            f"{min(inside):.3f}",
            min(inside) >= 0.95,
        ),
        Check(
            "leave_one_out's B on layers that do not share",
            f"8/d = {chance:.3f} within {'40' if quick else '15'} %",
            f"{np.mean(outside):.3f}",
            bool(abs(np.mean(outside) / chance - 1) <= (0.4 if quick else 0.15)),
        ),
    ]


def sinks(quick: bool) -> list[Check]:
    """Three tokens with much larger state and update are found, and do not bias the masked view."""
    world, sets, lines = World(), 5 if quick else 50, []
    for factor in (30, 100):
        right, within = [], []
        for seed in range(sets):
            rng = np.random.default_rng((4, seed))
            tokens, layers = world.text(rng)
            sample = ResamplingGroups.of(tokens, BOOTSTRAP, seed)
            places = rng.choice(TOKENS, 3, replace=False)
            loud = np.ones((TOKENS, 1))
            loud[places] = factor
            spoiled = measured([(loud * x, loud * h) for x, h in layers], sample, TOP, (RAW, MASKED))
            for layer, clean in zip(spoiled, measured(layers, sample, TOP), strict=True):
                masked = layer.views[MASKED]
                right.append(set(np.flatnonzero(~np.asarray(masked.kept))) == set(places))
                row, truth = view_rows([masked, clean.views[RAW]], sample, TOP, HIDDEN)
                within += [
                    low <= figure(truth, name) <= high for name, (low, high) in row["intervals"].items()
                ]
        planted = f"3 tokens at {factor} times their state and update"
        found = f"{np.mean(right):.1%} of {len(right)} layers"
        lines += [
            Check(planted, "all found, no others", found, all(right)),
            Check(
                f"{planted}: the masked view",
                "every figure without sinks is in its interval",
                f"{np.mean(within):.1%} of {len(within)}",
                all(within),
            ),
        ]
    return lines


def nulls(quick: bool) -> list[Check]:
    """p-values of layers that share only their covariance."""
    import scipy.stats

    sets, draws, layers = (60, 200, 4) if quick else (400, 500, 4)
    rng, members = np.random.default_rng(5), np.ones((1, layers), bool)
    sigma = np.arange(1, HIDDEN + 1) ** -0.5
    factors = [(rng.normal(size=(TOKENS, HIDDEN)) * sigma).astype(np.float32) for _ in range(layers)]
    found: dict[str, list[float]] = {"adjacent": [], "intra": [], "capture": [], "leave_one_out": []}
    for seed in range(sets):
        two = unit(pooled(rng, factors[:2], 2))
        drawn_by_layer = layer_draws(factors, members, TOP, draws, seed)
        pair = adjacent_null(drawn_by_layer[:2], draws)
        found["adjacent"].append(float(p_value(abs(two[0] @ two[1]), pair[0])))
        rows = pooled(rng, factors, layers * TOP).reshape(layers, TOP, HIDDEN)
        drawn = overlaps(np.stack([np.linalg.qr(x.T)[0].T for x in rows]), members)
        phase = phase_nulls(drawn_by_layer, members, TOP, draws, seed)
        found["intra"].append(float(p_value(drawn.intra_cos_mean[0], phase.intra[0])))
        for name in ("capture", "leave_one_out"):
            of_first, null = getattr(drawn, name)[0, 0], getattr(phase, name)[0]
            found[name].append(float(p_value(of_first, null)))
    lines = []
    for name, values in found.items():
        chance = scipy.stats.kstest(values, "uniform").pvalue
        rejected = np.mean(np.array(values) <= LEVEL)
        lines.append(
            Check(
                f"directions that share only a covariance, spectrum 1/i: null_p of {name}",
                f"uniform: p of a KS test of {sets} above 0.01",
                f"{chance:.2f}; {rejected:.1%} are at most 0.05",
                bool(chance > 0.01),
            )
        )
    return lines


def pooled(rng: np.random.Generator, factors: list[np.ndarray], count: int) -> np.ndarray:
    """Rows from the pooled covariance Σ FᵀF/‖F‖²."""
    return sum(rng.normal(size=(count, len(f))) @ f / np.linalg.norm(f) for f in factors)


def ranks(quick: bool) -> list[Check]:
    """The order of the ranks on random spectra."""
    sets, rng = 1_000 if quick else 10_000, np.random.default_rng(6)
    decay = rng.uniform(0, 4, (sets, 1))
    values = (
        rng.gamma(rng.uniform(0.1, 3, (sets, 1)), size=(sets, HIDDEN)) * np.arange(1, HIDDEN + 1) ** -decay
    )
    values = -np.sort(-values, axis=1)
    measures = [stable_rank, participation_ratio, effective_rank, roy_vetterli_rank]
    chain = np.stack([*(measure_of(values) for measure_of in measures), np.full(sets, float(HIDDEN))])
    # effective_rank ignores shares below 1e-12
    holds = np.all(chain[:-1] <= chain[1:] * (1 + 1e-9), axis=0)
    return [
        Check(
            f"{sets:,} random spectra",
            "stable <= participation <= exp H(σ²) <= Roy-Vetterli <= rank",
            f"{holds.mean():.2%}",
            bool(holds.all()),
        )
    ]


CHECKS = {
    "coverage": coverage,
    "phases": phases,
    "subspaces": subspaces,
    "sinks": sinks,
    "nulls": nulls,
    "ranks": ranks,
}

if __name__ == "__main__":
    cli.run(main)
