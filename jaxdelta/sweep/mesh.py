"""Several devices and several processes: a mesh of `data` × `model`, and JAX's processes.

The windows of a block are split over `data`, the weights of a layer over `model`: projections out of the
stream by their outputs, projections into it by their inputs. Then each sublayer needs one sum over devices,
of its output (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053). Each expert is split like a dense MLP;
norms and routers are replicated. Every process runs this program on the same text with the same options,
holds the windows and weights of its own devices, and launches the same programs in the same order. Axes: as
in `jaxdelta.sweep.devices`.
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
from jaxdelta.sweep.devices import AXES, DATA, WHOLE, OneDevice
from jaxdelta.utils.arrays import AnyArray

_OUT, _IN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
_HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead and the run ends


@dataclasses.dataclass(frozen=True)
class DeviceMesh:
    """A mesh of devices, `data` × `model` in the order of processes."""

    mesh: Mesh

    @property
    def data(self) -> int:
        """Size of the axis over which windows are split."""
        return self.mesh.shape["data"]

    @property
    def model(self) -> int:
        """Size of the axis over which weights are split."""
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
        """The sharding of an array on this mesh, by default of windows."""
        return NamedSharding(self.mesh, spec)

    @cached_property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that is whole on every device."""
        return self.sharding(WHOLE)

    @cached_property
    def local_rows(self) -> range:
        """The indices of this process' parts of a block, of `data` equal parts."""
        indices = self.sharding().addressable_devices_indices_map((self.data,)).values()
        rows = [range(*index[0].indices(self.data)) for index in indices if index is not None]
        return range(min(row.start for row in rows), max(row.stop for row in rows))

    def local_windows(self, windows: Shaped[np.ndarray, "B ..."]) -> Shaped[np.ndarray, "b ..."]:
        """This process' windows of a block."""
        share = len(windows) // self.data
        return windows[self.local_rows.start * share : self.local_rows.stop * share]

    def put(self, value: Any, spec: PartitionSpec = WHOLE) -> Any:
        """A tree of arrays, the same in every process, on the devices, each split by `spec`."""
        if jax.process_count() == 1:
            return jax.device_put(value, self.sharding(spec))

        def place(leaf: Any) -> Array:
            whole = np.asarray(leaf)
            return self.from_slices(whole.shape, spec, lambda index: np.asarray(whole[index]))

        return jax.tree.map(place, value)

    def put_windows(self, local: Shaped[np.ndarray, "b ..."]) -> Shaped[Array, "B ..."]:
        """A block from the windows of this process; a copy, so that it may be donated."""
        share = len(local) // len(self.local_rows)
        first, count = self.local_rows.start * share, self.data * share

        def part(index: Any) -> np.ndarray:
            rows = range(*index[0].indices(count))
            return local[rows.start - first : rows.stop - first].copy()

        return jax.make_array_from_callback((count, *local.shape[1:]), self.sharding(), part)

    def put_rows(self, rows: Shaped[AnyArray, "R ..."]) -> Shaped[Array, "R ..."]:
        """A matrix, its rows split over `model` if that divides their number."""
        return self.put(rows, PartitionSpec(None if len(rows) % self.model else "model"))

    def fetch(self, array: Shaped[AnyArray, "..."]) -> Shaped[np.ndarray, "..."]:
        """This process' windows of a block, or a replicated array, on the host."""
        if isinstance(array, np.ndarray) or array.is_fully_replicated:
            return np.asarray(array)
        parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    def from_slices(
        self, shape: tuple[int, ...], spec: PartitionSpec, read: Callable[[tuple[slice, ...]], np.ndarray]
    ) -> Array:
        """An array of the given whole shape, split by `spec`; reads this process' slices only, each once."""
        held: dict[str, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            # Whole rows are contiguous on disk; a device's columns are cut out of them in memory.
            rows = (*index[:-1], slice(None)) if len(shape) > 1 else index
            if str(rows) not in held:
                held[str(rows)] = read(rows)
            return held[str(rows)][..., index[-1]] if len(shape) > 1 else held[str(rows)]

        return jax.make_array_from_callback(shape, self.sharding(spec), part)

    def layer(self, weights: Weights, index: int) -> nnx.State:
        """A layer's parameters, split by `weight_spec`.

        From a checkpoint every process reads only the rows it needs; other weights are first put whole on one
        device of every process.
        """

        def place(path: Any, shape: tuple[int, ...], read: Callable[..., np.ndarray]) -> Array:
            return self.from_slices(shape, weight_spec(path, len(shape)), read)

        if isinstance(weights, Checkpoint):
            return weights.placed_layer(index, place)
        layer = weights.layer(index)
        return _map_with_paths(lambda path, leaf: self.put(leaf, weight_spec(path, leaf.ndim)), layer)

    def abstract_layer(self, weights: Weights, index: int) -> nnx.State:
        """A layer's parameters as shapes, dtypes and shardings."""

        def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = self.sharding(weight_spec(path, len(leaf.shape)))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return _map_with_paths(placed, weights.abstract_layer(index))

    def abstract_windows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """A block as shape, dtype and sharding."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding())

    def shard_map(
        self, function: Callable[..., Any], inputs: Any, outputs: Any, over: PartitionSpec = DATA
    ) -> Callable[..., Any]:
        """The function on each device's part along the axes `over`, to be called inside `jit`.

        `inputs` and `outputs` are the PartitionSpecs of arguments and results, as prefixes of their trees.
        XLA splits the work over the other axes.
        """
        axes = {name for axis in over for name in ((axis,) if isinstance(axis, str) else axis)}
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, axis_names=axes, check_vma=False
        )

    def jit(self, function: Callable[..., Any], outputs: Any, **options: Any) -> Any:
        """The compiled function, its results split by `outputs`; its inputs stay where they are."""
        return jax.jit(function, out_shardings=jax.tree.map(self.sharding, outputs), **options)


Devices = OneDevice | DeviceMesh  # equal devices share compiled programs


def _map_with_paths(function: Callable[[Any, Any], Any], layer: nnx.State) -> nnx.State:
    """The layer with every parameter replaced by `function(path, value)`."""
    flat = nnx.to_flat_state(layer)
    return nnx.from_flat_state(
        [(path, leaf.replace(function(path, leaf.get_value()))) for path, leaf in flat]
    )


def weight_spec(path: tuple[Any, ...], ndim: int) -> PartitionSpec:
    """The split over `model` of a layer's weight, by its path, as in ("mlp", "up_proj", "weight")."""
    projection, kind = path[-2:]
    axis = None
    if projection in _OUT:
        axis = ndim - 1 if kind == "bias" else ndim - 2
    elif projection in _IN and kind == "weight":
        axis = ndim - 1
    return PartitionSpec(*("model" if axis == i else None for i in range(ndim)))


def share(path: tuple[Any, ...], leaf: Any, model: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the part of a layer's weight that one of `model` devices holds."""
    spec = weight_spec(path, len(leaf.shape))
    sizes = zip(leaf.shape, spec, strict=True)
    return jax.ShapeDtypeStruct(
        tuple(size // model if axis == "model" else size for size, axis in sizes), leaf.dtype
    )


def make_devices(given: str | None, config: ModelConfig) -> Devices:
    """The devices of a run: a DeviceMesh, or OneDevice if only one is used.

    `given` is a mesh such as `data:2,model:4`; by default all devices are on `data`. Several devices of a CPU
    are simulated and share its cores, so by default a single process uses one of them.

    Raises:
        UsageError: the mesh cannot be parsed, or does not fit the number of devices or the model.
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
    """The sizes of a mesh's axes, from text such as `data:2,model:4`; an axis not given has size 1.

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
    """Raises a UsageError unless `model` divides the heads and the widths of the MLPs."""
    sizes = {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads}
    if config.layers_of(sparse=False):
        sizes["intermediate_size"] = config.intermediate_size
    if config.experts:
        sizes["moe_intermediate_size"] = config.experts.intermediate_size
    if wrong := [f"{name} ({size})" for name, size in sizes.items() if size % model]:
        raise UsageError(f"mesh: model:{model} does not divide {', '.join(wrong)}")


def leads() -> bool:
    """Whether this process prints and writes the results."""
    return jax.process_index() == 0


@contextlib.contextmanager
def processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> Iterator[None]:
    """Joins this process, number `index` of `count`, to a run; must be entered before any device is used.

    `coordinator` is HOST:PORT of process 0. By default JAX takes all three from its environment: SLURM, Open
    MPI, GKE, a TPU pod. When a process fails it reports its error, and the others end within half a minute.

    Raises:
        UsageError: the arguments, or those from the environment, are incomplete or do not fit.
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
    """Makes exit not wait for the other processes, which may be waiting for this one."""
    sys.stdout.flush()
    atexit.register(partial(os._exit, status))
