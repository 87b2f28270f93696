"""Where the residual stream of a text waits between two layers, block by block: on the device as long as it
fits, else on the host, else in files."""

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxdelta.errors import JaxDeltaError
from jaxdelta.utils.arrays import AnyArray
from jaxdelta.utils.files import locked
from jaxdelta.utils.read_ahead import read_ahead

PLACES = ("device", "host", "scratch")


class State(NamedTuple):
    """A block's residual stream, and the sum of all updates it has had."""

    h: Float[AnyArray, "B T D"]
    written: Float32[AnyArray, "B T D"]


@contextlib.contextmanager
def scratch_directory(parent: str | None, place: str) -> Iterator[Path | None]:
    """A directory of the run's own for states that wait in files, gone when it ends; None where none do.

    Those of runs that were killed are removed: nobody holds them.

    Raises:
        JaxDeltaError: it cannot be made.
    """
    if place != "scratch" or parent is None:
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
    # It has another name until it is held: nobody takes it for one that was left.
    with tempfile.TemporaryDirectory(prefix=".jaxdelta-scratch-", dir=parent) as made, locked(Path(made)):
        path = Path(made).rename(parent / Path(made).name.removeprefix("."))
        try:
            yield path
        finally:
            path.rename(made)


def own_copy(part: np.ndarray) -> Array:
    """On the device, in memory of its own: what is donated may be written over."""
    return jax.device_put(part, may_alias=False)


class States:
    """The blocks' states: `states[block] = state` keeps one in its place, `in_turn` gives them back.

    `fetch` brings an array to the host, `put` one to the device.

    Raises:
        JaxDeltaError: a file in the scratch directory cannot be written.
    """

    def __init__(self, place: str = "device", directory: Path | None = None):
        self._place, self._directory = place, directory
        self.fetch: Callable[[Any], np.ndarray] = np.asarray
        self.put: Callable[[Any], Array] = own_copy
        self._kept: dict[int, State] = {}
        self._forms: dict[int, list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}

    def __setitem__(self, block: int, state: State) -> None:
        if self._place == "device":
            self._kept[block] = state
            return
        state = State(*map(self.fetch, state))
        if self._place == "host":
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

    def in_turn(self, count: int) -> Generator[State, None, None]:
        """The states of blocks 0 .. count - 1; those that are not on the device arrive there ahead."""
        if self._place == "device":
            yield from (self._kept[block] for block in range(count))
        else:
            yield from read_ahead(self._load, count)

    def settle(self) -> None:
        """Waits until all are computed."""
        jax.block_until_ready(list(self._kept.values()))

    def _load(self, block: int) -> State:
        return State(*map(self.put, self._read(block)))

    def _read(self, block: int) -> State:
        if self._place == "host":
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
