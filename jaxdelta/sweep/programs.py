"""The two programs of a pass: one layer on a block of windows, and the final norm after the last layer.

`layer_step` and `final_norm_step` are plain functions; `layer_program` and `final_norm_program` compile them,
once per process, for the devices of a run.

Axes: B windows of a block, T tokens of each, D hidden size; m selected tokens of the B·T, p with a loss.
"""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from jaxdelta.model.attention import Context
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.decoder import final_norm
from jaxdelta.sweep.devices import DATA, WHOLE
from jaxdelta.sweep.mesh import Devices
from jaxdelta.utils.arrays import AnyArray


class Update(NamedTuple):
    """The outputs of a layer's attention and MLP, and the residual stream h entering it, for n tokens."""

    attention: Float32[Array, "n d"]
    mlp: Float32[Array, "n d"]
    h: Float32[Array, "n d"]

    @property
    def delta(self) -> Float32[AnyArray, "n d"]:
        """The layer's update δ = attention + mlp."""
        return self.attention + self.mlp


class Ends(NamedTuple):
    """A block's states before the first and the last layer and after the last, and the sum of all updates."""

    first: Float[Array, "B T D"]
    entered: Float[Array, "B T D"]
    last: Float[Array, "B T D"]
    written: Float32[Array, "B T D"]


@cache
def layer_program(devices: Devices, graph: Any, all_tokens: bool) -> Any:
    """The compiled `(layer, h, written, context, rows) -> (h, written, Update)`; it consumes `written`.

    With `all_tokens` (`rows` is None) the Update has all tokens of the block and stays split over the
    devices; otherwise it has the tokens `rows`, whole on every device. Each device computes its own windows,
    even when it sorts tokens by expert: devices wait for each other only in sums over `model`.
    """

    def program(layer: nnx.State, h: Array, written: Array, context: Context, rows: Any) -> Any:
        positions = None if context.positions is None else DATA
        specs = dataclasses.replace(context, rotary=WHOLE, window=WHOLE, positions=positions)
        step = devices.shard_map(partial(layer_step, graph), (WHOLE, DATA, DATA, specs), DATA)
        h, written, update = step(layer, h, written, context)
        return h, written, jax.tree.map(partial(_select, rows=rows), update)

    return devices.jit(program, (DATA, DATA, DATA if all_tokens else WHOLE), donate_argnums=2)


def layer_step(
    graph: Any, layer: nnx.State, h: Float[Array, "B T D"], written: Float32[Array, "B T D"], context: Context
) -> tuple[Float[Array, "B T D"], Float32[Array, "B T D"], Update]:
    """One layer, given as its nnx.GraphDef and parameters, on a block of windows.

    Returns the residual stream after the layer, the sum `written` of all updates including this one, and the
    update of all B·T tokens.
    """
    new, attention, mlp = nnx.merge(graph, layer)(h, context)
    update = Update(*map(_flat, (attention, mlp, h.astype(jnp.float32))))
    return new, written + (attention + mlp), update


@cache
def final_norm_program(devices: Devices, all_tokens: bool) -> Any:
    """The compiled `final_norm_step`; `all_tokens` as in `layer_program`."""
    outputs = WHOLE, DATA if all_tokens else WHOLE, WHOLE, WHOLE
    return devices.jit(final_norm_step, outputs, static_argnames="config")


def final_norm_step(
    ends: Ends,
    attention: Float32[Array, "m D"],
    weight: Float[Array, " D"],
    rows: Int32[Array, " m"] | None,
    loss_positions: Int32[Array, " p"],
    *,
    config: ModelConfig,
) -> tuple[Float32[Array, "p D"], Update, Float32[Array, ""], Float32[Array, ""]]:
    """The final norm of a block, and the terms of its closure error.

    `attention` is the output of the last layer's attention for the tokens `rows` of its Update; None for all.

    Returns:
        The normed states of `loss_positions`; the last layer's Update to the state after the norm, whose
        change counts as the MLP's; ‖h_0 + Σδ - h_N‖²; ‖h_N‖².
    """
    normed = final_norm(config, weight, ends.last)
    first, entered, last = (state.astype(jnp.float32) for state in ends[:3])
    change = _select(_flat(normed - entered), rows)
    update = Update(attention, change - attention, _select(_flat(entered), rows))
    missing, energy = jnp.sum(jnp.square(first + ends.written - last)), jnp.sum(jnp.square(last))
    return _select(_flat(normed), loss_positions), update, missing, energy


def _flat(x: Float[Array, "B T D"]) -> Float[Array, "n D"]:
    return x.reshape(-1, x.shape[-1])


def _select(flat: Float[Array, "n D"], rows: Int32[Array, " m"] | None) -> Float[Array, "m D"]:
    return flat if rows is None else flat[rows]
