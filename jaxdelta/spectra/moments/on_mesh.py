"""TODO."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float64, Int

from jaxdelta.spectra.moments import sums
from jaxdelta.spectra.moments.accumulate import Programs
from jaxdelta.spectra.moments.sums import Bounds, Moments
from jaxdelta.spectra.token_table import state_products
from jaxdelta.sweep.mesh import ALL, WHOLE, Grid
from jaxdelta.sweep.sweep import Update
from jaxdelta.utils.arrays import AnyArray


def split_programs(grid: Grid) -> Programs:
    """What a pool runs of updates that are split; what it wants on the host comes to all processes."""
    everywhere, turns = grid.everywhere, itertools.count()

    def gathered(function: Any, **options: Any) -> Any:
        return jax.jit(function, out_shardings=everywhere, **options)

    found_frame = gathered(inspect.unwrap(sums.find_frame), static_argnums=2)

    def find_frame(*arguments: Any) -> Float64[np.ndarray, "P p d"]:
        return np.asarray(found_frame(*arguments))

    def zeros(*shape: int) -> Moments:
        def on_each() -> Moments:
            return jax.tree.map(
                lambda x: jnp.zeros((grid.mesh.size, *x.shape), x.dtype), Moments.zeros(*shape)
            )

        return jax.jit(on_each, out_shardings=grid.split(ALL))()

    total = gathered(lambda of: jax.tree.map(lambda part: part.sum(axis=0), of))

    def in_turn(of: Moments) -> Moments:
        place = next(turns) % len(grid.local)
        return jax.tree.map(lambda part: part.addressable_data(place), total(of))

    return Programs(
        find_frame,
        _split_accumulate(grid),
        gathered(state_products),
        zeros,
        gathered(lambda update, places: jax.tree.map(lambda part: part[places], update)),
        in_turn,
        len(grid.local),
    )


def _split_accumulate(grid: Grid) -> Callable[..., Any]:
    """`sums.accumulate` of the windows of each device, with moments for each along a leading axis."""

    def accumulate(
        moments_of: Moments,
        frame: Float64[AnyArray, "P p d"],
        update: Update,
        counted: Bool[AnyArray, "B T"],
        groups: Int[AnyArray, " B"],
        bounds: Bounds,
        parts: tuple[str, ...],
    ) -> Any:
        def own(mine: Moments, *others: Any) -> Any:
            mine = jax.tree.map(lambda part: part[0], mine)
            mine, *found = inspect.unwrap(sums.accumulate)(mine, *others, parts)
            return jax.tree.map(lambda part: part[None], mine), *found

        inputs = ALL, WHOLE, ALL, ALL, ALL, WHOLE
        outputs = ALL, ALL, PartitionSpec(None, *ALL), ALL
        return grid.over(ALL, own, inputs, outputs)(moments_of, frame, update, counted, groups, bounds)

    outputs = grid.split(ALL), grid.everywhere, grid.everywhere, grid.everywhere
    compiled = jax.jit(accumulate, static_argnums=6, donate_argnums=0, out_shardings=outputs)

    def run(moments_of: Moments, frame: Any, update: Update, *others: Any) -> Any:
        *arrays, parts = others
        return compiled(
            moments_of, *jax.tree.map(grid.put, (frame,)), update, *jax.tree.map(grid.put, arrays), parts
        )

    return run
