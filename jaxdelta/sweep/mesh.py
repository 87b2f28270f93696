"""Several devices, several hosts: a mesh of `data` × `model`, what lies where on it, and JAX's processes.

The tokens are split over `data`, a layer's weights over `model`: the projections out of the stream by their
outputs, those into it by their inputs, so that a sublayer's only sum over devices is of what it writes
(Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053). Experts are split inside, each like a dense MLP; norms
and routers are everywhere. Every process runs this program on the same text and options; a process holds the
windows and the shares of weights that its own devices need, and launches the same programs in the same order.
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from jaxdelta.errors import JaxDeltaError, UsageError, first_line
from jaxdelta.model.config import ModelConfig
from jaxdelta.utils.arrays import AnyArray

AXES = ("data", "model")
WHOLE, DATA, ALL = PartitionSpec(), PartitionSpec("data"), PartitionSpec(AXES)
_OUT, _IN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
_HEARTBEAT = 30  # seconds after which a process that is not heard of is given up, and all with it


@dataclasses.dataclass(frozen=True)
class Grid:
    """A mesh of devices; of `data` × `model`, in the order of processes."""

    mesh: Mesh

    @property
    def data(self) -> int:
        """How many groups of devices share the windows."""
        return self.mesh.shape["data"]

    @property
    def model(self) -> int:
        """How many devices share a layer's weights."""
        return self.mesh.shape["model"]

    def split(self, spec: PartitionSpec = DATA) -> NamedSharding:
        """By windows, or as the specification says."""
        return NamedSharding(self.mesh, spec)

    @property
    def facts(self) -> dict[str, int]:
        """Its sizes, and the number of processes."""
        return {"data": self.data, "model": self.model, "processes": jax.process_count()}

    @cached_property
    def everywhere(self) -> NamedSharding:
        """The whole on each device."""
        return self.split(WHOLE)

    @cached_property
    def local(self) -> list[jax.Device]:
        """This process' devices."""
        return [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]

    @cached_property
    def own(self) -> range:
        """Which of `data` parts of a block of windows this process has."""
        places = self.split().addressable_devices_indices_map((self.data,)).values()
        rows = [range(*place[0].indices(self.data)) for place in places if place is not None]
        return range(min(row.start for row in rows), max(row.stop for row in rows))

    def mine(self, windows: Shaped[np.ndarray, "B ..."]) -> Shaped[np.ndarray, "b ..."]:
        """This process' windows of a block."""
        share = len(windows) // self.data
        return windows[self.own.start * share : self.own.stop * share]

    def to_devices(self, mine: Shaped[np.ndarray, "b ..."]) -> Shaped[Array, "B ..."]:
        """The block of which these are this process' windows; in memory of its own."""
        share = len(mine) // len(self.own)
        first, count = self.own.start * share, self.data * share

        def part(index: Any) -> np.ndarray:
            rows = range(*index[0].indices(count))
            return mine[rows.start - first : rows.stop - first].copy()

        return jax.make_array_from_callback((count, *mine.shape[1:]), self.split(), part)

    def to_host(self, block: Shaped[AnyArray, "B ..."]) -> Shaped[np.ndarray, "b ..."]:
        """This process' windows of a block; what is on the host are they."""
        if isinstance(block, np.ndarray):
            return block
        parts = {shard.index[0].start or 0: shard.data for shard in block.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    def place(
        self,
        shape: tuple[int, ...],
        spec: PartitionSpec,
        read: Callable[[tuple[slice, ...]], np.ndarray],
    ) -> Array:
        """An array of which every process can read any slice; each slice is read once."""
        held: dict[str, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            # Rows lie together on disk: of whole ones columns are taken.
            rows = (*index[:-1], slice(None)) if len(shape) > 1 else index
            if str(rows) not in held:
                held[str(rows)] = read(rows)
            return held[str(rows)][..., index[-1]] if len(shape) > 1 else held[str(rows)]

        return jax.make_array_from_callback(shape, self.split(spec), part)

    def put(self, value: Any, spec: PartitionSpec = WHOLE) -> Array:
        """An array that every process has whole."""
        if jax.process_count() == 1:
            return jax.device_put(value, self.split(spec))
        whole = np.asarray(value)
        return self.place(whole.shape, spec, lambda index: np.asarray(whole[index]))

    def over(self, spec: PartitionSpec, function: Callable[..., Any], ins: Any, outs: Any) -> Any:
        """The function on each device's part of the axes that `spec` names; the others are XLA's to split."""
        axes = {name for axis in spec for name in ((axis,) if isinstance(axis, str) else axis)}
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=ins, out_specs=outs, axis_names=axes, check_vma=False
        )


def weight_spec(path: tuple[Any, ...], ndim: int) -> PartitionSpec:
    """How a layer's weight is split, by its path in the layer, as in ("mlp", "up_proj", "weight")."""
    projection, kind = path[-2:]
    axis = None
    if projection in _OUT:
        axis = ndim - 1 if kind == "bias" else ndim - 2
    elif projection in _IN and kind == "weight":
        axis = ndim - 1
    return PartitionSpec(*("model" if axis == place else None for place in range(ndim)))


def share(path: tuple[Any, ...], leaf: Any, model: int) -> jax.ShapeDtypeStruct:
    """What a device has of a layer's weight."""
    spec = weight_spec(path, len(leaf.shape))
    sizes = zip(leaf.shape, spec, strict=True)
    return jax.ShapeDtypeStruct(
        tuple(size // model if axis == "model" else size for size, axis in sizes), leaf.dtype
    )


def make_grid(given: str | None, config: ModelConfig) -> Grid | None:
    """The devices of a run as a mesh; None where there is but one.

    Args:
        given: as in `data:2,model:4`; by default all devices on `data`. A CPU's devices, unless of several
            processes, are simulated and share its cores: by default one is used.
        config: the model whose weights are split.

    Raises:
        UsageError: the mesh is none, is not as large as the number of devices, or does not fit the model.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if given is None:
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            return None
        sizes = {"data": len(devices), "model": 1}
    else:
        sizes = parse_mesh(given)
    data, model = sizes["data"], sizes["model"]
    if data * model != len(devices):
        count = f"{len(devices)} device{'s' * (len(devices) != 1)}"
        raise UsageError(f"mesh: data:{data},model:{model} has {data * model} places, and there are {count}")
    _check_model(model, config)
    return Grid(Mesh(np.array(devices).reshape(data, model), AXES)) if len(devices) > 1 else None


def parse_mesh(given: str) -> dict[str, int]:
    """The sizes of the axes; an axis that is not named has size 1.

    Raises:
        UsageError: it names another axis, or one twice, or a size that is no positive integer.
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
    """Heads stay whole, and so does a column of an MLP."""
    sizes = {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads}
    if config.layers_of(sparse=False):
        sizes["intermediate_size"] = config.intermediate_size
    if config.experts:
        sizes["moe_intermediate_size"] = config.experts.intermediate_size
    if wrong := [f"{name} ({size})" for name, size in sizes.items() if size % model]:
        raise UsageError(f"mesh: model:{model} does not divide {', '.join(wrong)}")


def leads() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> Iterator[None]:
    """This process as one of several; must be entered before any device is touched.

    What is not given JAX finds in its environment: SLURM, Open MPI, GKE, a TPU pod. When one process fails,
    its error is told and the others end too, at once or within half a minute, as soon as they miss it.

    Raises:
        UsageError: what is given, or found, is not enough or does not fit.
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
    """Ends this process without waiting for the others, who may be waiting for it."""
    sys.stdout.flush()
    atexit.register(partial(os._exit, status))
