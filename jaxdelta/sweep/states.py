"""The residual stream of a text between two layers, in blocks: on the devices, on the host, or in files."""

import contextlib
import math
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32

from jaxdelta.errors import JaxDeltaError
from jaxdelta.sweep.devices import OneDevice
from jaxdelta.sweep.mesh import Devices
from jaxdelta.utils.arrays import AnyArray
from jaxdelta.utils.files import locked
from jaxdelta.utils.read_ahead import read_ahead

LOCATIONS = ("device", "host", "scratch")


class State(NamedTuple):
    """A block's residual stream h, and the sum of all updates so far."""

    h: Float[AnyArray, "B T D"]
    written: Float32[AnyArray, "B T D"]


@contextlib.contextmanager
def scratch_directory(parent: str | None, location: str) -> Iterator[Path | None]:
    """A directory in `parent` for this run's states, removed at its end; None unless `location` is "scratch".

    Also removes directories of killed runs, whose locks are free.

    Raises:
        JaxDeltaError: the directory cannot be made.
    """
    if location != "scratch" or parent is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(_held_directory(Path(parent).expanduser()))
        except OSError as error:
            raise JaxDeltaError(
                f"{parent}: no scratch directory can be made there ({error.strerror})"
            ) from error
        yield path


@contextlib.contextmanager
def _held_directory(parent: Path) -> Iterator[Path]:
    for left in parent.glob("jaxdelta-scratch-*"):
        with contextlib.suppress(OSError), locked(left) as ours:
            if ours:
                for file in left.glob("state-*"):
                    file.unlink()
                left.rmdir()
    # Under another name until it is locked, so that no other run mistakes it for a killed run's.
    with tempfile.TemporaryDirectory(prefix=".jaxdelta-scratch-", dir=parent) as made, locked(Path(made)):
        path = Path(made).rename(parent / Path(made).name.removeprefix("."))
        try:
            yield path
        finally:
            path.rename(made)


class States:
    """The states of all blocks: `states[block] = state` stores one, iteration yields all on the devices.

    `location` is one of LOCATIONS; for "scratch" the files are in `directory`. States on the host and in
    files contain only this process' windows of a block.

    Raises:
        JaxDeltaError: a file cannot be written.
    """

    def __init__(
        self, location: str = "device", directory: Path | None = None, devices: Devices | None = None
    ):
        self.location, self._directory = location, directory
        self._devices = devices or OneDevice()
        self._in_memory: dict[int, State] = {}
        self._forms: dict[int, list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}

    def __setitem__(self, block: int, state: State) -> None:
        if self.location == "device":
            self._in_memory[block] = self._put(state)
            return
        state = self.fetch(state)
        if self.location == "host":
            self._in_memory[block] = state
            return
        self._forms[block] = [(part.shape, part.dtype) for part in state]
        try:
            with open(self._file(block), "wb") as file:
                for part in state:
                    file.write(np.ascontiguousarray(part).tobytes())
        except OSError as error:
            raise JaxDeltaError(
                f"{self._directory}: cannot be written ({error.strerror}); it holds the states, see --scratch"
            ) from error

    def __iter__(self) -> Generator[State, None, None]:
        """The states of all blocks in order; the next one is put on the devices while one is in use."""
        if self.location == "device":
            yield from (self._in_memory[block] for block in range(len(self._in_memory)))
        else:
            yield from read_ahead(self._load, len(self._in_memory or self._forms))

    def block_until_ready(self) -> None:
        """Waits until all states are computed."""
        jax.block_until_ready(list(self._in_memory.values()))

    def fetch(self, state: State) -> State:
        """This process' windows of a state, on the host."""
        return State(*map(self._devices.fetch, state))

    def _put(self, state: State) -> State:
        return State(*(x if isinstance(x, jax.Array) else self._devices.put_windows(x) for x in state))

    def _load(self, block: int) -> State:
        if self.location == "host":
            return self._put(self._in_memory[block])
        with open(self._file(block), "rb") as file:
            forms = self._forms[block]
            parts = [np.fromfile(file, dtype, math.prod(shape)).reshape(shape) for shape, dtype in forms]
        return self._put(State(*parts))

    def _file(self, block: int) -> Path:
        assert self._directory is not None
        return self._directory / f"state-{block}"
