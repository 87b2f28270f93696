"""Measurements of several sides in turn, and two sides compared by the ratio of their medians."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Comparison = dict[str, Any]  # one entry of a file of results
T = TypeVar("T")


def in_turn(
    sides: Mapping[str, Callable[[], T]], repeats: int, *, warm_up: bool = True
) -> dict[str, list[T]]:
    """Measures every side, A B A B ..., so that a machine whose speed drifts affects all of them alike.

    Args:
        sides: by name, a function that returns one measurement.
        repeats: measurements of each side.
        warm_up: whether each side first runs once, uncounted.
    """
    if warm_up:
        for measure in sides.values():
            measure()
    rounds = [{name: measure() for name, measure in sides.items()} for _ in range(repeats)]
    return {name: [one[name] for one in rounds] for name in sides}


def compared(title: str, sides: Mapping[str, Sequence[float]], unit: str = "s") -> Comparison:
    """Prints and returns the second side relative to the first: the ratio of medians, and that of each round.

    Args:
        title: what was measured.
        sides: the measurements of two sides, by name, in the order of the rounds.
        unit: `s` or `GB`.
    """
    first, second = sides.values()
    paired = [b / a for a, b in zip(first, second, strict=True)]
    ratio = statistics.median(second) / statistics.median(first)
    print(title)
    for name, side in sides.items():
        extremes = f"({min(side):.3f} .. {max(side):.3f})"
        print(f"   {name:<16} median {statistics.median(side):8.3f} {unit}   {extremes}")
    print(f"   ratio {ratio:.3f}   (paired {', '.join(f'{one:.3f}' for one in paired)})", flush=True)
    measured: Comparison = {"seconds": [*first], "seconds_beside": [*second]}
    if unit == "GB":
        measured = {"gigabytes": dict(sides)}
    return {"title": title, "sides": [*sides], **measured, "ratio": ratio, "paired_ratios": paired}


def timed(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """The seconds that `work` takes; `before` runs first, untimed."""
    before()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
