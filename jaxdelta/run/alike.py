"""What changes the numbers of a run, compared between two runs that are to be set side by side or merged."""

import dataclasses
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from jaxdelta.report.analysis import Analysis
from jaxdelta.run.context import RunContext
from jaxdelta.run.options import Options
from jaxdelta.spectra.views import parse_views

# Options that choose the text, the weights or the phases, which are compared themselves.
_COMPARED_ITSELF = (
    *("text_key", "ids_key", "split", "dataset_config", "max_tokens", "shuffle", "tokenizer", "chat"),
    *("revision", "adapter", "phases"),
)
# Options that change no statistic of a layer: method, memory, resampling, output.
_FREE = (
    *("svd", "loader", "memory", "device_memory_gb", "scratch", "mesh", "keep_moments", "checkpoint_dir"),
    *("bootstrap", "null_draws", "seed", "control"),
)
_TEXT_CONTROLS = ("shuffled_tokens", "random_tokens")


def traits(run: Analysis | RunContext) -> dict[str, Any]:
    """What the numbers of a run depend on, by name, as far as an older file says it.

    Raises:
        LookupError, TypeError, AttributeError: a damaged analysis.
    """
    phases: Sequence[str]
    known: dict[str, Any]
    if isinstance(run, RunContext):
        config, flags, phases = run.weights.config, vars(run.options), run.phases.of_layer
        sizes = config.num_layers, config.hidden_size, run.sample.tokens.count
        known = {
            "weights_dtype": config.dtype,
            "weights_fingerprint": run.identity.weights,
            "text_fingerprint": run.identity.text,
        }
    else:
        flags, phases = run.run["flags"], [row["phase"] for row in run.per_layer]
        sizes = run.num_layers, run.hidden, run.n_calib_tokens
        known = {key: run.run.get(key) for key in ("weights_dtype", "weights_fingerprint")}
        known["text_fingerprint"] = run.run.get("original_text_fingerprint")
        if flags.get("control") not in _TEXT_CONTROLS:  # then this is the original text's, too
            known["text_fingerprint"] = run.run.get("text_fingerprint")
    names = [field.name for field in dataclasses.fields(Options)]
    chosen = vars(Options()) | {name: flags[name] for name in names if name in flags}
    return {
        **dict(zip(("num_layers", "hidden", "n_calib_tokens"), sizes, strict=True)),
        **{name: chosen[name] for name in names if name not in (*_FREE, *_COMPARED_ITSELF)},
        "views": sorted(view.name for view in parse_views(chosen["views"])),
        "phases": list(phases),
        **{name: value for name, value in known.items() if value is not None},
    }


def differences(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The traits that both have and that differ, in words; empty if there are none."""
    different = [
        f"{name} is {_brief(given[name])}, not {_brief(value)}"
        for name, value in wanted.items()
        if name in given and given[name] != value
    ]
    return shorten("; ".join(different), 500, placeholder=" ...")


def _brief(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
