"""A LoRA adapter, as PEFT saves it, applied to a model's weights as they are read.

    W' = W + s B A,   s = alpha / r, or alpha / √r with rsLoRA

(Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732), computed in float32 and rounded to
the dtype of W, as PEFT's `merge_and_unload` does. Modules that were trained as a whole take the place of the
model's. Only the rows of B that a read of W needs are read with it.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.adapter_config import LoraConfig, base_of, read_adapter_config
from jaxdelta.checkpoint.safetensors_files import open_file
from jaxdelta.checkpoint.source import EMBEDDING, HEAD, Shape, TensorSource, TensorSpec, aligned, expert_parts
from jaxdelta.errors import JaxDeltaError, extra, plain_errors
from jaxdelta.model.config import ModelConfig

# (start, stop) -> what is added to rows of a tensor, in float32.
Update = Callable[[int, int], np.ndarray]

_ROWS = 1024  # rows of an update in memory at a time
_VOCABULARY = ("embed_tokens", "lm_head")
_SHOWN = 3  # of many names
_PREFIX = re.compile(r"^((_orig_mod|module)\.)*(base_model\.model\.)?")
# X.lora_A.weight, X.lora_A.default.weight, X.lora_embedding_A, X.lora_B.bias
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.\w+)??(?:\.(weight|bias))?")
_WRAPPER = re.compile(r"\.base_layer(?=\.|$)|\.modules_to_save(\.\w+)?(?=\.(weight|bias)$)")
_MODEL_FILES = (hub.WEIGHTS, hub.INDEX, hub.ORBAX, *hub.TORCH_WEIGHTS, "*.gguf")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter: its directory, its configuration, and its tensors under PEFT's names."""

    directory: Path
    lora: LoraConfig
    tensors: TensorSource

    def applied(self, model: TensorSource, config: ModelConfig) -> tuple[TensorSource, tuple[str, ...]]:
        """A model's tensors with the adapter applied, and notes of how.

        The head of a tied model is among them, under its own name, where the adapter changes it or the
        embedding alone: PEFT's forward pass changes one and not the other.

        Raises:
            JaxDeltaError: a tensor of the adapter fits no tensor of the model.
        """
        specs = dict(model.specs)
        if config.tie_embeddings:
            specs[HEAD] = specs[EMBEDDING]
        fitted = _Fitted(self, specs, config)
        fitted.check()
        changed = fitted.updates.keys() | fitted.saved.keys()
        origins = {name: (self.tensors, stored) for name, stored in fitted.saved.items()}
        notes = [self._summary(fitted)]
        if config.tie_embeddings and changed & {EMBEDDING, HEAD}:
            changed |= {EMBEDDING, HEAD}
            shared = fitted.shared_embedding()
            for name in {EMBEDDING, HEAD} - origins.keys():
                origins[name] = (self.tensors, shared) if shared else (model, EMBEDDING)
            if fitted.updates.keys() & {EMBEDDING, HEAD}:
                notes.append(
                    "the model ties its head to its embedding: the adapter changes them as in PEFT's forward "
                    "pass, while merge_and_unload changes both by the sum"
                )
        else:
            specs = dict(model.specs)
        changes = {
            name: _Change(*origins.get(name, (model, name)), fitted.updates.get(name)) for name in changed
        }
        return _changed(model, specs, changes), tuple(notes)

    def _summary(self, fitted: "_Fitted") -> str:
        parts = []
        if fitted.updates:
            parts.append(
                f"LoRA of rank {_span(fitted.ranks)} on {len(fitted.updates)} tensors, "
                f"scale {_span(fitted.scales)}"
            )
        if fitted.saved:
            parts.append(f"{len(fitted.saved)} replaced ({_first(sorted(fitted.saved))})")
        return f"adapter {_path(self.directory)} applied: {'; '.join(parts)}"

    def cautions(self, model: str, revision: str | None, directory: Path) -> Iterator[str]:
        """A note where the adapter has another model, revision or tokenizer than the run.

        `directory` is that of the model's files.
        """
        base, wanted = self.lora.base, self.lora.revision
        if base and Path(base).name.lower() != Path(model).expanduser().resolve().name.lower():
            yield f"the adapter was trained on {_path(base)}, and is applied to {_path(model)}"
        elif wanted and wanted != (revision or "main"):
            yield f"the adapter was trained on revision {_path(wanted)} of {_path(base or model)}"
        own, used = (place / hub.TOKENIZER_FILES[0] for place in (self.directory, directory))
        if own.is_file() and used.is_file() and own.read_bytes() != used.read_bytes():
            yield f"the adapter has another {own.name}, which is not used: the model's reads the text"

    @property
    def files(self) -> list[Path]:
        """The files that identify the adapter."""
        names = (hub.ADAPTER_CONFIG, *hub.ADAPTER_WEIGHTS)
        return [self.directory / name for name in names if (self.directory / name).exists()]


