"""Where a pass computes: on one device, or on a mesh of them.

The pass does not know which. It puts values on the devices, fetches results and compiles functions through an
object of the `Devices` protocol: `OneDevice` here, or `jaxdelta.sweep.mesh.DeviceMesh`.

Of a block of B windows every process holds the b windows that its own devices compute. A `PartitionSpec` over
the axes of a mesh says where an array lies: `WHOLE` (all of it on every device), `DATA` (its windows split
over the `data` axis) or `ALL` (its first axis split over all devices). One device ignores it.

Axes: B windows of a block, b of them in this process.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class Devices(Protocol):
    """The devices of a run: how values reach them, how functions are compiled for them."""

    def __hash__(self) -> int:
        """Equal devices are one key: a program is compiled once for them."""

    @property
    def data(self) -> int:
        """Number of groups of devices that share the windows of a block."""

    @property
    def model(self) -> int:
        """Number of devices that share the weights of a layer."""

    @property
    def size(self) -> int:
        """Number of devices, those of other processes included."""

    @property
    def local(self) -> list[jax.Device]:
        """The devices of this process."""

    @property
    def facts(self) -> dict[str, int] | None:
        """The sizes of the mesh and the number of processes; None for one device."""

    def put(self, value: Any) -> Any:
        """A tree of arrays, each whole on every device. Every process must give the same values."""

    def put_windows(self, local: Shaped[np.ndarray, "b ..."]) -> Shaped[Array, "B ..."]:
        """A block of windows on the devices, from the windows of this process.

        The array has memory of its own, so that it may be donated.
        """

    def put_rows(self, rows: Shaped[AnyArray, "R ..."]) -> Shaped[Array, "R ..."]:
        """A matrix on the devices, its rows split over `model` if that divides their number."""

    def fetch(self, array: Shaped[AnyArray, "..."]) -> Shaped[np.ndarray, "..."]:
        """This process' windows of a block, or the whole of a replicated array, on the host."""

    def local_windows(self, windows: Shaped[np.ndarray, "B ..."]) -> Shaped[np.ndarray, "b ..."]:
        """The windows of a block that this process holds."""

    def layer(self, weights: Weights, index: int) -> nnx.State:
        """A layer's parameters on the devices."""

    def abstract_layer(self, weights: Weights, index: int) -> nnx.State:
        """A layer's parameters as shapes, dtypes and, on a mesh, shardings."""

    def abstract_windows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """A block of windows as shape, dtype and, on a mesh, sharding."""

    def shard_map(
        self, function: Callable[..., Any], inputs: Any, outputs: Any, over: PartitionSpec = DATA
    ) -> Callable[..., Any]:
        """The function applied to each device's part of its arguments, to be called inside `jit`.

        Args:
            function: takes and returns trees of arrays.
            inputs: PartitionSpecs of the arguments, as a tree that may stop early.
            outputs: PartitionSpecs of what it returns, the same way.
            over: the axes along which the arguments are cut by hand; XLA splits the work over the others.
        """

    def jit(self, function: Callable[..., Any], outputs: Any, **options: Any) -> Any:
        """The compiled function; its inputs lie where they are when it is called or lowered.

        Args:
            function: takes and returns trees of arrays.
            outputs: PartitionSpecs of what it returns, as a tree that may stop early.
            **options: options of `jax.jit`.
        """


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """JAX's default device alone: every array is whole there, and every window is this process'."""

    data = model = size = 1
    facts = None

    @property
    def local(self) -> list[jax.Device]:
        """The default device."""
        return jax.local_devices()[:1]

    def put(self, value: Any) -> Any:
        """A tree of arrays on the device."""
        return jax.device_put(value)

    def put_windows(self, local: Shaped[np.ndarray, "B ..."]) -> Shaped[Array, "B ..."]:
        """A block of windows on the device, in memory of its own."""
        return jax.device_put(local, may_alias=False)

    def put_rows(self, rows: Shaped[AnyArray, "R ..."]) -> Shaped[Array, "R ..."]:
        """A matrix on the device."""
        return jax.device_put(rows)

    def fetch(self, array: Shaped[AnyArray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The array on the host."""
        return np.asarray(array)

    def local_windows(self, windows: Shaped[np.ndarray, "B ..."]) -> Shaped[np.ndarray, "B ..."]:
        """All windows."""
        return windows

    def layer(self, weights: Weights, index: int) -> nnx.State:
        """A layer's parameters as the weights give them."""
        return weights.layer(index)

    def abstract_layer(self, weights: Weights, index: int) -> nnx.State:
        """A layer's parameters as shapes and dtypes."""
        return weights.abstract_layer(index)

    def abstract_windows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """A block of windows as shape and dtype."""
        return jax.ShapeDtypeStruct(shape, dtype)

    def shard_map(
        self, function: Callable[..., Any], inputs: Any, outputs: Any, over: PartitionSpec = DATA
    ) -> Callable[..., Any]:
        """The function itself."""
        return function

    def jit(self, function: Callable[..., Any], outputs: Any, **options: Any) -> Any:
        """The compiled function."""
        return jax.jit(function, compiler_options=compiler_options(), **options)
