"""Spectra on several devices: each device computes those of its own layers."""

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
    """Batches on a mesh: the first layer on the first device, and so on, and round again."""
    return Batched(at_once, partial(_call, devices), groups, devices.mesh.size, in_turn=True)


def _call(
    devices: DeviceMesh, function: Any, each: Sequence[tuple[Any, ...]], common: Any, static: Any
) -> list[Any]:
    size = devices.mesh.size
    beside = partial(_on_each, devices)
    rounds = [jax.tree.map(beside, *each[i : i + size]) for i in range(0, len(each), size)]
    common = devices.put(common)
    found = jax.tree.map(np.asarray, _spread(function, devices, rounds, common, static))
    places = itertools.product(range(len(rounds)), range(size))
    return [jax.tree.map(lambda leaf, at=(at, turn): np.asarray(leaf[at]), found) for turn, at in places]


def _on_each(devices: DeviceMesh, *leaves: Any) -> Array:
    """One layer's array on each device."""
    places = zip(leaves, devices.mesh.devices.flat, strict=True)
    own = [_on(leaf, device) for leaf, device in places if device in devices.local]
    shape = (devices.mesh.size * leaves[0].shape[0], *leaves[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, devices.sharding(ALL), own)


def _on(leaf: AnyArray, device: jax.Device) -> Array:
    if isinstance(leaf, jax.Array):
        return next(shard.data for shard in leaf.addressable_shards if shard.device == device)
    return jax.device_put(leaf, device)


@partial(jax.jit, static_argnums=(0, 1, 4))
def _spread(function: Any, devices: DeviceMesh, rounds: list[Any], common: Any, static: Any) -> Any:
    """(devices, rounds, ...) of what the function finds of each layer, on all devices."""

    def own(rounds: list[Any], common: Any) -> Any:
        def of_layer(arguments: Any) -> Any:
            return function(*arguments, *common, *static)

        if len(rounds) == 1:
            return jax.tree.map(lambda leaf: leaf[None, None], of_layer(rounds[0]))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rounds)
        return jax.tree.map(lambda leaf: leaf[None], jax.vmap(of_layer)(stacked))

    found = devices.shard_map(own, (ALL, WHOLE), ALL, ALL)(rounds, common)
    return jax.lax.with_sharding_constraint(found, devices.replicated)
