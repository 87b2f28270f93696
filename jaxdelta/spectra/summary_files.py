"""A layer's figures as bytes and back, bit for bit: their arrays as NumPy's .npz, with the tree that holds
them as JSON. No pickle: who opens another's archive runs none of his code."""

import dataclasses
import io
import json
from typing import Any

import numpy as np

from jaxdelta.spectra.group_moments import Crossed, Resampled
from jaxdelta.spectra.spectrum import Spectrum
from jaxdelta.spectra.view_summary import Found, LayerFigures, ViewFigures
from jaxdelta.spectra.views import View

_KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (LayerFigures, ViewFigures, View, Found, Spectrum, Resampled, Crossed)
}
_TREE = "tree"


def pack(figures: LayerFigures) -> bytes:
    """The bytes of which `unpack` makes the same figures."""
    arrays: dict[str, np.ndarray] = {}
    nodes: list[Any] = []  # [kind, children's numbers]: children come before those that hold them
    numbers: dict[int, int] = {}  # of what is in two places there is one node: the masked view may be the raw

    def add(value: Any) -> int:
        if id(value) not in numbers:
            nodes.append(node(value))
            numbers[id(value)] = len(nodes) - 1
        return numbers[id(value)]

    def node(value: Any) -> list[Any]:
        kind = type(value).__name__
        if isinstance(value, np.ndarray):
            arrays[name := f"array_{len(arrays)}"] = value
            return ["array", name]
        if kind in _KINDS:
            return [kind, [add(getattr(value, name)) for name in _fields(kind)]]
        if isinstance(value, dict):
            return ["dict", [[add(key), add(item)] for key, item in value.items()]]
        if isinstance(value, tuple):
            return ["tuple", [add(item) for item in value]]
        return ["value", value]

    add(figures)
    file = io.BytesIO()
    np.savez(file, **{_TREE: np.asarray(json.dumps(nodes))}, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def unpack(data: bytes) -> LayerFigures:
    """The figures that were packed."""
    made: list[Any] = []
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for kind, held in json.loads(str(arrays[_TREE])):
            if kind == "array":
                made.append(arrays[held])
            elif kind == "dict":
                made.append({made[key]: made[item] for key, item in held})
            elif kind == "value":
                made.append(held)
            else:
                items = [made[number] for number in held]
                made.append(_KINDS[kind](*items) if kind in _KINDS else tuple(items))
    return made[-1]


def _fields(kind: str) -> tuple[str, ...]:
    of = _KINDS[kind]
    return tuple(f.name for f in dataclasses.fields(of)) if dataclasses.is_dataclass(of) else of._fields
