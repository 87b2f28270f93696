"""Weights on disk -> parameters: safetensors read directly, Orbax's, everything else through PyTorch.

The model's parameter tree carries Hugging Face's names, with all layers stacked: `layers.mlp.up_proj.weight`
of shape (L, F, D) is `model.layers.{0..L-1}.mlp.up_proj.weight`; layers with experts are stacked apart, and
so are a layer's experts. Each stacked parameter is filled in one host buffer, so loading needs the weights'
own size and little more.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.float8 import FLOAT8, Float8, may_be_float8, scale_name, scale_shape
from jaxdelta.checkpoint.safetensors_files import open_safetensors, safetensors_files
from jaxdelta.checkpoint.source import Shape, TensorPart, TensorSource, TensorSpec, aligned
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.decoder import Decoder, abstract_block, abstract_model
from jaxdelta.model.families.registry import read_config, write_config
from jaxdelta.model.loss import VOCAB_SLICE

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
LOADERS = ("auto", "safetensors", "torch")

# Buffers that old checkpoints carry beside their weights.
_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.bias|self_attn\.masked_bias)")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: names and shapes are checked, and weights are read when asked for.

    It serves the layer-major pass as `Weights`, and loads whole as a `Decoder`.
    """

    directory: Path
    config: ModelConfig
    source: TensorSource
    float8: Float8 | None = None  # what `source` shows multiplied out

    def layer(self, index: int) -> nnx.State:
        """One layer's parameters, on the device."""
        return self._layer(index, lambda path, shape, parts: self._read(shape, parts))

    def placed_layer(self, index: int, place: Callable[..., Any]) -> nnx.State:
        """The same by `place(path, shape, read)`, which asks `read` for the slices it needs."""
        return self._layer(
            index, lambda path, shape, parts: place(path, shape, partial(self._read_part, shape, parts))
        )

    def abstract_layer(self, index: int) -> nnx.State:
        """The same with shapes in place of weights."""
        return self._layer(index, lambda _, shape, parts: jax.ShapeDtypeStruct(shape, self._dtype(parts)))

    def _layer(self, index: int, fill: Callable[[Any, Shape, list[TensorPart]], Any]) -> nnx.State:
        def filled(path: Any, shape: Shape) -> Any:
            return fill(path, shape, list(_layer_parts(index, path, self.config)))

        return nnx.from_flat_state(
            [
                (path, variable.replace(filled(path, variable.shape)))
                for path, variable in _flat_block(self.config, sparse=self.config.is_sparse(index))
            ]
        )

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The input embeddings of the given tokens; only their rows are read."""
        return self._rows(EMBEDDING, ids)

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The output embeddings of the given tokens."""
        return self._rows(self._head, ids)

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        """Rows start..stop-1 of the output embedding."""
        return jax.device_put(self.source.read(self._head, start, stop), may_alias=True)

    def final_norm(self) -> Float[Array, " D"]:
        """The final RMSNorm's weight."""
        return jax.device_put(self.source.read("model.norm.weight"))

    @property
    def names(self) -> list[str]:
        """The tensors the model is made of, layer by layer."""
        return sorted(_shapes(self.config), key=_natural)

    def first_bad_tensor(self) -> str | None:
        """The name of the first tensor that holds a NaN or an infinity, if any."""
        for name in sorted(self.source.specs, key=_natural):
            if not np.isfinite(self.source.read(name).astype(np.float32)).all():
                return name
        return None

    def load(self, sharding: Placement | None = None) -> Decoder:
        """The whole model, each stacked parameter filled in one host buffer, or in one for each shard.

        Args:
            sharding: (name, shape) of a parameter -> its sharding; the name is the module tree's, as in
                `layers.mlp.up_proj.weight`, whose first axis are the layers. None: the default device.
        """
        graph, state = nnx.split(abstract_model(self.config))
        filled = []
        for path, variable in nnx.to_flat_state(state):
            shape, parts = variable.shape, list(_parts(path, self.config))
            if sharding is None:
                array = self._read(shape, parts)
            else:
                wanted = sharding(".".join(map(str, path)), shape)
                array = jax.make_array_from_callback(shape, wanted, partial(self._read_part, shape, parts))
            filled.append((path, variable.replace(array)))
        return nnx.merge(graph, nnx.from_flat_state(filled))

    def _read(self, shape: Shape, parts: list[TensorPart]) -> Array:
        """A parameter on the device, its parts read straight into one host buffer."""
        if self.float8 and all(self.float8.holds(name) for name, _ in parts):
            return self.float8.read(shape, parts)
        return jax.device_put(self._read_part(shape, parts, (slice(None),) * len(shape)), may_alias=True)

    def _read_part(self, shape: Shape, parts: list[TensorPart], index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a parameter: only the layers, experts and rows that it has are read."""
        wanted = [range(*axis.indices(size)) for axis, size in zip(index, shape, strict=True)]
        buffer = aligned(tuple(map(len, wanted)), self._dtype(parts))
        for name, place in parts:
            if not all(at in axis for at, axis in zip(place, wanted, strict=False)):
                continue
            out = buffer[tuple(at - axis.start for at, axis in zip(place, wanted, strict=False))]
            if out.shape == self.source.specs[name].shape:
                self.source.read_into(name, out)
            else:
                rows, rest = wanted[len(place)], index[len(place) + 1 :]
                out[:] = self.source.read(name, rows.start, rows.stop)[:, *rest]
        return buffer

    def _dtype(self, parts: list[TensorPart]) -> np.dtype:
        return np.result_type(*{self.source.specs[name].dtype for name, _ in parts})

    @property
    def _head(self) -> str:
        return EMBEDDING if self.config.tie_embeddings else HEAD

    def _rows(self, name: str, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        unique, place = np.unique(ids, return_inverse=True)
        rows = np.concatenate([self.source.read(name, i, i + 1) for i in unique.tolist()])
        return jax.device_put(rows[place.reshape(ids.shape)])


def open_checkpoint(model: str, *, revision: str | None = None, loader: str = "auto") -> Checkpoint:
    """Opens a checkpoint and checks that its tensors are those its configuration needs.

    Args:
        model: `demo`, a local directory, or a hub id.
        revision: branch, tag or commit of a hub id.
        loader: `safetensors`, `torch` (transformers' PyTorch model and its state dict: .bin files, GGUF,
            other quantised formats), or `auto`: safetensors where there are any, else Orbax's.

    Raises:
        JaxDeltaError: whatever is wrong with the directory, its files or their tensors, all names given.
        UsageError: an unknown loader.
    """
    if loader not in LOADERS:
        raise UsageError(f"loader must be one of {', '.join(LOADERS)}, not {loader!r}")
    directory = hub.resolve(model, revision)
    files = safetensors_files(directory)
    if loader == "safetensors" and not files:
        raise JaxDeltaError(f"{directory}: has no {hub.WEIGHTS} and no {hub.INDEX}; try --loader=auto")
    if loader == "auto" and not files and (directory / hub.ORBAX).is_dir():
        from jaxdelta.checkpoint.orbax_files import open_orbax

        config = read_config(directory / hub.CONFIG)
        source = open_orbax(directory / hub.ORBAX)
    elif loader == "torch" or not files:
        from jaxdelta.checkpoint.torch_files import torch_source

        config, source = torch_source(directory)
    else:
        config = read_config(directory / hub.CONFIG)
        source = open_safetensors(files)
    if config.tie_embeddings and _has_own_head(source):
        config = dataclasses.replace(config, tie_embeddings=False)
    _check_dtypes(config, source.specs, directory)
    _check_names(config, source.specs, directory)
    if config.weight_block is None:
        return Checkpoint(directory, config, source)
    float8 = Float8(source, config.weight_block)
    return Checkpoint(directory, dataclasses.replace(config, weight_block=None), float8.plain(), float8)


def load_model(
    model: str | Path,
    *,
    revision: str | None = None,
    loader: str = "auto",
    sharding: Placement | None = None,
) -> Decoder:
    """Loads a whole checkpoint; the weights keep the dtype they have on disk.

    >>> model = jaxdelta.load_model("demo")
    >>> model.config.num_layers, model.config.hidden_size
    (28, 128)

    Arguments and errors are those of `open_checkpoint`, and `sharding` is that of `Checkpoint.load`.
    """
    return open_checkpoint(str(model), revision=revision, loader=loader).load(sharding)


def save_model(model: Decoder, directory: Path) -> None:
    """Writes config.json and model.safetensors in Hugging Face's layout, in the weights' own dtype."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...])
        for name, place in _parts(path, model.config):
            tensors[name] = np.ascontiguousarray(value[place])
    save_file(tensors, directory / hub.WEIGHTS, metadata={"format": "pt"})
    dtype = model.embed_tokens.weight[...].dtype
    config = dataclasses.replace(model.config, dtype=str(dtype))
    write_config(config, directory / hub.CONFIG)


@cache
def _flat_block(config: ModelConfig, *, sparse: bool) -> list[tuple[Any, Any]]:
    return list(nnx.to_flat_state(nnx.state(abstract_block(config, sparse=sparse))))


def _parts(path: tuple[Any, ...], config: ModelConfig) -> Iterator[TensorPart]:
    """The tensors that a parameter consists of, by Hugging Face's names."""
    if path[0] not in ("layers", "sparse_layers"):
        yield ("" if path[0] == "lm_head" else "model.") + ".".join(path), ()
        return
    for row, index in enumerate(config.layers_of(sparse=path[0] == "sparse_layers")):
        for name, place in _layer_parts(index, path[1:], config):
            yield name, (row, *place)


def _shapes(config: ModelConfig) -> dict[str, Shape]:
    """The tensors that a model is made of, by Hugging Face's names."""
    return {
        name: variable.shape[len(place) :]
        for path, variable in nnx.to_flat_state(nnx.state(abstract_model(config)))
        for name, place in _parts(path, config)
    }


def _layer_parts(index: int, path: tuple[Any, ...], config: ModelConfig) -> Iterator[TensorPart]:
    """The same for a parameter of one layer: one tensor, or one for each expert."""
    prefix = f"model.layers.{index}."
    if path[:2] != ("mlp", "experts") or config.experts is None:
        yield prefix + ".".join(path), ()
        return
    for expert in range(config.experts.count):
        yield f"{prefix}mlp.experts.{expert}." + ".".join(path[2:]), (expert,)


def _has_own_head(source: TensorSource) -> bool:
    """transformers 5 ties a head that is on disk only to an equal embedding, whatever config.json says."""
    if HEAD not in source.specs or EMBEDDING not in source.specs:
        return False
    if source.specs[HEAD] != source.specs[EMBEDDING]:
        return True
    for start in range(0, source.specs[HEAD].shape[0], VOCAB_SLICE):
        head, embedding = (source.read(name, start, start + VOCAB_SLICE) for name in (HEAD, EMBEDDING))
        if not np.array_equal(head.view(np.uint8), embedding.view(np.uint8)):
            return True
    return False


def _check_dtypes(config: ModelConfig, found: Mapping[str, TensorSpec], directory: Path) -> None:
    """Float8 means something only with scales, and scales belong to the layers' projections."""
    for name, spec in found.items():
        if spec.dtype == FLOAT8 and not (config.weight_block and may_be_float8(name)):
            raise JaxDeltaError(
                f"{directory}: {name} has dtype F8_E4M3, which jaxdelta reads only in the projections of a "
                f"checkpoint whose {hub.CONFIG} says how they are quantised; try --loader=torch"
            )


def _check_names(config: ModelConfig, found: Mapping[str, TensorSpec], directory: Path) -> None:
    """Every name and shape must be as the configuration says, both ways; one error tells all that are not."""
    wanted = _shapes(config)
    if config.weight_block:
        wanted |= {
            scale_name(name): scale_shape(shape, config.weight_block)
            for name, shape in wanted.items()
            if name in found and found[name].dtype == FLOAT8
        }
    extra = {name for name in set(found) - set(wanted) if not _DERIVED.fullmatch(name)}
    if config.tie_embeddings:
        extra.discard(HEAD)
    wrong = [
        f"{name} is {found[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    problems = [
        f"{what}: {', '.join(sorted(names, key=_natural))}"
        for what, names in (
            ("missing", set(wanted) - set(found)),
            ("unexpected", extra),
            ("wrong shape", wrong),
        )
        if names
    ]
    if problems:
        raise JaxDeltaError(f"{directory}: the weights do not fit {hub.CONFIG}: {'; '.join(problems)}")


def _natural(name: str) -> list[Any]:
    """Sorts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
