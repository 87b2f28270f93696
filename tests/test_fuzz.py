"""A part of the mutations of `fuzz.py`: each file is read, or refused in a short message."""

from pathlib import Path

import fuzz
import pytest

COUNT = 5000  # over all kinds


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return fuzz.prepare(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", fuzz.targets())
def test_a_mutated_file_is_read_or_refused(kind: str, places: dict[str, Path]) -> None:
    targets = fuzz.targets()
    assert fuzz.run(kind, targets[kind], places[kind], range(COUNT // len(targets))) == []
