"""Moments that are kept (`--keep_moments`), so that runs over several texts can be put together.

A directory holds run.json and run.safetensors, the run itself; text.safetensors, its tokens; and for each
layer, and at last for the last one normed, layer-000.safetensors, ...: what `Gathered` has.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxdelta.calibration import Tokens
from jaxdelta.errors import JaxDeltaError
from jaxdelta.files import new_directory
from jaxdelta.gathered import Aside, Gathered, Located
from jaxdelta.rows import Sample

RUN, TEXT = "run.json", "text.safetensors"


@contextlib.contextmanager
def keeping(directory: str | None) -> Iterator[Path | None]:
    """The directory to fill, which gets its name when all is in it; None where nothing is to be kept."""
    if directory is None:
        yield None
        return
    with new_directory(Path(directory).expanduser()) as path:
        yield path


def keep_layer(directory: Path, index: int, layer: Gathered) -> None:
    """Writes what is kept of a layer."""
    arrays = {"squares": np.asarray(layer.squares), "sums": layer.sums, "counts": layer.counts}
    arrays |= {f"table.{name}": column for name, column in layer.table.items()}
    arrays |= {f"aside.{name}": part for name, part in layer.aside._asdict().items()}
    (located,) = layer.located
    arrays |= {f"located.{name}": part for name, part in located._asdict().items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, _file(directory, index), {"parts": ",".join(layer.parts)})


def load_layer(directory: Path, index: int, parts: tuple[str, ...]) -> Gathered:
    """Reads it back.

    Raises:
        JaxDeltaError: the file is missing or damaged.
    """
    arrays = _load(_file(directory, index))

    def named(prefix: str) -> dict[str, np.ndarray]:
        start = f"{prefix}."
        return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}

    aside, located = Aside(**named("aside")), Located(**named("located"))
    sums = arrays["squares"], arrays["sums"], arrays["counts"]
    return Gathered(parts, *sums, named("table"), aside, (located,))


def keep_text(directory: Path, sample: Sample) -> None:
    """Writes the tokens, their text, and the groups of those that count."""
    tokens = sample.tokens
    letters = [tokens.text(*place).encode() for place in np.ndindex(tokens.ids.shape)]
    arrays = {
        "ids": tokens.ids,
        "documents": tokens.documents,
        "positions": np.asarray(tokens.positions),
        "owners": np.asarray(sample.owners),
        "letters": np.frombuffer(b"".join(letters), np.uint8),
        "ends": np.cumsum([len(part) for part in letters]),
    }
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / TEXT)


def load_text(directory: Path) -> tuple[Tokens, np.ndarray]:
    """The tokens as one row, and the groups of those that count."""
    arrays = _load(directory / TEXT)
    letters, ends = arrays["letters"].tobytes(), arrays["ends"]

    def text(window: int, place: int) -> str:
        return letters[ends[place - 1] if place else 0 : ends[place]].decode()

    ids, documents, positions = (arrays[name].reshape(1, -1) for name in ("ids", "documents", "positions"))
    return Tokens(ids, documents, text, positions), arrays["owners"]


def _file(directory: Path, index: int) -> Path:
    return directory / f"layer-{index:03}.safetensors"


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except OSError as error:
        raise JaxDeltaError(f"{path}: cannot be read ({error.strerror}); was it kept by a run?") from error
    except SafetensorError as error:
        raise JaxDeltaError(f"{path}: is damaged ({error})") from error
