"""The sides of `benchmark.py throughput`: a long text through a few layers, with the moments of each.

Axes: B windows, T tokens of each, d hidden size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from jaxdelta.checkpoint.checkpoint import open_checkpoint
from jaxdelta.checkpoint.weights import InMemoryWeights
from jaxdelta.model.attention import query_block
from jaxdelta.run.memory_plan import block_tokens
from jaxdelta.spectra.moments.accumulate import MomentAccumulator, TextBlocks
from jaxdelta.spectra.moments.kernels import one_device_kernels
from jaxdelta.spectra.view_summary import MeasurementPlan
from jaxdelta.spectra.views import DEFAULT_VIEWS, parse_views
from jaxdelta.sweep.sweep import Blocks, PassPlan, Sweep
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.text.tokens import Tokens

Side = Callable[[], object]


def measuring(directory: Path, ids: Int32[np.ndarray, "B T"], dtype: str) -> Side:
    """Our pass with the moments for default views, masks and intervals, without spectra."""
    sweep, sample = _sweep(directory, ids, dtype)
    text = TextBlocks.of(sweep.counted, sample.group_of_token)
    plan = MeasurementPlan(8, views=parse_views(DEFAULT_VIEWS), resampled=True)

    def run() -> None:
        for layer in sweep:
            sums = MomentAccumulator(text, plan, one_device_kernels())
            for block, wrote in enumerate(layer):
                sums.add(block, wrote.update)
            jax.block_until_ready(sums.moments().squares)

    return run


def passing(directory: Path, ids: Int32[np.ndarray, "B T"], dtype: str) -> Side:
    """Our pass without moments."""
    sweep, _ = _sweep(directory, ids, dtype)

    def run() -> None:
        for layer in sweep:
            for wrote in layer:
                jax.block_until_ready(wrote.update)

    return run


def _sweep(directory: Path, ids: Int32[np.ndarray, "B T"], dtype: str) -> tuple[Sweep, ResamplingGroups]:
    weights = InMemoryWeights(open_checkpoint(str(directory)).load())
    tokens = Tokens(ids, np.broadcast_to(np.arange(len(ids), dtype=np.int32)[:, None], ids.shape))
    count = max(1, min(len(ids), block_tokens() // ids.shape[1]))
    blocks = Blocks(count, query_block(weights.config, ids.shape[1]))
    sweep = Sweep(weights, tokens, PassPlan(blocks, dtype, all_tokens=True))
    return sweep, ResamplingGroups.of(tokens, 200, 0)


def torch_measuring(directory: Path, ids: Int32[np.ndarray, "B T"], dtype: str) -> Side:
    """transformers' pass with all hidden states, and Σxxᵀ of the updates of each layer, its attention and its
    MLP: float32 products, float64 sums, a window at a time."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    wrote: dict[tuple[int, str], Any] = {}
    for index, layer in enumerate(model.layers):
        for name in ("self_attn", "mlp"):
            _keep_output(getattr(layer, name), wrote, (index, name))

    @torch.inference_mode()
    def run() -> None:
        sums: dict[tuple[int, str], Any] = {}
        for window in torch.from_numpy(ids.astype(np.int64)):
            states = model(window[None], output_hidden_states=True, use_cache=False).hidden_states
            parts = dict(wrote) | {(i, "update"): states[i + 1] - states[i] for i in range(len(model.layers))}
            for name, part in parts.items():
                x = part[0, 1:].float()
                sums[name] = sums.get(name, 0) + (x.T @ x).double()

    return run


def _keep_output(module: Any, kept: dict[tuple[int, str], Any], name: tuple[int, str]) -> None:
    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept[name] = output[0] if isinstance(output, tuple) else output

    module.register_forward_hook(keep)
