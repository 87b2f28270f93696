"""A LoRA adapter, as PEFT saves it, applied to a model's weights as they are read.

    W' = W + s B A,   s = alpha / r, or alpha / √r with rsLoRA

(Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732), computed in float32 and rounded to
the dtype of W, as PEFT's `merge_and_unload` does. Modules that were trained as a whole take the place of the
model's. With rows of W only these rows of B are read.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.adapter_config import LoraConfig, base_of, read_adapter_config
from jaxdelta.checkpoint.adapter_tensors import AdapterTensors, Update, end_of, first
from jaxdelta.checkpoint.safetensors_files import open_file
from jaxdelta.checkpoint.source import EMBEDDING, HEAD, TensorSource, TensorSpec, aligned
from jaxdelta.errors import JaxDeltaError, extra, plain_errors
from jaxdelta.utils.files import check_whole

_ROWS = 1024  # rows of an update in memory at a time
_MODEL_FILES = (hub.WEIGHTS, hub.INDEX, hub.ORBAX, *hub.TORCH_WEIGHTS, "*.gguf")
_TIED = (
    "the model ties its head to its embedding: the adapter changes them as in PEFT's forward pass, while "
    "merge_and_unload changes both by the sum"
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter: its directory, its configuration, and its tensors by PEFT's names."""

    directory: Path
    lora: LoraConfig
    tensors: TensorSource

    def applied(self, model: TensorSource, tied: bool) -> tuple[TensorSource, tuple[str, ...]]:
        """A model's tensors with the adapter applied, and notes of how.

        Args:
            model: its tensors.
            tied: whether its head is its embedding. The head is among the tensors returned, under its own
                name, if the adapter changes either: PEFT's forward pass changes one and not the other.

        Raises:
            JaxDeltaError: a tensor of the adapter fits no tensor of the model.
        """
        specs = {**model.specs, HEAD: model.specs[EMBEDDING]} if tied else model.specs
        matched = AdapterTensors(self.lora, self.tensors, specs)
        matched.check(self.directory)
        what, *notes = matched.notes()
        changed = matched.updates.keys() | matched.saved.keys()
        origins = {name: (self.tensors, stored) for name, stored in matched.saved.items()}
        if tied and not changed & {EMBEDDING, HEAD}:
            specs = model.specs
        elif tied:
            changed |= {EMBEDDING, HEAD}
            shared = matched.shared_embedding()
            for name in {EMBEDDING, HEAD} - origins.keys():
                origins[name] = (self.tensors, shared) if shared else (model, EMBEDDING)
            if matched.updates.keys() & {EMBEDDING, HEAD}:
                notes.append(_TIED)
        changes = {
            name: _Change(*origins.get(name, (model, name)), matched.updates.get(name)) for name in changed
        }
        return _changed(model, specs, changes), (f"adapter {end_of(self.directory)} applied: {what}", *notes)

    def cautions(self, model: str, revision: str | None, directory: Path) -> Iterator[str]:
        """A note where the adapter has another model, revision or tokenizer than the run.

        `directory` is that of the model's files.
        """
        base, wanted = self.lora.base, self.lora.revision
        if base and Path(base).name.lower() != Path(model).expanduser().resolve().name.lower():
            yield f"the adapter was trained on {end_of(base)}, and is applied to {end_of(model)}"
        elif wanted and wanted != (revision or "main"):
            yield f"the adapter was trained on revision {end_of(wanted)} of {end_of(base or model)}"
        own, used = (place / hub.TOKENIZER_FILES[0] for place in (self.directory, directory))
        if own.is_file() and used.is_file() and own.read_bytes() != used.read_bytes():
            yield f"the adapter has another {own.name}, which is not used: the model's reads the text"

    @property
    def files(self) -> list[Path]:
        """The files that identify the adapter."""
        names = (hub.ADAPTER_CONFIG, *hub.ADAPTER_WEIGHTS)
        return [self.directory / name for name in names if (self.directory / name).exists()]


