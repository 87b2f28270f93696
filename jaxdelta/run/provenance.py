"""Provenance of a run: versions, device, options, timings and checks."""

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


def run_record(run: RunContext, outcome: PassResult, layers: Sequence[LayerRecord]) -> dict[str, Any]:
    """The field `run` of a result, without times.

    `certificate` is the largest residual of all spectra; `rows_on_host` lists the layers with spectra that
    NumPy had to recompute.
    """
    options, plan, tokens = run.options, run.plan, run.sample.tokens
    roles = tokens.roles
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
        "notes": list(run.notes),
        "weights_fingerprint": run.identity.weights,
        "text_fingerprint": tokens.fingerprint,
        "original_text_fingerprint": run.identity.text,
        "text": {
            "layout": options.layout,
            "windows": len(tokens.ids),
            "window_length": tokens.ids.shape[1],
            "padding": tokens.padding,
            "counted": int(tokens.counted.sum()),
            **({"roles": tokens.by_role, "chat_template_sha256": roles.template} if roles else {}),
        },
        "memory": {"mode": plan.mode, **plan.blocks._asdict(), "bytes": plan.parts, "limit": plan.limit},
        "closure_error": outcome.closure_error,
        "calibration_loss": outcome.loss,
        "loss_reason": None if outcome.loss is not None else "the model has no head",
        "loss_tokens": outcome.loss_tokens,
        "certificate": max(layer.certificate for layer in layers),
        "rows_on_host": [index for index, layer in enumerate(layers) if layer.on_host],
        **document_facts(tokens),
    }


def document_facts(tokens: Tokens) -> dict[str, Any]:
    """The number of documents with tokens that count, and whether it is too small for good intervals."""
    documents = len(np.unique(tokens.documents[tokens.counted]))
    return {"documents": documents, "few_documents": documents < FEW_DOCUMENTS}


def versions() -> dict[str, str]:
    """Versions of this package and of the packages that numbers may depend on."""
    return {"jaxdelta": __version__, **{package: metadata.version(package) for package in VERSIONED}}


def device() -> str:
    """The first device's kind and backend."""
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def pass_times(seconds: Mapping[str, float]) -> str:
    """The seconds of the pass, of the work concurrent with it, and what bound it."""
    bounds = {"compute": "computing", "wait": "reading", "keep": "keeping"}

    def listed(*names: str) -> str:
        return ", ".join(f"{name} {seconds[name]:.2f} s" for name in names if name in seconds)

    bound = max((name for name in bounds if name in seconds), key=lambda name: seconds[name])
    return (
        f"{listed(*bounds, 'loss')}; concurrently {listed('read', 'transfer', 'spectra')}: "
        f"bound by {bounds[bound]}"
    )
