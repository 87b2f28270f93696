"""Spectra on several devices: each device computes those of its own layers."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdelta.sweep.mesh import ALL, WHOLE, Grid
from jaxdelta.utils.arrays import AnyArray


def spread(grid: Grid) -> Callable[..., list[Any]]:
    """How `measure` computes a batch of layers: the first on the first device, and so on, and round again."""
    size, devices = grid.mesh.size, list(grid.mesh.devices.flat)

    def beside(*leaves: Any) -> Array:
        """One layer's array on each device."""
        own = [
            _on(leaf, device) for leaf, device in zip(leaves, devices, strict=True) if device in grid.local
        ]
        shape = (size * leaves[0].shape[0], *leaves[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, grid.split(ALL), own)

    def call(function: Any, each: Sequence[tuple[Any, ...]], common: Any = (), static: Any = ()) -> list[Any]:
        filled = [*each, *[each[-1]] * (-len(each) % size)]
        rounds = [jax.tree.map(beside, *filled[i : i + size]) for i in range(0, len(filled), size)]
        found = jax.tree.map(
            np.asarray, _spread(function, grid, rounds, jax.tree.map(grid.put, common), static)
        )
        places = itertools.islice(itertools.product(range(len(rounds)), range(size)), len(each))
        return [jax.tree.map(lambda leaf, at=(at, turn): np.asarray(leaf[at]), found) for turn, at in places]

    return call


def _on(leaf: AnyArray, device: jax.Device) -> Array:
    if isinstance(leaf, jax.Array):
        return next(shard.data for shard in leaf.addressable_shards if shard.device == device)
    return jax.device_put(leaf, device)


@partial(jax.jit, static_argnums=(0, 1, 4))
def _spread(function: Any, grid: Grid, rounds: list[Any], common: Any, static: Any) -> Any:
    """(devices, rounds, ...) of what the function finds of each layer, on all devices."""

    def own(rounds: list[Any], common: Any) -> Any:
        def of_layer(arguments: Any) -> Any:
            return function(*arguments, *common, *static)

        if len(rounds) == 1:
            return jax.tree.map(lambda leaf: leaf[None, None], of_layer(rounds[0]))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rounds)
        return jax.tree.map(lambda leaf: leaf[None], jax.vmap(of_layer)(stacked))

    found = grid.over(ALL, own, (ALL, WHOLE), ALL)(rounds, common)
    return jax.lax.with_sharding_constraint(found, grid.everywhere)
