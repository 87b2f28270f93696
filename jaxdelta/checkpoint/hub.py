"""A model's name -> the directory of its files: `demo`, a local directory, or a hub id.

Of a hub repository only the configuration, the tokenizer and one set of weights are fetched.
"""

import json
import os
from importlib import resources
from pathlib import Path

from jaxdelta.errors import JaxDeltaError, UsageError, plain_errors
from jaxdelta.utils.hub import GATED, HUB_ID, silent

DEMO = "demo"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ORBAX = "orbax"  # a directory
TORCH_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
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
        raise JaxDeltaError(f"{model}: is a file; give the directory that holds config.json and the weights")
    if not HUB_ID.fullmatch(model):
        raise JaxDeltaError(f"{model}: no such directory")
    return _fetch(model, revision)


def _fetch(repo: str, revision: str | None) -> Path:
    """Fetches a repository; the hub's errors become one line each."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    unreachable = errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HfHubHTTPError
    messages = {
        errors.GatedRepoError: GATED,
        errors.RevisionNotFoundError: "{}: has no revision {revision!r} on the hub",
        errors.RepositoryNotFoundError: "{}: no such directory here and no such model on the hub (if it is "
        "private: `hf auth login`)",
        errors.RemoteEntryNotFoundError: "{}: the hub's repository{at} has no config.json, or a shard is "
        "missing",
        unreachable: "{}: no such directory here, not in the hub's local cache{at}, and the hub cannot be "
        "reached; check the network, or give a local directory",
        errors.HFValidationError: "{}: no such directory, and no valid hub id",
        (OSError, errors.HTTPError): "{}: cannot be fetched from the hub ({})",
    }
    at = f" at revision {revision}" if revision else ""
    with silent(logging), plain_errors(repo, messages, revision=revision, at=at):
        return _fetch_files(repo, revision)


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

    directory = get(CONFIG).parent
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
    wrong = (OSError, ValueError, KeyError, TypeError, AttributeError)
    with plain_errors(index, {wrong: "{}: cannot be read as an index of shards ({})"}, reason=repr):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map names no files")
    return sorted(names)
