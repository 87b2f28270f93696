"""Files of moments (`--keep_moments`), from which runs over several texts are merged.

A directory holds the run (run.json, run.safetensors), its tokens (text.safetensors), and the `LayerMoments`
of each layer (layer-000.safetensors, ...); the last file is the last layer's with the final norm.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxdelta.errors import JaxDeltaError
from jaxdelta.spectra.channels import ChannelTable
from jaxdelta.spectra.moments.summary import FrameCoordinates, LayerMoments, SetAsideTokens
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.text.tokens import Tokens
from jaxdelta.utils.files import check_new, link_or_copy, new_directory

RUN, TEXT = "run.json", "text.safetensors"


@contextlib.contextmanager
def keeping(directory: str | None, waiting: Path | None = None) -> Iterator[Path | None]:
    """A directory to fill, which gets its name when it is complete; None without a name.

    Args:
        directory: the name.
        waiting: a directory to fill in the meantime; it survives if the run is stopped.
    """
    if directory is None:
        yield None
        return
    wanted = Path(directory).expanduser()
    if waiting is None:
        with new_directory(wanted) as path:
            yield path
        return
    check_new(wanted)
    yield waiting
    with new_directory(wanted) as path:
        for file in waiting.iterdir():
            link_or_copy(file, path / file.name)


def keep_layer(directory: Path, index: int, layer: LayerMoments) -> None:
    """Writes the moments of a layer."""
    directory.mkdir(exist_ok=True)
    arrays = {"squares": np.asarray(layer.squares), "sums": layer.sums, "counts": layer.counts}
    arrays |= {f"table.{name}": column for name, column in layer.table.items()}
    arrays |= {f"aside.{name}": part for name, part in layer.aside._asdict().items()}
    arrays |= {f"channels.{name}": part for name, part in layer.channels._asdict().items()}
    (located,) = layer.located
    arrays |= {f"located.{name}": part for name, part in located._asdict().items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, layer_file(directory, index), {"parts": ",".join(layer.parts)})


def load_layer(directory: Path, index: int, parts: tuple[str, ...]) -> LayerMoments:
    """Reads the moments of a layer.

    Raises:
        JaxDeltaError: the file is missing, damaged, or of another version.
    """
    path = layer_file(directory, index)
    arrays = _load(path)

    def named(prefix: str) -> dict[str, np.ndarray]:
        start = f"{prefix}."
        return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}

    try:
        aside, located = SetAsideTokens(**named("aside")), FrameCoordinates(**named("located"))
        sums = arrays["squares"], arrays["sums"], arrays["counts"]
        channels = ChannelTable(**named("channels"))
    except (TypeError, KeyError) as error:
        raise JaxDeltaError(f"{path}: was kept by another version of jaxdelta; run it again") from error
    return LayerMoments(parts, *sums, named("table"), aside, (located,), channels)


def keep_text(directory: Path, sample: ResamplingGroups) -> None:
    """Writes the tokens, their text, and the groups of the counted tokens."""
    tokens = sample.tokens
    letters = [tokens.text(*place).encode() for place in np.ndindex(tokens.ids.shape)]
    arrays = {
        "ids": tokens.ids,
        "documents": tokens.documents,
        "positions": np.asarray(tokens.positions),
        "owners": np.asarray(sample.group_of_token),
        **({} if tokens.measured is None else {"measured": tokens.measured}),
        "letters": np.frombuffer(b"".join(letters), np.uint8),
        "ends": np.cumsum([len(part) for part in letters]),
    }
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / TEXT)


def load_text(directory: Path) -> tuple[Tokens, np.ndarray]:
    """The tokens as one row, and the groups of the counted tokens."""
    arrays = _load(directory / TEXT)
    letters, ends = arrays["letters"].tobytes(), arrays["ends"]

    def text(window: int, place: int) -> str:
        return letters[ends[place - 1] if place else 0 : ends[place]].decode()

    ids, documents, positions = (arrays[name].reshape(1, -1) for name in ("ids", "documents", "positions"))
    measured = arrays["measured"].reshape(1, -1) if "measured" in arrays else None
    return Tokens(ids, documents, text, positions, measured=measured), arrays["owners"]


def layer_file(directory: Path, index: int) -> Path:
    """The path of a layer's moments."""
    return directory / f"layer-{index:03}.safetensors"


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except OSError as error:
        raise JaxDeltaError(f"{path}: cannot be read ({error.strerror}); was it kept by a run?") from error
    except SafetensorError as error:
        raise JaxDeltaError(f"{path}: is damaged ({error})") from error