def open_adapter(adapter: str) -> Adapter:
    """Opens an adapter, a directory or a hub id.

    Raises:
        JaxDeltaError: it is none of PEFT's, no plain LoRA, or its files cannot be read.
        UsageError: the name is empty.
    """
    directory = hub.resolve_adapter(adapter)
    if not (directory / hub.ADAPTER_CONFIG).exists():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{hub.ADAPTER_CONFIG}"))
        where = f"there is one in {first(inside)}" if inside else "is it an adapter of PEFT?"
        raise JaxDeltaError(f"{directory}: has no {hub.ADAPTER_CONFIG}; {where}")
    lora = read_adapter_config(directory / hub.ADAPTER_CONFIG)
    for name in hub.ADAPTER_WEIGHTS:
        if (file := directory / name).is_file():
            return Adapter(directory, lora, _tensors(file))
    raise JaxDeltaError(f"{directory}: has no {' and no '.join(hub.ADAPTER_WEIGHTS)}")


def adapter_beside(model: str, directory: Path) -> tuple[str, ...]:
    """A note where a model's directory holds an adapter too, which is not applied.

    Raises:
        JaxDeltaError: there is an adapter and no model.
    """
    if not (file := directory / hub.ADAPTER_CONFIG).is_file():
        return ()
    if any(any(directory.glob(name)) for name in _MODEL_FILES):
        flag = f"--adapter={end_of(model)}"
        return (f"the model's directory holds an adapter, which is not applied; {flag} applies it",)
    raise JaxDeltaError(
        f"{directory}: is an adapter and no whole model; "
        f"give --model={end_of(base_of(file) or 'BASE_MODEL')} --adapter={model}"
    )


def _tensors(file: Path) -> TensorSource:
    check_whole(file)
    return open_file(file) if file.suffix == ".safetensors" else _torch_tensors(file)


def _torch_tensors(file: Path) -> TensorSource:
    """The tensors of a file that torch.save wrote, all in memory in float32."""
    with extra("torch", str(file)):
        import torch
    with plain_errors(file, {Exception: "{}: is damaged, or holds other objects than tensors"}):
        held = torch.load(file, map_location="cpu", weights_only=True)
        arrays = {str(name): tensor.float().numpy() for name, tensor in held.items()}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    return TensorSource(specs, lambda name, start=0, stop=None: arrays[name][start:stop])


@dataclasses.dataclass(frozen=True)
class _Change:
    """A changed tensor: read from `source` as `name`, then `update` added."""

    source: TensorSource
    name: str
    update: Update | None = None

    def fill(self, rows: range, out: np.ndarray) -> None:
        """Reads rows into an array of the tensor's dtype."""
        if len(rows) == self.source.specs[self.name].shape[0]:
            self.source.read_into(self.name, out)
        else:
            out[...] = self.source.read(self.name, rows.start, rows.stop)
        if self.update is None:
            return
        for start in range(rows.start, rows.stop, _ROWS):
            stop = min(start + _ROWS, rows.stop)
            part = out[start - rows.start : stop - rows.start]
            with np.errstate(over="ignore", invalid="ignore"):  # a run names a tensor that is not finite
                total = self.update(start, stop)
                total += part.astype(np.float32)
                part[...] = total.astype(out.dtype)


def _changed(
    model: TensorSource, specs: Mapping[str, TensorSpec], changes: Mapping[str, _Change]
) -> TensorSource:
    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name not in changes:
            return model.read(name, start, stop)
        shape, dtype = specs[name].shape, specs[name].dtype
        rows = range(*slice(start, stop).indices(shape[0]))
        out = aligned((len(rows), *shape[1:]), dtype)
        changes[name].fill(rows, out)
        return out

    def fill(name: str, out: np.ndarray) -> None:
        if name in changes:
            changes[name].fill(range(specs[name].shape[0]), out)
        else:
            model.read_into(name, out)

    return TensorSource(specs, read, fill)
