"""Weights on disk -> parameters: safetensors, Orbax and GGUF read directly, everything else by PyTorch.

Parameters have Hugging Face's names, with all layers stacked: `layers.mlp.up_proj.weight` of shape (L, F, D)
is `model.layers.{0..L-1}.mlp.up_proj.weight`. Layers with experts are a stack of their own, as are a layer's
experts. Each stacked parameter is read into one host buffer, so loading needs little more memory than the
weights.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.adapter import Adapter, adapter_beside, open_adapter
from jaxdelta.checkpoint.directory import check_readable
from jaxdelta.checkpoint.float8 import Float8, with_scales
from jaxdelta.checkpoint.gguf_files import is_gguf, open_gguf
from jaxdelta.checkpoint.mismatch import check_dtypes, check_names, natural
from jaxdelta.checkpoint.names import causal, refuse_quantised, with_embedding
from jaxdelta.checkpoint.safetensors_files import open_safetensors, safetensors_files
from jaxdelta.checkpoint.source import EMBEDDING, HEAD, Shape, TensorPart, TensorSource, aligned
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.decoder import Decoder, abstract_block, abstract_model
from jaxdelta.model.families.inert_keys import key_names
from jaxdelta.model.families.quantisation import FLOAT8_METHODS, quantisation
from jaxdelta.model.families.registry import read_config, read_json, write_config
from jaxdelta.model.loss import VOCAB_SLICE
from jaxdelta.utils.jax_settings import check_devices

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
LOADERS = ("auto", "safetensors", "torch")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint with checked names and shapes: `Weights` for a pass, or loaded as a `Decoder`."""

    directory: Path
    config: ModelConfig
    source: TensorSource
    float8: Float8 | None = None  # the float8 tensors that `source` lists dequantised
    notes: tuple[str, ...] = ()  # what a user should know of how it was read, a sentence each
    adapter: Adapter | None = None  # the adapter that `source` applies

    def layer(self, index: int) -> nnx.State:
        """One layer's parameters, on the device."""
        return self._layer(index, lambda path, shape, parts: self._read(shape, parts))

    def placed_layer(self, index: int, place: Callable[..., Any]) -> nnx.State:
        """One layer's parameters as place(path, shape, read), where read(index) reads a slice."""
        return self._layer(
            index, lambda path, shape, parts: place(path, shape, partial(self._read_part, shape, parts))
        )

    def abstract_layer(self, index: int) -> nnx.State:
        """Shapes and dtypes of one layer's parameters."""
        return self._layer(index, lambda _, shape, parts: jax.ShapeDtypeStruct(shape, self._dtype(parts)))

    def _layer(self, index: int, fill: Callable[[Any, Shape, list[TensorPart]], Any]) -> nnx.State:
        filled = []
        for path, variable in _flat_block(self.config, sparse=self.config.is_sparse(index)):
            parts = list(_layer_parts(index, path, self.config))
            filled.append((path, variable.replace(fill(path, variable.shape, parts))))
        return nnx.from_flat_state(filled)

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The input embeddings of tokens; only their rows are read."""
        return self._rows(EMBEDDING, ids)

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The output embeddings of tokens."""
        return self._rows(self._head, ids)

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        """Rows `start` to `stop` of the output embedding."""
        return jax.device_put(self.source.read(self._head, start, stop), may_alias=True)

    def final_norm(self) -> Float[Array, " D"]:
        """The final RMSNorm's weight."""
        return jax.device_put(self.source.read("model.norm.weight"))

    @property
    def names(self) -> list[str]:
        """The model's tensors, layer by layer."""
        return sorted(_shapes(self.config), key=natural)

    def first_bad_tensor(self) -> str | None:
        """The first tensor with a NaN or an infinity, or None."""
        for name in sorted(self.source.specs, key=natural):
            if not np.isfinite(self.source.read(name).astype(np.float32)).all():
                return name
        return None

    def load(self, sharding: Placement | None = None) -> Decoder:
        """The whole model, each stacked parameter read into one host buffer, or one per shard.

        Args:
            sharding: (name, shape) of a parameter -> its sharding, with names such as
                `layers.mlp.up_proj.weight`, whose first axis is the layers. None: the default device.
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
        """A parameter on the device, its parts read into one host buffer."""
        if self.float8 and all(self.float8.holds(name) for name, _ in parts):
            return self.float8.read(shape, parts)
        return jax.device_put(self._read_part(shape, parts, (slice(None),) * len(shape)), may_alias=True)

    def _read_part(self, shape: Shape, parts: list[TensorPart], index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a parameter, for which only its layers, experts and rows are read."""
        wanted = [range(*axis.indices(size)) for axis, size in zip(index, shape, strict=True)]
        buffer = aligned(tuple(map(len, wanted)), self._dtype(parts))
        for name, stack in parts:
            if not all(i in axis for i, axis in zip(stack, wanted, strict=False)):
                continue
            out = buffer[tuple(i - axis.start for i, axis in zip(stack, wanted, strict=False))]
            if out.shape == self.source.specs[name].shape:
                self.source.read_into(name, out)
            else:
                rows, rest = wanted[len(stack)], index[len(stack) + 1 :]
                out[:] = self.source.read(name, rows.start, rows.stop)[:, *rest]
        return buffer

    def _dtype(self, parts: list[TensorPart]) -> np.dtype:
        return np.result_type(*{self.source.specs[name].dtype for name, _ in parts})

    @property
    def _head(self) -> str:
        return EMBEDDING if self.config.tie_embeddings else HEAD

    def _rows(self, name: str, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        unique, inverse = np.unique(ids, return_inverse=True)
        rows = np.concatenate([self.source.read(name, i, i + 1) for i in unique.tolist()])
        return jax.device_put(rows[inverse.reshape(ids.shape)])


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    loader: str = "auto",
    ignore_config_keys: str | None = None,
    adapter: str | None = None,
) -> Checkpoint:
    """Opens a checkpoint and checks its tensors against its configuration.

    Args:
        model: `demo`, a local directory, or a hub id.
        revision: branch, tag or commit of a hub id.
        loader: `safetensors`; `torch` (PyTorch: .bin files, and bitsandbytes, dequantised to float32); or
            `auto`, the first that fits of safetensors, Orbax, .bin files and GGUF.
        ignore_config_keys: keys of config.json, such as `a,b`, that are unknown and have no influence.
        adapter: a LoRA adapter of PEFT that is added to the weights: a local directory, or a hub id.

    Raises:
        JaxDeltaError: anything wrong with the directory, its files or their tensors, all of them named.
        UsageError: an unknown loader; a key to be ignored that is known, or not in config.json.
    """
    if loader not in LOADERS:
        raise UsageError(f"loader must be one of {', '.join(LOADERS)}, not {loader!r}")
    ignored = key_names(ignore_config_keys)
    directory = hub.resolve(model, revision)
    beside = adapter_beside(model, directory)
    config, source = _opened(directory, loader, ignored)
    checkpoint = checked(directory, config, source)
    checkpoint = dataclasses.replace(checkpoint, notes=(*beside, *checkpoint.notes))
    if adapter is None:
        return checkpoint
    opened = open_adapter(adapter)
    return _adapted(checkpoint, opened, tuple(opened.cautions(model, revision, directory)))


