"""The map from layers to phases: the reference's own, and a user's."""

import re

import pytest

from jaxdelta.errors import UsageError
from jaxdelta.statistics.across_layers.phases import default_phases, parse_phases


def reference_phase(layer: int, layers: int) -> str:
    """The definitions, in integers: layer/layers < 0.11 is 100·layer < 11·layers."""
    if layers == 64:
        ranges = {"A": (0, 6), "B": (7, 9), "C": (10, 31), "D": (32, 46), "E": (47, 58), "tail": (59, 63)}
        return next(name for name, (first, last) in ranges.items() if first <= layer <= last)
    ends = {"A": 11, "B": 15, "C": 50, "D": 75, "E": 92, "tail": 101}
    return next(name for name, end in ends.items() if 100 * layer < end * layers)


@pytest.mark.parametrize("layers", range(1, 101))
def test_default_phases(layers: int) -> None:
    phases = default_phases(layers)
    assert phases == tuple(reference_phase(layer, layers) for layer in range(layers))


def test_default_phases_of_known_depths() -> None:
    assert (
        "".join(name[0] for name in default_phases(28)) == "AAAA" + "B" + "C" * 9 + "D" * 7 + "E" * 5 + "tt"
    )
    assert default_phases(4) == ("A", "C", "D", "E")
    assert default_phases(1) == ("A",)
    counts = {name: default_phases(64).count(name) for name in default_phases(64)}
    assert counts == {"A": 7, "B": 3, "C": 22, "D": 15, "E": 12, "tail": 5}


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        ("A:0-3", "AAAA"),
        ("A:0-1,B:2-3", "AABB"),
        ("A:0,B:1,C:2,D:3", "ABCD"),
        ("B:2-3,A:0-1", "AABB"),  # in any order
        (" A:0-1 , B:2-3 ", "AABB"),
        ("A:0,B:1-2,A:3", "ABBA"),  # a phase in two pieces
        ("A:1-1,B:0-0,C:2-3", "BACC"),
        ("A:00-01,B:2-3", "AABB"),
    ],
)
def test_maps(text: str, phases: str) -> None:
    assert parse_phases(text, 4) == tuple(phases)


def test_names_are_free() -> None:
    assert parse_phases("early:0-1,späte-3:2", 3) == ("early", "early", "späte-3")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A:0-1,B:3", "layer 2"),
        ("A:1-3", "layer 0"),
        ("A:1", "layers 0, 2, 3"),
        ("A:0-2,B:2-3", "layer 2 is in A and in B"),
        ("A:0-3,A:0", "layer 0 is in A and in A"),
        ("A:0-4", "'A:0-4' names layer 4; the model's last is 3"),
        ("A:0-3,B:4", "'B:4'"),
        ("A:0-3,B:9999999999-99999999999", "B:9999999999-99999999999"),
        ("A:3-0", "'A:3-0' ends before it begins"),
        ("", "''"),
        ("A:0-3,", "''"),
        ("A", "'A'"),
        ("A:", "'A:'"),
        (":0-3", "':0-3'"),
        ("A:0-", "'A:0-'"),
        ("A:-3", "'A:-3'"),
        ("A:0--3", "'A:0--3'"),
        ("A:0..3", "'A:0..3'"),
        ("A:0-1.5", "'A:0-1.5'"),
        ("A:x-y", "'A:x-y'"),
        ("A=0-3", "'A=0-3'"),
        ("A:0-1;B:2-3", "'A:0-1;B:2-3'"),
        ("A B:0-3", "'A B:0-3'"),
        ("A:0-1 B:2-3", "'A:0-1 B:2-3'"),
        ("A:B:0-3", "'A:B:0-3'"),
        ("A:0-" + "9" * 5000, "'A:0-999"),  # more digits than int() takes
    ],
)
def test_bad_maps(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)) as raised:
        parse_phases(text, 4)
    assert str(raised.value).startswith("phases: ")
