"""The moments of a long text on a mesh: each device adds up its own windows, one sum over devices a layer.

Axes: as in `sums`; D devices.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float64

from jaxdelta.spectra.moments.kernels import MomentKernels
from jaxdelta.spectra.moments.sums import BlockTokens, Moments, add_block, find_frame
from jaxdelta.spectra.token_table import state_products
from jaxdelta.sweep.devices import ALL, WHOLE
from jaxdelta.sweep.mesh import DeviceMesh
from jaxdelta.sweep.sweep import Update
from jaxdelta.utils.arrays import AnyArray


def mesh_kernels(devices: DeviceMesh) -> MomentKernels:
    """The functions where an update is split over devices; results for the host come to all processes."""

    def gathered(function: Any, **options: Any) -> Any:
        return jax.jit(function, out_shardings=devices.replicated, **options)

    frame = gathered(find_frame, static_argnums=2)
    turns = itertools.count()
    return MomentKernels(
        lambda *arguments: np.asarray(frame(*arguments)),
        _add_block(devices),
        gathered(state_products),
        partial(_zeros, devices),
        gathered(lambda update, places: jax.tree.map(lambda part: part[places], update)),
        partial(_in_turn, devices, turns, gathered(_sum_of_devices)),
        len(devices.local),
    )


def _zeros(devices: DeviceMesh, *shape: int) -> Moments:
    def on_each() -> Moments:
        return jax.tree.map(
            lambda x: jnp.zeros((devices.mesh.size, *x.shape), x.dtype), Moments.zeros(*shape)
        )

    return jax.jit(on_each, out_shardings=devices.sharding(ALL))()


def _sum_of_devices(moments: Moments) -> Moments:
    return jax.tree.map(lambda part: part.sum(axis=0), moments)


def _in_turn(
    devices: DeviceMesh, turns: Iterator[int], total: Callable[..., Any], moments: Moments
) -> Moments:
    """The moments of all devices on the device whose turn it is."""
    place = next(turns) % len(devices.local)
    return jax.tree.map(lambda part: part.addressable_data(place), total(moments))


def _add_block(devices: DeviceMesh) -> Callable[..., Any]:
    """`sums.add_block` of the windows of each device, with moments for each along a leading axis."""

    def add(
        moments: Moments,
        frame: Float64[AnyArray, "P p d"],
        update: Update,
        tokens: BlockTokens,
        parts: tuple[str, ...],
    ) -> Any:
        def own(mine: Moments, frame: Any, update: Update, tokens: BlockTokens) -> Any:
            mine = jax.tree.map(lambda part: part[0], mine)
            mine, coordinates = add_block(mine, frame, update, tokens, parts)
            return jax.tree.map(lambda part: part[None], mine), coordinates

        outputs = ALL, PartitionSpec(None, *ALL)
        return devices.shard_map(own, (ALL, WHOLE, ALL, ALL), outputs, ALL)(moments, frame, update, tokens)

    outputs = devices.sharding(ALL), devices.replicated
    compiled = jax.jit(add, static_argnums=4, donate_argnums=0, out_shardings=outputs)

    def run(moments: Moments, frame: Any, update: Update, tokens: BlockTokens, parts: tuple[str, ...]) -> Any:
        return compiled(moments, devices.put(frame), update, devices.put(tokens), parts)

    return run
