"""Several devices and several processes: a mesh of `data` × `model`, where each array lies on it, and JAX's
processes.

The windows of a block are split over `data`, the weights of a layer over `model`: the projections out of the
stream by their outputs, the projections into it by their inputs, so that the only sum over devices in a
sublayer is that of its own output (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053). Each expert is split
like a dense MLP; norms and routers are replicated. Every process runs this program on the same text with the
same options. It holds the windows and the shares of the weights that its own devices need, and launches the
same programs in the same order as the others.

Axes: as in `jaxdelta.sweep.devices`.
"""

import atexit
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from jaxdelta.checkpoint.checkpoint import Checkpoint
from jaxdelta.checkpoint.weights import Weights
from jaxdelta.errors import JaxDeltaError, UsageError, first_line
from jaxdelta.model.config import ModelConfig
from jaxdelta.sweep.devices import AXES, DATA, WHOLE, Devices, OneDevice
from jaxdelta.utils.arrays import AnyArray

_OUT, _IN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
_HEARTBEAT = 30  # seconds without a sign of life after which a process, and all others with it, is given up


@dataclasses.dataclass(frozen=True)
class DeviceMesh:
    """A mesh of devices, `data` × `model` in the order of processes. Its methods are those of `Devices`."""

    mesh: Mesh

    @property
    def data(self) -> int:
        """Number of groups of devices that share the windows of a block."""
        return self.mesh.shape["data"]

    @property
    def model(self) -> int:
        """Number of devices that share the weights of a layer."""
        return self.mesh.shape["model"]

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def facts(self) -> dict[str, int]:
        """The sizes of the mesh and the number of processes."""
        return {"data": self.data, "model": self.model, "processes": jax.process_count()}

    @cached_property
    def local(self) -> list[jax.Device]:
        """The devices of this process."""
        return [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]

    def sharding(self, spec: PartitionSpec = DATA) -> NamedSharding:
        """The sharding of an array on this mesh; by default its windows are split over `data`."""
        return NamedSharding(self.mesh, spec)

    @cached_property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that is whole on every device."""
        return self.sharding(WHOLE)

    @cached_property
    def local_rows(self) -> range:
        """Which of the `data` equal parts of a block of windows this process holds."""
        places = self.sharding().addressable_devices_indices_map((self.data,)).values()
        rows = [range(*place[0].indices(self.data)) for place in places if place is not None]
        return range(min(row.start for row in rows), max(row.stop for row in rows))

    def local_windows(self, windows: Shaped[np.ndarray, "B ..."]) -> Shaped[np.ndarray, "b ..."]:
        """The windows of a block that this process holds."""
        share = len(windows) // self.data
        return windows[self.local_rows.start * share : self.local_rows.stop * share]

    def put(self, value: Any, spec: PartitionSpec = WHOLE) -> Any:
        """A tree of arrays on the devices. Every process must give the same, whole arrays.

        Args:
            value: the tree.
            spec: how each array is split; by default it is whole on every device.
        """
        if jax.process_count() == 1:
            return jax.device_put(value, self.sharding(spec))

        def place(leaf: Any) -> Array:
            whole = np.asarray(leaf)
            return self.from_slices(whole.shape, spec, lambda index: np.asarray(whole[index]))

        return jax.tree.map(place, value)

    def put_windows(self, local: Shaped[np.ndarray, "b ..."]) -> Shaped[Array, "B ..."]:
        """A block on the devices, in memory of its own, from the windows of this process."""
        share = len(local) // len(self.local_rows)
        first, count = self.local_rows.start * share, self.data * share

        def part(index: Any) -> np.ndarray:
            rows = range(*index[0].indices(count))
            return local[rows.start - first : rows.stop - first].copy()

        return jax.make_array_from_callback((count, *local.shape[1:]), self.sharding(), part)

    def put_rows(self, rows: Shaped[AnyArray, "R ..."]) -> Shaped[Array, "R ..."]:
        """A matrix on the devices, its rows split over `model` if that divides their number."""
        return self.put(rows, PartitionSpec(None if len(rows) % self.model else "model"))

    def fetch(self, array: Shaped[AnyArray, "..."]) -> Shaped[np.ndarray, "..."]:
        """This process' windows of a block, or the whole of a replicated array, on the host."""
        if isinstance(array, np.ndarray) or array.is_fully_replicated:
            return np.asarray(array)
        parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    def from_slices(
        self, shape: tuple[int, ...], spec: PartitionSpec, read: Callable[[tuple[slice, ...]], np.ndarray]
    ) -> Array:
        """An array of which this process reads only the slices that its devices hold, each of them once.

        Args:
            shape: the shape of the whole array.
            spec: how it is split.
            read: returns the slice of the array at an index.
        """
        held: dict[str, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            # Whole rows are contiguous on disk: a device's columns are cut out of them in memory.
            rows = (*index[:-1], slice(None)) if len(shape) > 1 else index
            if str(rows) not in held:
                held[str(rows)] = read(rows)
            return held[str(rows)][..., index[-1]] if len(shape) > 1 else held[str(rows)]

        return jax.make_array_from_callback(shape, self.sharding(spec), part)

    def layer(self, weights: Weights, index: int) -> nnx.State:
        """A layer's parameters, split over `model` by `weight_spec`.

        From a checkpoint every process reads only the rows it needs. Other weights are first made whole, on
        one device of every process.
        """

        def place(path: Any, shape: tuple[int, ...], read: Callable[..., np.ndarray]) -> Array:
            return self.from_slices(shape, weight_spec(path, len(shape)), read)

        if isinstance(weights, Checkpoint):
            return weights.placed_layer(index, place)
        return _map_with_paths(
            lambda path, leaf: self.put(leaf, weight_spec(path, leaf.ndim)), weights.layer(index)
        )

    def abstract_layer(self, weights: Weights, index: int) -> nnx.State:
        """A layer's parameters as shapes, dtypes and shardings."""

        def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = self.sharding(weight_spec(path, len(leaf.shape)))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return _map_with_paths(placed, weights.abstract_layer(index))

    def abstract_windows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """A block of windows as shape, dtype and sharding."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding())

    def shard_map(
        self, function: Callable[..., Any], inputs: Any, outputs: Any, over: PartitionSpec = DATA
    ) -> Callable[..., Any]:
        """The function on each device's part along the axes named by `over`; XLA splits the other axes."""
        axes = {name for axis in over for name in ((axis,) if isinstance(axis, str) else axis)}
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, axis_names=axes, check_vma=False
        )

    def jit(self, function: Callable[..., Any], outputs: Any, **options: Any) -> Any:
        """The compiled function, whose results lie as `outputs` says."""
        return jax.jit(function, out_shardings=jax.tree.map(self.sharding, outputs), **options)


