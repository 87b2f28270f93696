"""Layers in batches, as on an accelerator: the numbers are those of threads, and a stopped run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import bits, differing, run, stopped

from jaxdelta import Analysis
from jaxdelta.run.resume import RUN
from jaxdelta.spectra import scheduler

LAYERS = 8
AT_ONCE = LAYERS // 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def whole(model: Path) -> Analysis:
    """A run in batches that nobody stopped."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scheduler, "in_batches", lambda: True)
        return run(model, None)[0]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs that follow summarise layers in batches; the sizes of these."""
    sizes: list[int] = []
    summarise = scheduler.summarise_batch

    def counted(batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch))
        return summarise(batch, *rest)

    monkeypatch.setattr(scheduler, "in_batches", lambda: True)
    monkeypatch.setattr(scheduler, "summarise_batch", counted)
    return sizes


def test_the_numbers_are_those_of_threads(model: Path, whole: Analysis) -> None:
    """Every statistic, null and interval."""
    threaded, _ = run(model, None)
    differences = differing(threaded, whole)
    assert len(differences) > 5000
    assert max(differences.values()) < 1e-6


def test_no_batch_has_more_than_a_quarter_of_the_layers(model: Path, batches: list[int]) -> None:
    run(model, None)
    assert batches == [AT_ONCE] * 4 + [1]  # the last layer normed is one more


def steps(directory: Path) -> list[Path]:
    """The steps that are whole."""
    return sorted((directory / RUN).glob("step-*.json"))


@pytest.mark.parametrize("layer", [3, 5, 6, 8])
def test_stopped_in_the_middle(
    layer: int, model: Path, whole: Analysis, tmp_path: Path, batches: list[int]
) -> None:
    """It goes on after the batches that were done: all but the newest for sure, which may be computing."""
    assert stopped(model, tmp_path, layer) == []
    done = (layer // AT_ONCE - 1) * AT_ONCE
    newest = int(steps(tmp_path)[-1].stem[-6:]) if steps(tmp_path) else -1
    assert done - 1 <= newest < layer
    found, said = run(model, tmp_path)
    assert said == ([f"resumed after layer {newest}"] if newest >= 0 else [])
    if (newest + 1) % AT_ONCE == 0:
        assert bits(found) == bits(whole)
    else:  # the last layer normed shares a batch, see below
        assert max(differing(found, whole).values()) < 1e-12
    assert not [*tmp_path.iterdir()]


def test_killed_within_a_batch(model: Path, whole: Analysis, tmp_path: Path, batches: list[int]) -> None:
    """A step is whole with its own layer's record; other layers then share a batch."""
    stopped(model, tmp_path, 6)
    newest = steps(tmp_path)[-1]
    newest.unlink()
    batches.clear()
    found, said = run(model, tmp_path)
    start = int(newest.stem[-6:])
    assert said == [f"resumed after layer {start - 1}"] and start % AT_ONCE == 1
    assert batches == [AT_ONCE] * ((LAYERS + 1 - start) // AT_ONCE)
    # A batch of one, as the last layer normed was, is another program, whose last bits differ.
    assert max(differing(found, whole).values()) < 1e-12
