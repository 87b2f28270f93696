"""Spectra on several devices: each device solves whole layers."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdelta.spectra.scheduler import Batched
from jaxdelta.sweep.devices import ALL, WHOLE
from jaxdelta.sweep.mesh import DeviceMesh
from jaxdelta.text.groups import Groups
from jaxdelta.utils.arrays import AnyArray


def on_mesh(devices: DeviceMesh, at_once: int, groups: Groups | None) -> Batched:
    """Batches on a mesh: layer i of a batch is solved on device i modulo the number of devices."""
    return Batched(at_once, partial(_call, devices), groups, devices.mesh.size, in_turn=True)


def _call(
    devices: DeviceMesh, function: Any, each: Sequence[tuple[Any, ...]], common: Any, static: Any
) -> list[Any]:
    size = devices.mesh.size
    stack = partial(_one_per_device, devices)
    rounds = [jax.tree.map(stack, *each[i : i + size]) for i in range(0, len(each), size)]
    results = jax.tree.map(np.asarray, _spread(function, devices, rounds, devices.put(common), static))
    order = itertools.product(range(len(rounds)), range(size))
    return [jax.tree.map(lambda leaf, at=(at, turn): np.asarray(leaf[at]), results) for turn, at in order]


def _one_per_device(devices: DeviceMesh, *leaves: Any) -> Array:
    """The arrays of several layers as one, split over its first axis so that each device has one layer's."""
    pairs = zip(leaves, devices.mesh.devices.flat, strict=True)
    local = [_on(leaf, device) for leaf, device in pairs if device in devices.local]
    shape = (devices.mesh.size * leaves[0].shape[0], *leaves[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, devices.sharding(ALL), local)


def _on(leaf: AnyArray, device: jax.Device) -> Array:
    if isinstance(leaf, jax.Array):
        return next(shard.data for shard in leaf.addressable_shards if shard.device == device)
    return jax.device_put(leaf, device)


@partial(jax.jit, static_argnums=(0, 1, 4))
def _spread(function: Any, devices: DeviceMesh, rounds: list[Any], common: Any, static: Any) -> Any:
    """The function's results, (devices, rounds, ...), copied to all devices."""

    def on_device(rounds: list[Any], common: Any) -> Any:
        def of_layer(arguments: Any) -> Any:
            return function(*arguments, *common, *static)

        if len(rounds) == 1:
            return jax.tree.map(lambda leaf: leaf[None, None], of_layer(rounds[0]))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rounds)
        return jax.tree.map(lambda leaf: leaf[None], jax.vmap(of_layer)(stacked))

    results = devices.shard_map(on_device, (ALL, WHOLE), ALL, ALL)(rounds, common)
    return jax.lax.with_sharding_constraint(results, devices.replicated)
