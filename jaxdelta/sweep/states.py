"""The residual stream of a text between two layers, block by block: kept on the devices as long as it fits,
else on the host, else in files."""

import contextlib
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32

from jaxdelta.errors import JaxDeltaError
from jaxdelta.sweep.devices import Devices, OneDevice
from jaxdelta.utils.arrays import AnyArray
from jaxdelta.utils.files import locked
from jaxdelta.utils.read_ahead import read_ahead

LOCATIONS = ("device", "host", "scratch")


class State(NamedTuple):
    """A block's residual stream h, and the sum of all updates written into it so far."""

    h: Float[AnyArray, "B T D"]
    written: Float32[AnyArray, "B T D"]


@contextlib.contextmanager
def scratch_directory(parent: str | None, location: str) -> Iterator[Path | None]:
    """A directory for the states of this run, removed when the run ends; None if they are not kept in files.

    Directories left by runs that were killed are removed too: no process holds their locks.

    Args:
        parent: where it is made.
        location: where the states are kept, one of LOCATIONS.

    Raises:
        JaxDeltaError: it cannot be made.
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
    # Until it is locked it has another name, so that no other run takes it for one left behind.
    with tempfile.TemporaryDirectory(prefix=".jaxdelta-scratch-", dir=parent) as made, locked(Path(made)):
        path = Path(made).rename(parent / Path(made).name.removeprefix("."))
        try:
            yield path
        finally:
            path.rename(made)


class States:
    """The states of all blocks: `states[block] = state` stores one, iterating gives them back on the devices.

    On the host and in files a state is this process' windows of a block.

    Args:
        location: where they are kept, one of LOCATIONS.
        directory: where the files lie, if they are kept in files.
        devices: the devices that compute them.

    Raises:
        JaxDeltaError: a file in the directory cannot be written.
    """

    def __init__(
        self, location: str = "device", directory: Path | None = None, devices: Devices | None = None
    ):
        self.location, self._directory = location, directory
        self._devices = devices or OneDevice()
        self._kept: dict[int, State] = {}
        self._forms: dict[int, list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}

    def __setitem__(self, block: int, state: State) -> None:
        if self.location == "device":
            self._kept[block] = self._put(state)
            return
        state = self.fetch(state)
        if self.location == "host":
            self._kept[block] = state
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
        """The states of all blocks in order; while one is in use, the next one is brought to the devices."""
        if self.location == "device":
            yield from (self._kept[block] for block in range(len(self._kept)))
        else:
            yield from read_ahead(self._load, len(self._kept or self._forms))

    def block_until_ready(self) -> None:
        """Waits until all states are computed."""
        jax.block_until_ready(list(self._kept.values()))

    def fetch(self, state: State) -> State:
        """A state on the host: this process' windows."""
        return State(*map(self._devices.fetch, state))

    def _put(self, state: State) -> State:
        """The state on the devices; what is there already stays as it is."""
        return State(*(x if isinstance(x, jax.Array) else self._devices.put_windows(x) for x in state))

    def _load(self, block: int) -> State:
        return self._put(self._read(block))

    def _read(self, block: int) -> State:
        if self.location == "host":
            return self._kept[block]
        with open(self._file(block), "rb") as file:
            parts = [
                np.fromfile(file, dtype, int(np.prod(shape))).reshape(shape)
                for shape, dtype in self._forms[block]
            ]
        return State(*parts)

    def _file(self, block: int) -> Path:
        assert self._directory is not None
        return self._directory / f"state-{block}"