def checked(directory: Path, config: ModelConfig, source: TensorSource) -> Checkpoint:
    """A checkpoint of these tensors, by the names they have on disk.

    Raises:
        JaxDeltaError: they do not fit the configuration; all that differ are named.
    """
    wanted = _shapes(dataclasses.replace(config, tie_embeddings=False))
    source = causal(directory, source, wanted, config.num_layers)
    config, source = _with_head(config, source)
    if config.weight_block is not None:
        source = with_scales(source)
    check_dtypes(directory, config, source.specs, wanted)
    check_names(directory, config, source, _shapes)
    config = dataclasses.replace(config, dtype=str(source.specs[EMBEDDING].dtype))
    notes = (*config.notes, *source.notes)
    if config.weight_block is None:
        return Checkpoint(directory, config, source, notes=notes)
    float8 = Float8(source, config.weight_block)
    config = dataclasses.replace(config, weight_block=None)
    return Checkpoint(directory, config, float8.plain(), float8, notes)


def _opened(directory: Path, loader: str, ignored: Collection[str]) -> tuple[ModelConfig, TensorSource]:
    """The configuration, and the tensors by their names on disk, by the first loader that fits."""
    files = safetensors_files(directory)
    if loader == "safetensors" and not files:
        check_readable(directory)
        raise JaxDeltaError(f"{directory}: has no {hub.WEIGHTS} and no {hub.INDEX}; try --loader=auto")
    if loader == "auto" and not files and (directory / hub.ORBAX).is_dir():
        from jaxdelta.checkpoint.orbax_files import open_orbax

        return read_config(directory / hub.CONFIG, ignored), open_orbax(directory / hub.ORBAX)
    if not files and is_gguf(directory):
        return open_gguf(directory, ignored)
    if loader == "torch" or not files:
        from jaxdelta.checkpoint.torch_files import torch_source

        check_readable(directory)
        return torch_source(directory, ignored)
    source = open_safetensors(directory, files)
    if quantisation(read_json(directory / hub.CONFIG)) not in FLOAT8_METHODS:
        refuse_quantised(directory, source.specs)
    return read_config(directory / hub.CONFIG, ignored), source