def open_adapter(adapter: str) -> Adapter:
    """Opens an adapter.

    Args:
        adapter: a directory, or a hub id.

    Raises:
        JaxDeltaError: it is none of PEFT's, no plain LoRA, or its files cannot be read.
        UsageError: the name is empty.
    """
    directory = hub.resolve_adapter(adapter)
    if not (directory / hub.ADAPTER_CONFIG).exists():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{hub.ADAPTER_CONFIG}"))
        where = f"; there is one in {_first(inside)}" if inside else "; is it an adapter of PEFT?"
        raise JaxDeltaError(f"{directory}: has no {hub.ADAPTER_CONFIG}{where}")
    lora = read_adapter_config(directory / hub.ADAPTER_CONFIG)
    for name in hub.ADAPTER_WEIGHTS:
        if (file := directory / name).is_file():
            return Adapter(directory, lora, _tensors(file))
    raise JaxDeltaError(f"{directory}: has no {' and no '.join(hub.ADAPTER_WEIGHTS)}")


def adapter_beside(model: str, directory: Path) -> tuple[str, ...]:
    """A note where an adapter lies beside a model's weights, which does not apply it.

    Raises:
        JaxDeltaError: there is an adapter and no model.
    """
    if not (file := directory / hub.ADAPTER_CONFIG).is_file():
        return ()
    if any(any(directory.glob(name)) for name in _MODEL_FILES):
        return (
            f"an adapter lies beside the weights and is not applied; --adapter={_path(model)} applies it",
        )
    raise JaxDeltaError(
        f"{directory}: is an adapter and no whole model; "
        f"give --model={_path(base_of(file) or 'BASE_MODEL')} --adapter={model}"
    )


def _tensors(file: Path) -> TensorSource:
    with open(file, "rb") as start:
        if start.read(24).startswith(b"version https://git-lfs"):
            raise JaxDeltaError(
                f"{file}: is a git-lfs pointer, not the adapter; fetch it with `git lfs pull`"
            )
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


