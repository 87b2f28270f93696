"""Weights on disk -> parameters: safetensors read directly, Orbax's, everything else through PyTorch.

The model's parameter tree carries Hugging Face's names, with all layers stacked: `layers.mlp.up_proj.weight`
of shape (L, F, D) is `model.layers.{0..L-1}.mlp.up_proj.weight`. Each stacked parameter is filled in one host
buffer, so loading needs the weights' own size and little more.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from jaxdelta import hub
from jaxdelta.config import ModelConfig
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.loss import VOCAB_SLICE
from jaxdelta.model import Qwen3, abstract_block, abstract_model
from jaxdelta.tensors import Source, Spec, aligned, open_safetensors, safetensors_files

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
LOADERS = ("auto", "safetensors", "torch")

# Buffers that old checkpoints carry beside their weights.
_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.bias|self_attn\.masked_bias)")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: names and shapes are checked, and weights are read when asked for.

    It serves the layer-major pass as `Weights`, and loads whole as a `Qwen3`.
    """

    directory: Path
    config: ModelConfig
    source: Source

    def layer(self, index: int) -> nnx.State:
        """One layer's parameters, on the device."""
        return self._filled(index, lambda name: jax.device_put(self.source.read(name), may_alias=True))

    def abstract_layer(self, index: int) -> nnx.State:
        """The same with shapes in place of weights."""
        specs = self.source.specs
        return self._filled(index, lambda name: jax.ShapeDtypeStruct(specs[name].shape, specs[name].dtype))

    def _filled(self, index: int, fill: Callable[[str], Any]) -> nnx.State:
        _, block = nnx.split(abstract_block(self.config))
        return nnx.from_flat_state(
            [
                (path, variable.replace(fill(_layer_name(index, path))))
                for path, variable in nnx.to_flat_state(block)
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
        parameters = nnx.to_flat_state(nnx.state(abstract_model(self.config)))
        return sorted((name for path, _ in parameters for name, _ in _names(path, self.config)), key=_natural)

    def first_bad_tensor(self) -> str | None:
        """The name of the first tensor that holds a NaN or an infinity, if any."""
        for name in sorted(self.source.specs, key=_natural):
            if not np.isfinite(self.source.read(name).astype(np.float32)).all():
                return name
        return None

    def load(self, sharding: Placement | None = None) -> Qwen3:
        """The whole model, each stacked parameter filled in one host buffer, or in one for each shard.

        Args:
            sharding: (name, shape) of a parameter -> its sharding; the name is the module tree's, as in
                `layers.mlp.up_proj.weight`, whose first axis are the layers. None: the default device.
        """
        graph, state = nnx.split(abstract_model(self.config))
        filled = []
        for path, variable in nnx.to_flat_state(state):
            read = partial(self._read_part, list(_names(path, self.config)), variable.shape)
            if sharding is None:
                array = jax.device_put(read((slice(None),) * len(variable.shape)), may_alias=True)
            else:
                wanted = sharding(".".join(map(str, path)), variable.shape)
                array = jax.make_array_from_callback(variable.shape, wanted, read)
            filled.append((path, variable.replace(array)))
        return nnx.merge(graph, nnx.from_flat_state(filled))

    def _read_part(
        self, tensors: list[tuple[str, Any]], shape: tuple[int, ...], index: tuple[slice, ...]
    ) -> np.ndarray:
        """A part of a parameter that may be stacked: only the layers and rows that it has are read."""
        wanted = [range(*axis.indices(size)) for axis, size in zip(index, shape, strict=True)]
        dtype = np.result_type(*{self.source.specs[name].dtype for name, _ in tensors})
        buffer = aligned(tuple(map(len, wanted)), dtype)
        for name, layer in tensors:
            if layer is ...:
                buffer[:] = self.source.read(name, wanted[0].start, wanted[0].stop)[:, *index[1:]]
            elif layer in wanted[0]:
                rows = self.source.read(name, wanted[1].start, wanted[1].stop)
                buffer[layer - wanted[0].start] = rows[:, *index[2:]]
        return buffer

    @property
    def _head(self) -> str:
        return EMBEDDING if self.config.tie_embeddings else HEAD

    def _rows(self, name: str, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        unique, place = np.unique(ids, return_inverse=True)
        rows = np.concatenate([self.source.read(name, i, i + 1) for i in unique.tolist()])
        return jax.device_put(rows[place.reshape(ids.shape)])


def open_checkpoint(model: str, *, revision: str | None = None, loader: str = "auto") -> Checkpoint:
    """Opens a Qwen3 checkpoint and checks that its tensors are those its configuration needs.

    Args:
        model: `demo`, a local directory, or a hub id.
        revision: branch, tag or commit of a hub id.
        loader: `safetensors`, `torch` (transformers' PyTorch model and its state dict: .bin files, GGUF,
            quantised formats), or `auto`: safetensors where there are any, else Orbax's.

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
        from jaxdelta.orbax_store import open_orbax

        config = ModelConfig.from_file(directory / hub.CONFIG)
        source = open_orbax(directory / hub.ORBAX)
    elif loader == "torch" or not files:
        from jaxdelta.torch_loader import torch_source

        config, source = torch_source(directory)
    else:
        config = ModelConfig.from_file(directory / hub.CONFIG)
        source = open_safetensors(files)
    if config.tie_embeddings and _has_own_head(source):
        config = dataclasses.replace(config, tie_embeddings=False)
    _check_names(config, source.specs, directory)
    return Checkpoint(directory, config, source)


def load_model(
    model: str,
    *,
    revision: str | None = None,
    loader: str = "auto",
    sharding: Placement | None = None,
) -> Qwen3:
    """Loads a whole Qwen3 checkpoint; the weights keep the dtype they have on disk.

    Arguments and errors are those of `open_checkpoint`, and `sharding` is that of `Checkpoint.load`.
    """
    return open_checkpoint(model, revision=revision, loader=loader).load(sharding)


def save_model(model: Qwen3, directory: Path) -> None:
    """Writes config.json and model.safetensors in Hugging Face's layout, in the weights' own dtype."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...])
        for name, index in _names(path, model.config):
            tensors[name] = np.ascontiguousarray(value[index])
    save_file(tensors, directory / hub.WEIGHTS, metadata={"format": "pt"})
    dtype = model.embed_tokens.weight[...].dtype
    config = dataclasses.replace(model.config, dtype=str(dtype))
    config.to_file(directory / hub.CONFIG)


def _names(path: tuple[Any, ...], config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Hugging Face's name of each tensor within a parameter, and where in the parameter it lies."""
    if path[0] == "layers":
        for i in range(config.num_layers):
            yield _layer_name(i, path[1:]), i
    else:
        yield ("" if path[0] == "lm_head" else "model.") + ".".join(path), ...


def _layer_name(index: int, path: tuple[Any, ...]) -> str:
    return f"model.layers.{index}." + ".".join(path)


def _has_own_head(source: Source) -> bool:
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


def _check_names(config: ModelConfig, found: Mapping[str, Spec], directory: Path) -> None:
    """Every name and shape must be as the configuration says, both ways; one error tells all that are not."""
    wanted = {
        name: variable.shape if index is ... else variable.shape[1:]
        for path, variable in nnx.to_flat_state(nnx.state(abstract_model(config)))
        for name, index in _names(path, config)
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
