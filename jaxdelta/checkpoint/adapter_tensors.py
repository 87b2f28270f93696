"""The tensors of a LoRA adapter, each matched with the tensor of the model that it changes.

Names are PEFT's: `base_model.model.`, a module's name, and `lora_A`, `lora_B`, `lora_embedding_A` or
`lora_embedding_B`; or the name of a parameter that was saved as a whole.
"""

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.adapter_config import EMBEDDINGS, LoraConfig
from jaxdelta.checkpoint.source import EMBEDDING, HEAD, Shape, TensorSource, TensorSpec, expert_parts
from jaxdelta.errors import JaxDeltaError

# (start, stop) -> what is added to rows of a tensor, in float32; a new array.
Update = Callable[[int, int], np.ndarray]

_SHOWN = 3  # of many names
_PREFIX = re.compile(r"^((_orig_mod|module)\.)*(base_model\.model\.)?")
# X.lora_A.weight, X.lora_A.default.weight, X.lora_embedding_A, X.lora_B.bias
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.\w+)??(?:\.(weight|bias))?")
_WRAPPER = re.compile(r"\.base_layer(?=\.|$)|\.modules_to_save(\.\w+)?(?=\.(weight|bias)$)")
# Heads of other tasks, which no layer needs.
_OTHER_HEAD = re.compile(r"(score|classifier|v_head|qa_outputs)\..+")
_UNFIT, _TWICE, _OTHER_SHAPE = "fit no tensor of the model", "are there twice", "have another shape"
_UNTARGETED = f"are of modules that {hub.ADAPTER_CONFIG} does not target"
_ABSENT = "are missing, though modules_to_save names them"
_RESIZED = "if training resized the vocabulary, merge the adapter with PEFT"