def _with_head(config: ModelConfig, source: TensorSource) -> tuple[ModelConfig, TensorSource]:
    """Which head the model has: as in transformers, one that is there and differs is not tied."""
    has = {name: name in source.specs for name in (EMBEDDING, HEAD)}
    if config.tie_embeddings and _has_own_head(source):
        note = f"{hub.CONFIG} ties the head to the embedding, but {HEAD} differs from it: used as it is"
        source = dataclasses.replace(source, notes=(*source.notes, note))
        return dataclasses.replace(config, tie_embeddings=False), source
    if config.tie_embeddings and has[HEAD] and not has[EMBEDDING]:
        return config, with_embedding(source)
    if not config.tie_embeddings and has[EMBEDDING] and not has[HEAD]:
        note = f"the model has no head ({HEAD}), as an embedding model: its layers are measured, no loss"
        source = dataclasses.replace(source, notes=(*source.notes, note))
        return dataclasses.replace(config, has_head=False), source
    return config, source


def _adapted(checkpoint: Checkpoint, adapter: Adapter, cautions: tuple[str, ...]) -> Checkpoint:
    """The checkpoint with an adapter applied."""
    config = checkpoint.config
    source, applied = adapter.applied(checkpoint.source, config.tie_embeddings)
    if config.tie_embeddings and _has_own_head(source):
        config = dataclasses.replace(config, tie_embeddings=False)
    if checkpoint.float8:
        applied += ("the float8 weights were dequantised before the adapter was added to them",)
    notes = (*applied, *cautions, *checkpoint.notes)
    return dataclasses.replace(
        checkpoint, config=config, source=source, float8=None, notes=notes, adapter=adapter
    )


def load_model(
    model: str | Path,
    *,
    revision: str | None = None,
    loader: str = "auto",
    ignore_config_keys: str | None = None,
    adapter: str | Path | None = None,
    sharding: Placement | None = None,
) -> Decoder:
    """Loads a whole checkpoint; the weights keep their dtype.

    >>> model = jaxdelta.load_model("demo")
    >>> model.config.num_layers, model.config.hidden_size
    (28, 128)

    Arguments and errors are those of `open_checkpoint`, `sharding` that of `Checkpoint.load`.
    """
    checkpoint = open_checkpoint(
        str(model),
        revision=revision,
        loader=loader,
        ignore_config_keys=ignore_config_keys,
        adapter=None if adapter is None else str(adapter),
    )
    check_devices()
    return checkpoint.load(sharding)


def save_model(model: Decoder, directory: Path) -> None:
    """Writes config.json and model.safetensors in Hugging Face's layout, in the weights' dtype."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...])
        for name, index in _parts(path, model.config):
            tensors[name] = np.ascontiguousarray(value[index])
    save_file(tensors, directory / hub.WEIGHTS, metadata={"format": "pt"})
    dtype = str(model.embed_tokens.weight[...].dtype)
    write_config(dataclasses.replace(model.config, dtype=dtype), directory / hub.CONFIG)


@cache
def _flat_block(config: ModelConfig, *, sparse: bool) -> list[tuple[Any, Any]]:
    return list(nnx.to_flat_state(nnx.state(abstract_block(config, sparse=sparse))))


def _parts(path: tuple[Any, ...], config: ModelConfig) -> Iterator[TensorPart]:
    """The tensors of a parameter, by Hugging Face's names."""
    if path[0] not in ("layers", "sparse_layers"):
        yield ("" if path[0] == "lm_head" else "model.") + ".".join(path), ()
        return
    for row, index in enumerate(config.layers_of(sparse=path[0] == "sparse_layers")):
        for name, expert in _layer_parts(index, path[1:], config):
            yield name, (row, *expert)


def _shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of a model's tensors."""
    return {
        name: variable.shape[len(stack) :]
        for path, variable in nnx.to_flat_state(nnx.state(abstract_model(config)))
        for name, stack in _parts(path, config)
    }


def _layer_parts(index: int, path: tuple[Any, ...], config: ModelConfig) -> Iterator[TensorPart]:
    """The tensor of one layer's parameter, or the tensors of its experts."""
    prefix = f"model.layers.{index}."
    if path[:2] != ("mlp", "experts") or config.experts is None:
        yield prefix + ".".join(path), ()
        return
    for expert in range(config.experts.count):
        yield f"{prefix}mlp.experts.{expert}." + ".".join(path[2:]), (expert,)


def _has_own_head(source: TensorSource) -> bool:
    """Whether the head on disk differs from the embedding; transformers 5 ties only equal ones."""
    if HEAD not in source.specs or EMBEDDING not in source.specs:
        return False
    if source.specs[HEAD] != source.specs[EMBEDDING]:
        return True
    for start in range(0, source.specs[HEAD].shape[0], VOCAB_SLICE):
        head, embedding = (source.read(name, start, start + VOCAB_SLICE) for name in (HEAD, EMBEDDING))
        if not np.array_equal(head.view(np.uint8), embedding.view(np.uint8)):
            return True
    return False