def _map_with_paths(function: Callable[[Any, Any], Any], layer: nnx.State) -> nnx.State:
    """The layer with every parameter replaced by `function(path, value)`."""
    flat = nnx.to_flat_state(layer)
    return nnx.from_flat_state(
        [(path, leaf.replace(function(path, leaf.get_value()))) for path, leaf in flat]
    )


def weight_spec(path: tuple[Any, ...], ndim: int) -> PartitionSpec:
    """How a layer's weight is split over `model`.

    Args:
        path: the weight's path in the layer, such as ("mlp", "up_proj", "weight").
        ndim: its number of axes.
    """
    projection, kind = path[-2:]
    axis = None
    if projection in _OUT:
        axis = ndim - 1 if kind == "bias" else ndim - 2
    elif projection in _IN and kind == "weight":
        axis = ndim - 1
    return PartitionSpec(*("model" if axis == place else None for place in range(ndim)))


def share(path: tuple[Any, ...], leaf: Any, model: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the part of a layer's weight that one of `model` devices holds."""
    spec = weight_spec(path, len(leaf.shape))
    sizes = zip(leaf.shape, spec, strict=True)
    return jax.ShapeDtypeStruct(
        tuple(size // model if axis == "model" else size for size, axis in sizes), leaf.dtype
    )


def make_devices(given: str | None, config: ModelConfig) -> Devices:
    """The devices of a run: a DeviceMesh, or OneDevice if there is only one to use.

    Args:
        given: the mesh, such as `data:2,model:4`; by default all devices lie on `data`. Several devices of a
            CPU are simulated and share its cores, so that by default a single process uses one of them.
        config: the model whose weights are split.

    Raises:
        UsageError: the mesh cannot be parsed, is not as large as the number of devices, or does not fit the
            model.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if given is None:
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            return OneDevice()
        sizes = {"data": len(devices), "model": 1}
    else:
        sizes = parse_mesh(given)
    data, model = sizes["data"], sizes["model"]
    if data * model != len(devices):
        count = f"{len(devices)} device{'s' * (len(devices) != 1)}"
        raise UsageError(f"mesh: data:{data},model:{model} has {data * model} places, and there are {count}")
    _check_model(model, config)
    if len(devices) == 1:
        return OneDevice()
    return DeviceMesh(Mesh(np.array(devices).reshape(data, model), AXES))


def parse_mesh(given: str) -> dict[str, int]:
    """The sizes of a mesh's axes, from text such as `data:2,model:4`; an axis that is not named has size 1.

    Raises:
        UsageError: an axis is unknown or named twice, or a size is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in given.split(","):
        axis, _, size = (word.strip() for word in part.partition(":"))
        if axis not in AXES or axis in sizes:
            raise UsageError(f"mesh: {part!r} must be data:SIZE or model:SIZE, each once")
        if not (size.isascii() and size.isdigit() and int(size)):
            raise UsageError(f"mesh: the size of {axis} must be a positive integer, not {size!r}")
        sizes[axis] = int(size)
    return dict.fromkeys(AXES, 1) | sizes


def _check_model(model: int, config: ModelConfig) -> None:
    """Raises a UsageError unless whole heads and whole columns of the MLPs can be shared out."""
    sizes = {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads}
    if config.layers_of(sparse=False):
        sizes["intermediate_size"] = config.intermediate_size
    if config.experts:
        sizes["moe_intermediate_size"] = config.experts.intermediate_size
    if wrong := [f"{name} ({size})" for name, size in sizes.items() if size % model]:
        raise UsageError(f"mesh: model:{model} does not divide {', '.join(wrong)}")


def leads() -> bool:
    """Whether this process is the one that prints, and writes the results."""
    return jax.process_index() == 0


@contextlib.contextmanager
def processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> Iterator[None]:
    """Joins this process to the others of a run; must be entered before any device is used.

    What is not given JAX takes from its environment: SLURM, Open MPI, GKE, a TPU pod. When one process fails
    it reports its error, and the others end too, within half a minute.

    Args:
        coordinator: HOST:PORT of the first process.
        count: number of processes.
        index: the number of this one, from 0.

    Raises:
        UsageError: the arguments, or what JAX found, are incomplete or do not fit.
        JaxDeltaError: the other processes cannot be reached, or one of them has ended.
    """
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UsageError(f"coordinator_address must be HOST:PORT, not {coordinator!r}")
    try:
        jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=_HEARTBEAT)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"distributed: {first_line(error)} (--coordinator_address, --num_processes, --process_id)"
        ) from error
    except RuntimeError as error:
        raise JaxDeltaError(f"distributed: the processes do not meet ({first_line(error)})") from error
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        failure = JaxDeltaError(f"another process has ended, or cannot be reached ({first_line(error)})")
        _leave(failure.status)
        raise failure from error
    except BaseException as error:
        _leave(getattr(error, "status", 1))
        raise


def _leave(status: int) -> None:
    """Ends this process at exit without waiting for the others, which may be waiting for it."""
    sys.stdout.flush()
    atexit.register(partial(os._exit, status))
