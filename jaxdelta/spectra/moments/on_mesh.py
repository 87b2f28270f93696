"""Moments on a mesh: each device sums over its own windows; per layer there is one sum over devices.

Axes: as in `sums`.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxdelta.spectra.moments.kernels import MomentKernels
from jaxdelta.spectra.moments.sums import BlockTokens, Moments, add_block, find_frame
from jaxdelta.spectra.token_table import state_products
from jaxdelta.sweep.devices import ALL, WHOLE
from jaxdelta.sweep.mesh import DeviceMesh
from jaxdelta.sweep.sweep import Update


def mesh_kernels(devices: DeviceMesh) -> MomentKernels:
    """The functions of an update split over devices; results for the host are copied to all processes."""

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
    def zeros() -> Moments:
        one = Moments.zeros(*shape)
        return jax.tree.map(lambda x: jnp.zeros((devices.mesh.size, *x.shape), x.dtype), one)

    return jax.jit(zeros, out_shardings=devices.sharding(ALL))()


def _sum_of_devices(moments: Moments) -> Moments:
    return jax.tree.map(lambda part: part.sum(axis=0), moments)


def _in_turn(
    devices: DeviceMesh, turns: Iterator[int], total: Callable[..., Any], moments: Moments
) -> Moments:
    """The total over all devices, on the device whose turn it is."""
    turn = next(turns) % len(devices.local)
    return jax.tree.map(lambda part: part.addressable_data(turn), total(moments))


def _add_block(devices: DeviceMesh) -> Callable[..., Any]:
    """`sums.add_block` for the windows of each device; a leading axis of the moments counts the devices."""

    def add(moments: Moments, frame: Any, update: Update, tokens: BlockTokens, parts: tuple[str, ...]) -> Any:
        def local(moments: Moments, frame: Any, update: Update, tokens: BlockTokens) -> Any:
            moments = jax.tree.map(lambda part: part[0], moments)
            moments, coordinates = add_block(moments, frame, update, tokens, parts)
            return jax.tree.map(lambda part: part[None], moments), coordinates

        outputs = ALL, PartitionSpec(None, *ALL)
        return devices.shard_map(local, (ALL, WHOLE, ALL, ALL), outputs, ALL)(moments, frame, update, tokens)

    outputs = devices.sharding(ALL), devices.replicated
    compiled = jax.jit(add, static_argnums=4, donate_argnums=0, out_shardings=outputs)

    def run(moments: Moments, frame: Any, update: Update, tokens: BlockTokens, parts: tuple[str, ...]) -> Any:
        return compiled(moments, devices.put(frame), update, devices.put(tokens), parts)

    return run
