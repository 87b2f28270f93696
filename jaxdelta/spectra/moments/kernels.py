"""The compiled functions that take a layer's update apart where it lies, on one device or on several."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxdelta.spectra.moments.sums import Moments, add_block, find_frame
from jaxdelta.spectra.token_table import state_products
from jaxdelta.sweep.sweep import Update


@dataclasses.dataclass(frozen=True)
class MomentKernels:
    """Compiled functions of a layer's update.

    `find_frame`, `add_block`, `zeros` and `products` are those of `sums` and `token_table`; `take` gives rows
    of an update; `total` the moments of all devices together, on one of the `devices` that solve layers in
    turn, None where there is but one.
    """

    find_frame: Callable[..., Any]
    add_block: Callable[..., Any]
    products: Callable[[Update], dict[str, jax.Array]]
    zeros: Callable[[int, int, int], Moments]
    take: Callable[[Update, np.ndarray], Update]
    total: Callable[[Moments], Moments] | None = None
    devices: int = 1


@functools.cache
def one_device_kernels() -> MomentKernels:
    """The functions where an update lies whole on one device."""
    return MomentKernels(
        jax.jit(find_frame, static_argnums=2),
        jax.jit(add_block, static_argnums=4, donate_argnums=0),
        jax.jit(state_products),
        Moments.zeros,
        _take,
    )


def _take(update: Update, places: Int[np.ndarray, " s"]) -> Update:
    return Update(*(jnp.take(part, places, axis=0) for part in update))
