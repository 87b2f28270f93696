"""A digest that identifies a model's weights by samples of them."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.checkpoint import Checkpoint
from jaxdelta.checkpoint.safetensors_files import safetensors_files
from jaxdelta.checkpoint.torch_model import LoadedCheckpoint
from jaxdelta.checkpoint.weights import InMemoryWeights, Weights
from jaxdelta.model.decoder import Decoder

_SAMPLES, _SAMPLE_BYTES = 256, 4096  # places per weight file, and bytes at each
_NUMBERS = 4096  # of each parameter of a model in memory


def weights_fingerprint(weights: Weights) -> str:
    """The digest of a checkpoint's files, or of a model's parameters in memory."""
    if isinstance(weights, LoadedCheckpoint):
        return _of_arrays(_sampled_rows(weights))
    if isinstance(weights, Checkpoint):
        return _of_checkpoint(weights)
    if isinstance(weights, InMemoryWeights):
        return _of_arrays(_sampled_numbers(weights.model))
    raise TypeError(f"{type(weights).__name__} has no fingerprint of its own")


def _of_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in arrays:
        digest.update(f"{name} {array.dtype} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sampled_rows(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Four rows of each tensor."""
    source = checkpoint.source
    for name, spec in sorted(source.specs.items()):
        for row in np.linspace(0, spec.shape[0] - 1, 4).astype(int).tolist():
            yield f"{name} {spec.shape} {row}", source.read(name, row, row + 1)


def _sampled_numbers(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Numbers from all over each parameter, taken without copying it."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable[...]
        places = np.linspace(0, value.size - 1, min(value.size, _NUMBERS)).astype(np.int64)
        index = np.unravel_index(places, value.shape)
        yield f"{path} {value.shape}", np.asarray(value[tuple(axis.astype(np.int32) for axis in index)])


def _of_checkpoint(checkpoint: Checkpoint) -> str:
    """The digest of the files of weights; with an adapter, of its files too."""
    directory, adapter = checkpoint.directory, checkpoint.adapter
    others = [*(directory / hub.ORBAX).rglob("*"), *directory.glob("*.bin"), *directory.glob("*.gguf")]
    files = safetensors_files(directory) or sorted(path for path in others if path.is_file())
    digest = hashlib.blake2b(digest_size=16)
    _add_files(digest, files, directory)
    if adapter:
        _add_files(digest, adapter.files, adapter.directory)
    return digest.hexdigest()


def _add_files(digest: Any, files: Iterable[Path], directory: Path) -> None:
    """Adds the files' sizes and samples of their content; files up to 1 MiB are read whole."""
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size} ".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(size // _SAMPLES, _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
