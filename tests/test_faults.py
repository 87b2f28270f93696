"""What goes wrong in the midst of a run ends in one error that names it, and leaves no thread behind."""

import _thread
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdelta import analyze
from jaxdelta.checkpoint.checkpoint import Checkpoint
from jaxdelta.errors import JaxDeltaError
from jaxdelta.sweep.sweep import Sweep
from jaxdelta.utils import read_ahead

TEXT = ["some text to be measured"] * 4
FAULTY = 2  # the layer at which it happens
OURS = ("read-ahead", "spectra", "compile")

At = Callable[[Callable[[], object]], None]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith(OURS)] == []


@pytest.fixture
def model(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def before_layer(monkeypatch: pytest.MonkeyPatch) -> At:
    """before_layer(fault): calls it on the reading thread, just before layer `FAULTY` is read."""

    def inject(fault: Callable[[], object]) -> None:
        read = Checkpoint.layer

        def layer(checkpoint: Checkpoint, index: int) -> object:
            if index == FAULTY:
                fault()
            return read(checkpoint, index)

        monkeypatch.setattr(Checkpoint, "layer", layer)

    return inject


def test_a_file_that_shrinks(model: Path, before_layer: At) -> None:
    before_layer(lambda: os.truncate(model / "model.safetensors", 20_000))
    with pytest.raises(JaxDeltaError, match=r"model\.safetensors: model\.layers\.2\..* has become shorter"):
        analyze(str(model), TEXT)


def test_a_file_that_vanishes(model: Path, before_layer: At) -> None:
    before_layer(lambda: os.unlink(model / "model.safetensors"))
    with pytest.raises(JaxDeltaError, match=r"model\.layers\.2\..* cannot be read \(No such file"):
        analyze(str(model), TEXT)


def test_a_read_error(model: Path, before_layer: At, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before_layer(lambda: monkeypatch.setattr(read_ahead.os, "preadv", fails))
    with pytest.raises(JaxDeltaError, match=r"model\.layers\.2\..* cannot be read \(Input/output error\)"):
        analyze(str(model), TEXT)


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 8 GiB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 8 GiB")],
    ids=["host", "device"],
)
def test_out_of_memory(model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(Sweep, "_pass", fails)
    with pytest.raises(JaxDeltaError, match=r"out of memory \(.*8 GiB\); lower --device_memory_gb"):
        analyze(str(model), TEXT)


def test_other_errors_of_the_device_stay_themselves(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(Sweep, "_pass", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        analyze(str(model), TEXT)


def test_a_state_that_overflows_in_a_layer(model: Path) -> None:
    """All weights are finite, but what layer 2 computes with them is not."""
    file = model / "model.safetensors"
    weights = load_file(file)
    name = f"model.layers.{FAULTY}.mlp.down_proj.weight"
    save_file(weights | {name: np.full_like(weights[name], 1e38)}, file, metadata={"format": "pt"})
    with pytest.raises(JaxDeltaError, match="layer 2 is not finite although all weights are"):
        analyze(str(model), TEXT)


def test_an_interruption_while_reading_ahead(model: Path, before_layer: At) -> None:
    def interrupt() -> None:
        time.sleep(2)  # until the main thread waits for this one
        _thread.interrupt_main()

    before_layer(interrupt)
    # A shell starts what runs in the background with SIGINT ignored, and Python leaves it so.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            analyze(str(model), TEXT)
    finally:
        signal.signal(signal.SIGINT, previous)
