"""Compiled functions of a layer's update, on one device or on several."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdelta.spectra.moments.sums import Moments, add_block, find_frame
from jaxdelta.spectra.token_table import state_products
from jaxdelta.sweep.sweep import Update


@dataclasses.dataclass(frozen=True)
class MomentKernels:
    """Compiled functions of a layer's update.

    Attributes:
        find_frame: see `sums.find_frame`.
        add_block: see `sums.add_block`.
        products: see `state_products`.
        zeros: see `Moments.zeros`.
        take: selected rows of an update.
        total: sums the moments over devices and puts them on the device whose turn it is; None on one device.
        devices: number of devices that solve layers, in turn.
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
    """The functions of an update on one device."""
    return MomentKernels(
        jax.jit(find_frame, static_argnums=2),
        jax.jit(add_block, static_argnums=4, donate_argnums=0),
        jax.jit(state_products),
        Moments.zeros,
        lambda update, places: jax.tree.map(lambda part: jnp.take(part, places, axis=0), update),
    )
