"""A single device, and the placements of arrays on a mesh.

A pass puts values on the devices of a run, fetches results and compiles functions through one of the two
`Devices`: `OneDevice` here, or `jaxdelta.sweep.mesh.DeviceMesh`. A placement is a `PartitionSpec` over the
axes of the mesh: `WHOLE` (on every device), `DATA` (windows split over `data`) or `ALL` (the first axis split
over all devices). One device ignores it.

Axes: B windows of a block, b of them on the devices of this process.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from jaxdelta.checkpoint.weights import Weights
from jaxdelta.utils.arrays import AnyArray
from jaxdelta.utils.compiling import compiler_options

AXES = ("data", "model")
WHOLE, DATA, ALL = PartitionSpec(), PartitionSpec("data"), PartitionSpec(AXES)


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """JAX's default device alone: every array is whole, and every window belongs to this process."""

    data = model = size = 1
    facts = None

    @property
    def local(self) -> list[jax.Device]:
        """The default device."""
        return jax.local_devices()[:1]

    def put(self, value: Any) -> Any:
        """A tree of arrays, or one array, on the device."""
        return jax.device_put(value)

    put_rows = put

    def put_windows(self, local: Shaped[np.ndarray, "B ..."]) -> Shaped[Array, "B ..."]:
        """A block on the device; a copy."""
        return jax.device_put(local, may_alias=False)

    def fetch(self, array: Shaped[AnyArray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The array on the host."""
        return np.asarray(array)

    def local_windows(self, windows: Shaped[np.ndarray, "B ..."]) -> Shaped[np.ndarray, "B ..."]:
        """All windows."""
        return windows

    def layer(self, weights: Weights, index: int) -> nnx.State:
        """`weights.layer`."""
        return weights.layer(index)

    def abstract_layer(self, weights: Weights, index: int) -> nnx.State:
        """`weights.abstract_layer`."""
        return weights.abstract_layer(index)

    def abstract_windows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Shape and dtype."""
        return jax.ShapeDtypeStruct(shape, dtype)

    def shard_map(
        self, function: Callable[..., Any], inputs: Any, outputs: Any, over: PartitionSpec = DATA
    ) -> Callable[..., Any]:
        """The function itself."""
        return function

    def jit(self, function: Callable[..., Any], outputs: Any, **options: Any) -> Any:
        """The compiled function."""
        return jax.jit(function, compiler_options=compiler_options(), **options)