class _Fitted:
    """The tensors of an adapter, each with the tensor of the model that it changes.

    `updates`: name -> what is added; `saved`: name -> the stored tensor that takes its place; `ranks` and
    `scales` of all updates.
    """

    def __init__(self, adapter: Adapter, specs: Mapping[str, TensorSpec], config: ModelConfig):
        self._adapter, self._specs, self._config = adapter, specs, config
        self._lora, self._stored = adapter.lora, adapter.tensors
        self._problems: dict[str, list[str]] = defaultdict(list)
        self.updates: dict[str, Update] = {}
        self.saved: dict[str, str] = {}
        self.ranks: set[int] = set()
        self.scales: set[float] = set()
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self._stored.specs:
            if match := _FACTOR.fullmatch(name):
                module, embedding, factor, kind = match.groups()
                slot = "bias" if kind == "bias" else f"{embedding or ''}{factor}"
                if modules[module].setdefault(slot, name) != name:
                    self._problems["are there twice"].append(name)
            else:
                self._save(name)
        for module, factors in modules.items():
            self._update(module, factors)

        @functools.lru_cache(maxsize=4)
        def whole(name: str) -> np.ndarray:
            return self._stored.read(name).astype(np.float32)

        self._whole = whole

    def check(self) -> None:
        """Refuses tensors that fit nothing, and an adapter without tensors."""
        if self._problems:
            listed = [
                f"{len(them)} {what} ({_first(them)})" for what, them in self._problems.items() if them
            ][:2]
            base = self._lora.base
            hint = f"; it was trained on {_path(base)}" if base else ""
            if any(name in shape for shape in self._problems["have another shape"] for name in _VOCABULARY):
                hint = "; if training resized the vocabulary, merge the adapter with PEFT"
            raise JaxDeltaError(
                f"{self._adapter.directory}: the adapter does not fit the model: of its "
                f"{len(self._stored.specs)} tensors {'; '.join(listed)}{hint}"
            )
        if not self.updates and not self.saved:
            raise JaxDeltaError(f"{self._adapter.directory}: the adapter holds no tensors")

    def shared_embedding(self) -> str | None:
        """The stored tensor that takes the place of an embedding and of the head tied to it, if there is one.

        PEFT copies modules that were trained as a whole; any other stored tensor goes where both read it.
        """
        for name in (EMBEDDING, HEAD):
            if name in self.saved and not self._lora.is_saved(name.removesuffix(".weight")):
                return self.saved[name]
        return None

    def _save(self, stored: str) -> None:
        """Matches a tensor that takes the place of the model's."""
        name = _causal(_bare(stored))
        if name not in self._specs:
            self._problems["fit no tensor of the model"].append(stored)
        elif name in self.saved:
            self._problems["are there twice"].append(stored)
        elif self._has_shape(stored, self._specs[name].shape):
            self.saved[name] = stored

    def _update(self, stored: str, factors: dict[str, str]) -> None:
        """Matches the factors of a module's adapter, `stored` being the module in PEFT's names."""
        module = _bare(stored)
        name = _causal(module)
        weight = f"{name}.weight"
        if factors.keys() - {"bias"} not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            self._problems["lack their other factor"] += sorted(factors.values())
        elif "A" in factors and f"{name}.0.gate_proj.weight" in self._specs:
            self._update_experts(module, name, factors["A"], factors["B"])
        elif weight not in self._specs or len(self._specs[weight].shape) != 2:
            self._problems["fit no tensor of the model"] += sorted(factors.values())
        elif not (self._lora.is_target(module) or self._lora.is_target(name)):
            self._problems[f"are of modules that {hub.ADAPTER_CONFIG} does not target"] += factors.values()
        elif "A" in factors:
            self._update_linear(module, name, factors)
        else:
            self._update_embedding(module, weight, factors["embedding_A"], factors["embedding_B"])

    def _update_linear(self, module: str, name: str, factors: dict[str, str]) -> None:
        rows, columns = self._specs[f"{name}.weight"].shape
        rank, scale = self._lora.rank(module), self._lora.scale(module)
        a, b, bias = factors["A"], factors["B"], factors.get("bias")
        if all([self._has_shape(a, (rank, columns)), self._has_shape(b, (rows, rank))]):
            self._add(f"{name}.weight", rank, scale, lambda i, j: self._rows(b, i, j) @ self._whole(a))
        if bias and f"{name}.bias" not in self._specs:
            self._problems["fit no tensor of the model"].append(bias)
        elif bias and self._has_shape(bias, (rows,)):
            self._add(f"{name}.bias", rank, scale, lambda i, j: self._rows(bias, i, j))

    def _update_embedding(self, module: str, weight: str, a: str, b: str) -> None:
        rows, columns = self._specs[weight].shape
        rank, scale = self._lora.rank(module), self._lora.scale(module)
        if all([self._has_shape(a, (rank, rows)), self._has_shape(b, (columns, rank))]):
            self._add(weight, rank, scale, lambda i, j: self._whole(a)[:, i:j].T @ self._whole(b).T)

    def _update_experts(self, module: str, name: str, a: str, b: str) -> None:
        """Factors of all experts' fused parameter, of which PEFT stores no name: its shape tells.

        A is (E r, I), with an expert's rows in one block; B is (O, r E), an expert's columns E apart.
        """
        assert self._config.experts
        count = self._config.experts.count
        width, hidden = self._specs[f"{name}.0.gate_proj.weight"].shape
        kinds = {(2 * width, hidden): "gate_up_proj", (hidden, width): "down_proj"}
        product = (*self._shape(b)[:1], *self._shape(a)[1:])
        if product not in kinds:
            self._problems["fit no tensor of the model"] += [a, b]
            return
        parameter, (outer, inner) = kinds[product], product
        named = f"{module}.{parameter}"
        rank, scale = self._lora.rank(named), self._lora.scale(named)
        if all([self._has_shape(a, (count * rank, inner)), self._has_shape(b, (outer, count * rank))]):
            for part, first, _ in expert_parts(f"{name}.{parameter}", (count, outer, inner)):
                expert, row = divmod(first, outer)
                self._add(part, rank, scale, self._expert(a, b, (expert, row, rank, count)))

    def _expert(self, a: str, b: str, place: tuple[int, int, int, int]) -> Update:
        expert, row, rank, count = place

        def update(start: int, stop: int) -> np.ndarray:
            left = self._whole(b)[row + start : row + stop, expert::count]
            return left @ self._rows(a, expert * rank, (expert + 1) * rank)

        return update

    def _add(self, name: str, rank: int, scale: float, product: Update) -> None:
        if name in self.updates:
            self._problems["change a tensor twice"].append(name)
        self.updates[name] = lambda start, stop: product(start, stop) * np.float32(scale)
        self.ranks.add(rank)
        self.scales.add(scale)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._stored.read(name, start, stop).astype(np.float32)

    def _shape(self, name: str) -> Shape:
        return self._stored.specs[name].shape

    def _has_shape(self, name: str, wanted: Shape) -> bool:
        if self._shape(name) != wanted:
            self._problems["have another shape"].append(f"{name} is {self._shape(name)}, not {wanted}")
        return self._shape(name) == wanted


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
            part[...] = (part.astype(np.float32) + self.update(start, stop)).astype(out.dtype)


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


def _bare(stored: str) -> str:
    """A stored name without what PEFT, torch.compile and data parallelism put into it."""
    return _WRAPPER.sub("", _PREFIX.sub("", stored))


def _causal(name: str) -> str:
    """Adapters of the bare model (embedding models) lack the prefix `model.`."""
    return name if name.startswith(("model.", "lm_head")) else f"model.{name}"


def _first(names: list[str]) -> str:
    shown = ", ".join(_PREFIX.sub("", name)[-90:] for name in names[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown


def _span(values: set[int] | set[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _path(name: object) -> str:
    """A path or an id, its beginning cut off where it is long."""
    text = " ".join(str(name).split())
    return text if len(text) <= 80 else f"...{text[-77:]}"
