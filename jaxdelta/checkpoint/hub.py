"""A model's name -> the directory of its files: `demo`, a local directory, or a hub id.

Of a hub repository only the configuration, the tokenizer and one set of weights are fetched.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jaxdelta.errors import JaxDeltaError, UsageError, plain_errors, short
from jaxdelta.utils.hub import GATED, HUB_ID, silent

DEMO = "demo"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ORBAX = "orbax"  # a directory
TORCH_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ARCHIVES = (".gz", ".tar", ".tgz", ".xz", ".zip", ".zst", ".7z")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
SLOW_TOKENIZER_FILES = ("vocab.json", "merges.txt")
ALL_TOKENIZER_FILES = (*TOKENIZER_FILES, *SLOW_TOKENIZER_FILES, "tokenizer.model", "tekken.json")


def resolve(model: str, revision: str | None = None) -> Path:
    """The local directory of a model's files, fetched first where `model` is a hub id.

    Args:
        model: `demo`, a directory, or `owner/name` on the Hugging Face hub.
        revision: branch, tag or commit on the hub; ignored elsewhere.

    Raises:
        JaxDeltaError: no such directory; the hub has no such model, refuses it, or cannot be reached.
        UsageError: the name is empty.
    """
    if model == DEMO:
        return Path(str(resources.files("jaxdelta") / "data" / "demo"))
    if not model:
        raise UsageError("model is empty; give `demo`, a directory, or a hub id")
    path = Path(os.path.expanduser(model))  # Unlike pathlib's, os.path's functions never raise.
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        unpack = "unpack it, if it is an archive, and " if path.suffix in _ARCHIVES else ""
        raise JaxDeltaError(
            f"{model}: is a file; {unpack}give the directory that holds config.json and the weights"
        )
    if not HUB_ID.fullmatch(model):
        raise JaxDeltaError(f"{model}: no such directory")
    return _fetch(model, revision, partial(_fetch_files, model, revision), CONFIG)


def resolve_adapter(adapter: str) -> Path:
    """The local directory of an adapter's files, fetched first where `adapter` is a hub id.

    Raises:
        JaxDeltaError: no such directory; the hub has no such adapter, refuses it, or cannot be reached.
        UsageError: the name is empty.
    """
    if not adapter:
        raise UsageError("adapter is empty; give a directory, or a hub id")
    path = Path(os.path.expanduser(adapter))
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise JaxDeltaError(f"{adapter}: is a file; give the directory that holds {ADAPTER_CONFIG} and it")
    if not HUB_ID.fullmatch(adapter):
        raise JaxDeltaError(f"{adapter}: no such directory")
    return _fetch(adapter, None, partial(_fetch_adapter, adapter), ADAPTER_CONFIG)


def _fetch(repo: str, revision: str | None, fetch: Callable[[], Path], config: str) -> Path:
    """Fetches a repository, whose first file is `config`; the hub's errors become one line each."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    unreachable = errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HfHubHTTPError
    messages = {
        errors.GatedRepoError: GATED,
        errors.RevisionNotFoundError: "{}: has no revision {revision!r} on the hub",
        errors.RepositoryNotFoundError: "{}: no such directory here and no such model on the hub (if it is "
        "private: `hf auth login`)",
        errors.RemoteEntryNotFoundError: "{}: the hub's repository{at} has no {config}, or a shard is "
        "missing",
        unreachable: "{}: no such directory here, not in the hub's local cache{at}, and the hub cannot be "
        "reached; check the network, or give a local directory",
        errors.HFValidationError: "{}: no such directory, and no valid hub id",
        (OSError, errors.HTTPError): "{}: cannot be fetched from the hub ({})",
    }
    at = f" at revision {revision}" if revision else ""
    with silent(logging), plain_errors(repo, messages, revision=revision, at=at, config=config):
        return fetch()


def _fetch_adapter(repo: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    directory = Path(huggingface_hub.hf_hub_download(repo, ADAPTER_CONFIG)).parent
    try:
        huggingface_hub.hf_hub_download(repo, ADAPTER_WEIGHTS[0])
    except EntryNotFoundError:
        huggingface_hub.hf_hub_download(repo, ADAPTER_WEIGHTS[1])
    return directory


def _fetch_files(repo: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(name: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))

    # Offline, a file missing from the cache cannot be told from one missing from the repository.
    unreachable: list[LocalEntryNotFoundError] = []

    def try_get(name: str) -> Path | None:
        try:
            return get(name)
        except LocalEntryNotFoundError as error:
            unreachable.append(error)
        except EntryNotFoundError:
            pass
        return None

    try:
        directory = get(CONFIG).parent
    except EntryNotFoundError:
        if adapter := try_get(ADAPTER_CONFIG):
            return adapter.parent  # an adapter alone, which open_checkpoint refuses
        raise
    tokenizer = [try_get(name) for name in TOKENIZER_FILES]
    if tokenizer[0] is None:
        for name in SLOW_TOKENIZER_FILES:
            try_get(name)
    for name in (WEIGHTS, INDEX, *TORCH_WEIGHTS):
        if file := try_get(name):
            for shard in shards(file) if file.suffix == ".json" else ():
                get(shard)
            return directory
    if unreachable:
        raise unreachable[-1]
    raise JaxDeltaError(
        f"{repo}: the hub's repository has no {WEIGHTS}, no {TORCH_WEIGHTS[0]}, no index of either"
    )


def shards(index: Path) -> list[str]:
    """The files that an index of weights names, else a JaxDeltaError."""
    return sorted(set(weight_map(index).values()))


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index of weights.

    Raises:
        JaxDeltaError: it is no index, gives a tensor to two files, or names a file outside its directory.
    """
    wrong = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    with plain_errors(index, {wrong: "{}: cannot be read as an index of shards ({})"}, reason=_brief):
        given = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
        files = dict(given["weight_map"].items())
        if not files or not all(isinstance(name, str) for name in files.values()):
            raise ValueError("weight_map names no files")
    for name in files.values():
        if not _is_inside(name):
            raise JaxDeltaError(
                f"{index}: names the file {short(name)!r}, which is no name of a file in its directory"
            )
    return files


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no tensor may be in two files."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise ValueError(f"{short(name)} is in it twice")
    return found


def _is_inside(name: str) -> bool:
    """Whether a path stays below its start: neither absolute nor with `..`, and of printable characters."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."}.intersection(name.split("/"))


def _brief(error: Exception) -> str:
    return short(repr(error), 120)
