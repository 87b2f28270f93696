"""What a result says of its own run: with what it was made, in which time, and its checks."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from jaxdelta._version import __version__
from jaxdelta.run.context import RunContext
from jaxdelta.statistics.layer_row import LayerRecord
from jaxdelta.sweep.sweep import PassResult
from jaxdelta.text.tokens import Tokens

FEW_DOCUMENTS = 10
VERSIONED = ("jax", "jaxlib", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class SpectrumChecks:
    """The largest defect of all spectra, and the rows of which NumPy had to do some again."""

    certificate: float
    on_host: list[int]

    @classmethod
    def of(cls, layers: Sequence[LayerRecord]) -> "SpectrumChecks":
        """Of all layers."""
        again = [layer.on_host for layer in layers]
        return cls(max(layer.certificate for layer in layers), np.flatnonzero(again).tolist())


def run_record(run: RunContext, found: PassResult, spectra: SpectrumChecks) -> dict[str, Any]:
    """The `run` of a result, without the seconds of its stages."""
    options, plan, tokens = run.options, run.plan, run.sample.tokens
    assert plan is not None
    return {
        "versions": versions(),
        "device": device(),
        "mesh": run.devices.facts,
        "model_type": run.weights.config.model_type,
        "weights_dtype": run.weights.config.dtype,
        "compute_dtype": options.compute_dtype,
        "residual_dtype": options.residual_dtype,
        "last_state": options.last_state,
        "flags": dataclasses.asdict(options),
        "text_fingerprint": tokens.fingerprint,
        "text": {
            "layout": options.layout,
            "windows": len(tokens.ids),
            "window_length": tokens.ids.shape[1],
            "padding": tokens.padding,
        },
        "memory": {"mode": plan.mode, **plan.blocks._asdict(), "bytes": plan.parts, "limit": plan.limit},
        "closure_error": found.closure_error,
        "calibration_loss": found.loss,
        "loss_tokens": found.loss_tokens,
        "certificate": spectra.certificate,
        "rows_on_host": spectra.on_host,
        **document_facts(tokens),
    }


def document_facts(tokens: Tokens) -> dict[str, Any]:
    """How many documents have tokens that count, and whether they are few for intervals."""
    documents = len(np.unique(tokens.documents[tokens.counted]))
    return {"documents": documents, "few_documents": documents < FEW_DOCUMENTS}


def versions() -> dict[str, str]:
    """Of this package and of those that a figure may depend on."""
    return {"jaxdelta": __version__, **{package: metadata.version(package) for package in VERSIONED}}


def device() -> str:
    """The first device's kind and backend."""
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def pass_times(seconds: Mapping[str, float]) -> str:
    """What bound the pass: the layers wait where reading is slower than computing, or the disk they are kept
    on is."""
    bounds = {"compute": "computing", "wait": "reading", "keep": "keeping"}
    told = [what for what in (*bounds, "loss") if what in seconds]
    own = ", ".join(f"{what} {seconds[what]:.2f} s" for what in told)
    beside = ", ".join(f"{what} {seconds[what]:.2f} s" for what in ("read", "transfer", "spectra"))
    bound = max(set(bounds) & set(told), key=lambda what: seconds[what])
    return f"{own}; beside them {beside}: bound by {bounds[bound]}"
