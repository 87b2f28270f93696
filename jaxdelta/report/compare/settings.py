"""Settings of compared runs (models, texts, dtypes, flags), and cautions about their differences."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxdelta.report.result import Result

# Flags with their own line, and flags that change no number.
TOLD = {"control", "revision", "last_state", "compute_dtype", "residual_dtype", "layout"}
IDLE = {"memory", "device_memory_gb", "scratch", "keep_moments", "checkpoint_dir", "mesh"}
LETTERS = 16  # of a fingerprint
CLOSE = 1.05  # ratio of tokens per dimension that needs no caution


@dataclasses.dataclass(frozen=True)
class Setting:
    """A property of each run; `chosen`: an input, not a result."""

    name: str
    values: tuple[str, ...]
    chosen: bool

    def other(self, run: int) -> bool:
        """Whether a run differs from the first in a chosen setting."""
        return self.chosen and self.values[run] != self.values[0]


def settings(runs: Sequence[Result]) -> tuple[Setting, ...]:
    """The inputs of each run, all other flags that differ, and finally the loss and the closure."""
    rows = [*map(_facts, runs)]
    flags = [run.run.get("flags", {}) for run in runs]
    for name in dict.fromkeys(name for of_run in flags for name in of_run if name not in TOLD | IDLE):
        values = [of_run.get(name) for of_run in flags]
        if any(value != values[0] for value in values):
            for row, value in zip(rows, values, strict=True):
                row[f"--{name}"] = value
    return (*_transposed(rows, chosen=True), *_transposed([*map(_outcomes, runs)], chosen=False))


def cautions(runs: Sequence[Result], labels: Sequence[str]) -> tuple[str, ...]:
    """Reasons other than the models why runs may differ."""
    return (*_about_runs(runs, labels), *_about_differences(runs))


def _facts(run: Result) -> dict[str, Any]:
    facts, flags = run.run, run.run.get("flags", {})
    versions, fingerprint = facts.get("versions", {}), facts.get("text_fingerprint")
    control = flags.get("control")
    return {
        "model": run.model,
        "revision": flags.get("revision"),
        "control": f"{control}, seed {flags.get('seed')}" if control else None,
        "layers": run.num_layers,
        "hidden size": run.hidden,
        "text, SHA-256": fingerprint and fingerprint[:LETTERS] + "…",
        "text, layout": facts.get("text", {}).get("layout"),
        "tokens": run.n_calib_tokens,
        "documents": facts.get("documents"),
        "tokens per dimension": f"{_density(run):.3g}",
        "weights": facts.get("weights_dtype"),
        "products": facts.get("compute_dtype"),
        "stream": facts.get("residual_dtype"),
        "last state": {"residual": "before the final norm", "normed": "after the final norm"}.get(
            facts.get("last_state", "")
        ),
        "jaxdelta": versions.get("jaxdelta"),
        "jax": versions.get("jax"),
        "device": facts.get("device"),
    }


def _outcomes(run: Result) -> dict[str, str]:
    loss = run.run["calibration_loss"]
    return {
        "loss (nats per token)": "–" if loss is None else f"{loss:.4f}",
        "closure ‖h₀ + Σδ − h_N‖ / ‖h_N‖": f"{run.run['closure_error']:.1e}",
    }


def _transposed(rows: Sequence[dict[str, Any]], chosen: bool) -> Iterator[Setting]:
    for name in rows[0]:
        yield Setting(name, tuple("–" if row[name] is None else str(row[name]) for row in rows), chosen)


def _about_runs(runs: Sequence[Result], labels: Sequence[str]) -> Iterator[str]:
    for run, label in zip(runs, labels, strict=True):
        flags = run.run.get("flags", {})
        if flags.get("control"):
            said = f"{flags['control']}, seed {flags['seed']}"
            yield f"{label} is a control ({said}), not a model itself."
        if not any("intervals" in row for row in run.per_layer):
            yield f"{label} has no intervals: its differences cannot be judged."
        elif run.run.get("few_documents"):
            yield f"{label} has {run.run['documents']} documents: fewer than ten, its intervals are rough."


def _about_differences(runs: Sequence[Result]) -> Iterator[str]:
    texts = [run.run.get("text_fingerprint") for run in runs]
    if None in texts:
        yield "Not all runs identify their text: a difference may be due to the text."
    elif len(set(texts)) > 1:
        yield "The runs saw different tokens: a difference may be due to the text and not to the model."
    densities = [_density(run) for run in runs]
    if max(densities) > CLOSE * min(densities):
        yield (
            f"Tokens per dimension range from {min(densities):.3g} to {max(densities):.3g}: with few of them "
            "ranks are underestimated and shares along v_L overestimated."
        )
    if len({run.hidden for run in runs}) > 1:
        yield "Hidden sizes differ: compare shares and ratios, not norms and ranks."
    dtypes = {"weights_dtype": "weights", "compute_dtype": "products", "residual_dtype": "stream"}
    for key, name in dtypes.items():
        if len({run.run.get(key) for run in runs}) > 1:
            yield f"Dtypes differ ({name}): small differences may be rounding."
    if len({run.run.get("last_state") for run in runs}) > 1:
        yield "The last layer's state is before the final norm in one run, after it in another: leave it out."


def _density(run: Result) -> float:
    """Tokens per dimension."""
    return run.per_layer[0].get("n_over_d", run.n_calib_tokens / run.hidden)
