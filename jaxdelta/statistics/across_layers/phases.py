"""Phases: blocks of layers, named A to E and tail, over which overlaps are compared."""

import dataclasses
import re

import numpy as np
from jaxtyping import Bool

from jaxdelta.errors import UsageError

# The reference's phases: their last layers in a model of 64 layers; otherwise their ends as shares of depth.
_ENDS_64 = (("A", 6), ("B", 9), ("C", 31), ("D", 46), ("E", 58))
_ENDS = (("A", 0.11), ("B", 0.15), ("C", 0.5), ("D", 0.75), ("E", 0.92))
_LAST = "tail"
_ITEM = re.compile(r"([^\s:,]+):(\d{1,18})(?:-(\d{1,18}))?")


def default_phases(num_layers: int) -> tuple[str, ...]:
    """The reference's phase of each layer."""
    return tuple(_default_phase(layer, num_layers) for layer in range(num_layers))


def parse_phases(text: str, num_layers: int) -> tuple[str, ...]:
    """The phase of each of the layers 0..num_layers-1, from a map such as `A:0-6,B:7-9,C:10`.

    Raises:
        UsageError: the map cannot be read, leaves layers out, or names a layer twice or an unknown layer.
    """
    phases: dict[int, str] = {}
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise UsageError(
                f"phases: cannot read {item.strip()!r}; write NAME:FIRST-LAST, as in A:0-6,B:7-9"
            )
        name, first, last = match[1], int(match[2]), int(match[3] or match[2])
        if last < first:
            raise UsageError(f"phases: {item.strip()!r} ends before it begins")
        if last >= num_layers:
            raise UsageError(
                f"phases: {item.strip()!r} names layer {last}; the model's last is {num_layers - 1}"
            )
        for layer in range(first, last + 1):
            if layer in phases:
                raise UsageError(f"phases: layer {layer} is in {phases[layer]} and in {name}")
            phases[layer] = name
    if missing := [str(layer) for layer in range(num_layers) if layer not in phases]:
        raise UsageError(f"phases: no phase for layer{'s' * (len(missing) > 1)} {', '.join(missing)}")
    return tuple(phases[layer] for layer in range(num_layers))


def _default_phase(layer: int, num_layers: int) -> str:
    if num_layers == 64:
        return next((name for name, end in _ENDS_64 if layer <= end), _LAST)
    return next((name for name, end in _ENDS if layer / num_layers < end), _LAST)


@dataclasses.dataclass(frozen=True)
class Phases:
    """The phase of each layer."""

    of_layer: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Every phase once, in order."""
        return list(dict.fromkeys(self.of_layer))

    @property
    def members(self) -> Bool[np.ndarray, "P N"]:
        """Mask of the layers of each phase."""
        return np.array([[phase == name for phase in self.of_layer] for name in self.names])