class AdapterTensors:
    """An adapter's tensors, matched with a model's.

    Attributes:
        updates: the model's name -> what is added to it.
        saved: the model's name -> the stored tensor that takes its place.
        left_out: stored tensors that no layer needs.
        ranks: ranks of the updates.
        scales: their scales s.
    """

    def __init__(self, lora: LoraConfig, stored: TensorSource, specs: Mapping[str, TensorSpec]):
        self._lora, self._stored, self._specs = lora, stored, specs
        self._whole = functools.lru_cache(maxsize=4)(lambda name: stored.read(name).astype(np.float32))
        self._problems: dict[str, list[str]] = defaultdict(list)
        self.updates: dict[str, Update] = {}
        self.saved: dict[str, str] = {}
        self.left_out: list[str] = []
        self.ranks: set[int] = set()
        self.scales: set[float] = set()
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name in stored.specs:
            if match := _FACTOR.fullmatch(name):
                module, embedding, factor, kind = match.groups()
                slot = "bias" if kind == "bias" else f"{embedding or ''}{factor}"
                if modules[module].setdefault(slot, name) != name:
                    self._problems[_TWICE].append(name)
            else:
                self._save(name)
        for module, factors in modules.items():
            self._update(module, factors)
        absent = (name for name in specs if lora.is_saved(_module(name)) and name not in self.saved)
        self._problems[_ABSENT] += absent

    def check(self, directory: Path) -> None:
        """Refuses an adapter of which any tensor fits no tensor of the model.

        Raises:
            JaxDeltaError: their number and the first three, by what is wrong.
        """
        problems = {what: names for what, names in self._problems.items() if names}
        if problems:
            said = "; ".join(
                [f"{len(names)} {what} ({first(names)})" for what, names in problems.items()][:2]
            )
            resized = any(name in text for text in problems.get(_OTHER_SHAPE, ()) for name in EMBEDDINGS)
            hints = [_RESIZED] * resized + [f"it was trained on {end_of(self._lora.base)}"] * bool(
                self._lora.base
            )
            raise JaxDeltaError(
                f"{directory}: the adapter does not fit the model: of its {len(self._stored.specs)} tensors "
                + "; ".join([said, *hints])
            )
        if not self.updates and not self.saved:
            raise JaxDeltaError(f"{directory}: the adapter holds no tensors")

    def shared_embedding(self) -> str | None:
        """The stored tensor that takes the place of an embedding and of the head tied to it, if there is one.

        PEFT copies modules that are trained as a whole; any other stored tensor goes where both read it.
        """
        shared = (name for name in (EMBEDDING, HEAD) if not self._lora.is_saved(_module(name)))
        return next((self.saved[name] for name in shared if name in self.saved), None)

    def notes(self) -> Iterator[str]:
        """What was applied, and what was not."""
        parts = []
        if self.updates:
            ranks, scales = _span(self.ranks), _span(self.scales)
            parts.append(f"LoRA of rank {ranks} on {len(self.updates)} tensors, scale {scales}")
        if self.saved:
            parts.append(f"{len(self.saved)} replaced ({first(sorted(self.saved))})")
        yield "; ".join(parts)
        if self.left_out:
            yield f"of the adapter left out, as no layer needs it: {first(self.left_out)}"
        others = self._specs.keys() - self.updates.keys() - self.saved.keys()
        weights = sorted(name for name in others if name.endswith(".weight") and ".experts." not in name)
        if unchanged := [name for name in weights if self._lora.names(_module(name))]:
            what = f"targets of {hub.ADAPTER_CONFIG} have no tensors in the adapter and do not change"
            yield f"{len(unchanged)} {what}: {first(unchanged)}"

    def _save(self, stored: str) -> None:
        """Matches a tensor that takes the place of the model's."""
        bare = _bare(stored)
        name = _causal(bare)
        if name in self.saved:
            self._problems[_TWICE].append(stored)
        elif name in self._specs:
            if self._has_shape(stored, self._specs[name].shape):
                self.saved[name] = stored
        elif _OTHER_HEAD.fullmatch(bare) and self._lora.is_saved(_module(bare)):
            self.left_out.append(stored)
        else:
            self._problems[_UNFIT].append(stored)

    def _update(self, stored: str, factors: Mapping[str, str]) -> None:
        """Matches the factors of a module's adapter, `stored` being the module in PEFT's names."""
        module = _bare(stored)
        name = _causal(module)
        weight = f"{name}.weight"
        kind = factors.keys() - {"bias"}
        if kind not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            self._problems["lack their other factor"] += sorted(factors.values())
        elif factors.keys() == {"A", "B"} and f"{name}.0.gate_proj.weight" in self._specs:
            self._update_experts(module, name, factors["A"], factors["B"])
        elif weight not in self._specs or len(self._specs[weight].shape) != 2:
            self._problems[_UNFIT] += sorted(factors.values())
        elif not (self._lora.is_target(module) or self._lora.is_target(name)):
            self._problems[_UNTARGETED] += sorted(factors.values())
        elif kind == {"A", "B"}:
            self._update_linear(module, name, factors)
        else:
            self._update_embedding(module, weight, factors["embedding_A"], factors["embedding_B"])

    def _update_linear(self, module: str, name: str, factors: Mapping[str, str]) -> None:
        rows, columns = self._specs[f"{name}.weight"].shape
        rank, scale = self._lora.rank(module), self._lora.scale(module)
        a, b, bias = factors["A"], factors["B"], factors.get("bias")
        if all([self._has_shape(a, (rank, columns)), self._has_shape(b, (rows, rank))]):
            self._add(f"{name}.weight", rank, scale, lambda i, j: self._rows(b, i, j) @ self._whole(a))
        if bias and f"{name}.bias" not in self._specs:
            self._problems[_UNFIT].append(bias)
        elif bias and self._has_shape(bias, (rows,)):
            self._add(f"{name}.bias", rank, scale, lambda i, j: self._rows(bias, i, j))

    def _update_embedding(self, module: str, weight: str, a: str, b: str) -> None:
        rows, columns = self._specs[weight].shape
        rank, scale = self._lora.rank(module), self._lora.scale(module)
        if all([self._has_shape(a, (rank, rows)), self._has_shape(b, (columns, rank))]):
            self._add(weight, rank, scale, lambda i, j: self._whole(a)[:, i:j].T @ self._whole(b).T)

    def _update_experts(self, module: str, name: str, a: str, b: str) -> None:
        """Factors of all experts' fused parameter, of which PEFT stores no name: the shapes tell.

        A is (E r, I), with an expert's rows in one block; B is (O, r E), with an expert's columns E apart.
        """
        width, hidden = self._specs[f"{name}.0.gate_proj.weight"].shape
        kinds = {(2 * width, hidden): "gate_up_proj", (hidden, width): "down_proj"}
        product = (*self._shape(b)[:1], *self._shape(a)[1:])
        if product not in kinds:
            self._problems[_UNFIT] += [a, b]
            return
        parameter, (outer, inner) = kinds[product], product
        count = next(i for i in itertools.count() if f"{name}.{i}.gate_proj.weight" not in self._specs)
        rank = self._lora.rank(f"{module}.{parameter}")
        scale = self._lora.scale(f"{module}.{parameter}")
        if all([self._has_shape(a, (count * rank, inner)), self._has_shape(b, (outer, count * rank))]):
            for part, start, _ in expert_parts(f"{name}.{parameter}", (count, outer, inner)):
                expert, row = divmod(start, outer)
                update = functools.partial(self._of_expert, a, b, (expert, row, rank, count))
                self._add(part, rank, scale, update)

    def _of_expert(
        self, a: str, b: str, place: tuple[int, int, int, int], start: int, stop: int
    ) -> np.ndarray:
        expert, row, rank, count = place
        columns = self._whole(b)[row + start : row + stop, expert::count]
        return columns @ self._rows(a, expert * rank, (expert + 1) * rank)

    def _add(self, name: str, rank: int, scale: float, product: Update) -> None:
        def scaled(start: int, stop: int) -> np.ndarray:
            update = product(start, stop)
            update *= np.float32(scale)
            return update

        if name in self.updates:
            self._problems["change a tensor twice"].append(name)
        self.updates[name] = scaled
        self.ranks.add(rank)
        self.scales.add(scale)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._stored.read(name, start, stop).astype(np.float32)

    def _shape(self, name: str) -> Shape:
        return self._stored.specs[name].shape

    def _has_shape(self, name: str, wanted: Shape) -> bool:
        if self._shape(name) != wanted:
            self._problems[_OTHER_SHAPE].append(f"{name} is {self._shape(name)}, not {wanted}")
        return self._shape(name) == wanted


def first(names: Collection[str]) -> str:
    """The first three of many names."""
    shown = ", ".join(end_of(_PREFIX.sub("", name)) for name in list(names)[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown


def end_of(name: object) -> str:
    """A name or a path in one line, its beginning cut off where it is long."""
    text = " ".join(str(name).split())
    return text if len(text) <= 80 else f"...{text[-77:]}"


def _span(values: Collection[int | float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _bare(stored: str) -> str:
    """A stored name without what PEFT, torch.compile and data parallelism put into it."""
    return _WRAPPER.sub("", _PREFIX.sub("", stored))


def _causal(name: str) -> str:
    """Adapters of the bare model (embedding models) lack the prefix `model.`."""
    return name if name.startswith(("model.", "lm_head")) else f"model.{name}"


def _module(name: str) -> str:
    return name.rpartition(".")[0]
