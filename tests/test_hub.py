"""Hub ids: which files are fetched, and what is said when they cannot be. The hub is a directory here."""

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoints import one_line, to_torch_file
from huggingface_hub import errors

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.checkpoint import load_model
from jaxdelta.errors import UsageError

REPO = "owner/model-1.7B"
OFFLINE = (
    "no such directory here, not in the hub's local cache, and the hub cannot be reached; check the network"
)


class Hub:
    """Serves a directory in place of huggingface_hub.hf_hub_download, and remembers what was asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.asked: list[str] = []
        self.revisions: set[str | None] = set()
        self.absent: Callable[[str], Exception] = lambda name: http_error(errors.RemoteEntryNotFoundError)

    def download(self, repo: str, name: str, *, revision: str | None = None) -> str:
        assert repo == REPO
        self.asked.append(name)
        self.revisions.add(revision)
        if not (self.directory / name).exists():
            raise self.absent(name)
        return str(self.directory / name)

    @property
    def fetched(self) -> list[str]:
        return sorted(name for name in self.asked if (self.directory / name).exists())


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    response: Any = types.SimpleNamespace(headers={}, request=None)
    return kind("404 Client Error.\n\nOn several lines.", response=response)


@pytest.fixture
def server(small: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    server = Hub(small)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", server.download)
    return server


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def shard(directory: Path) -> None:
    """The weights under the names that a sharded checkpoint gives them; the last shard is not used."""
    (directory / hub.WEIGHTS).rename(directory / "model-00001-of-00003.safetensors")
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"")
    (directory / "model-00003-of-00003.safetensors").write_bytes(b"")
    names = {"a": "model-00002-of-00003.safetensors", "b": "model-00001-of-00003.safetensors"}
    (directory / hub.INDEX).write_text(json.dumps({"weight_map": names | {"c": names["b"]}}))


def test_one_file(server: Hub) -> None:
    (server.directory / "tokenizer_config.json").write_text("{}")
    for name in ("pytorch_model.bin", "vocab.json", "merges.txt", "README.md", "model.gguf", hub.INDEX):
        (server.directory / name).write_text("is not needed")
    assert load_model(REPO, revision="v1").config.num_layers == 2
    assert server.asked == ["config.json", *hub.TOKENIZER_FILES, "model.safetensors"]
    assert server.revisions == {"v1"}


def test_shards(server: Hub) -> None:
    shard(server.directory)
    (server.directory / "pytorch_model.bin").write_text("is not needed")
    assert hub.resolve(REPO) == server.directory
    shards = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]
    assert server.fetched == ["config.json", *shards, hub.INDEX, "tokenizer.json", "tokenizer_config.json"]
    assert server.revisions == {None}


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files(shards: int, server: Hub) -> None:
    to_torch_file(server.directory, shards)
    assert load_model(REPO).config.num_layers == 2
    files = {1: ["pytorch_model.bin"]}.get(
        shards, ["pytorch_model-0.bin", "pytorch_model-1.bin", "pytorch_model.bin.index.json"]
    )
    assert server.fetched == ["config.json", *files, "tokenizer.json", "tokenizer_config.json"]


def test_an_older_tokenizer(server: Hub) -> None:
    (server.directory / "tokenizer.json").unlink()
    older = [
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "vocab.json",
    ]
    for name in older:
        (server.directory / name).write_text("")
    hub.resolve(REPO)
    assert server.fetched == sorted([*older, "config.json", "model.safetensors", "tokenizer_config.json"])


def test_a_sharded_model_in_the_cache_needs_no_network(server: Hub) -> None:
    """Offline, what the repository lacks looks like what was never fetched."""
    shard(server.directory)
    server.absent = lambda name: errors.LocalEntryNotFoundError(f"{name}: not in the cache")
    assert hub.resolve(REPO) == server.directory


def test_half_a_model_in_the_cache(server: Hub) -> None:
    (server.directory / hub.WEIGHTS).unlink()
    server.absent = lambda name: errors.LocalEntryNotFoundError(f"{name}: not in the cache")
    assert one_line(hub.resolve, REPO).startswith(f"{REPO}: {OFFLINE}")


def test_a_missing_shard(server: Hub) -> None:
    shard(server.directory)
    (server.directory / "model-00001-of-00003.safetensors").unlink()
    assert "or a shard is missing" in one_line(hub.resolve, REPO)


def test_no_weights(server: Hub) -> None:
    (server.directory / hub.WEIGHTS).unlink()
    message = one_line(hub.resolve, REPO)
    assert message.startswith(f"{REPO}: the hub's repository has no model.safetensors, no pytorch_model.bin")


def test_a_damaged_index(server: Hub) -> None:
    shard(server.directory)
    (server.directory / hub.INDEX).write_text("{")
    assert "model.safetensors.index.json: cannot be read as an index of shards" in one_line(hub.resolve, REPO)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError), "is gated; accept its terms on the hub"),
        (http_error(errors.RepositoryNotFoundError), "no such directory here and no such model on the hub"),
        (http_error(errors.RevisionNotFoundError), "has no revision 'v9' on the hub"),
        (
            http_error(errors.RemoteEntryNotFoundError),
            "the hub's repository at revision v9 has no config.json",
        ),
        (http_error(errors.HfHubHTTPError), "the hub cannot be reached"),
        (errors.LocalEntryNotFoundError("Cannot find."), "not in the hub's local cache at revision v9, and"),
        (errors.OfflineModeIsEnabled("Offline."), "not in the hub's local cache at revision v9, and the hub"),
        (errors.HFValidationError("Not so."), "no such directory, and no valid hub id"),
        (errors.HTTPError("Read timed out."), "cannot be fetched from the hub (Read timed out.)"),
        (OSError(28, "No space left on device"), "cannot be fetched from the hub (No space left"),
    ],
)
def test_errors_of_the_hub(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, error)
    said = one_line(hub.resolve, REPO, "v9")
    assert said.startswith(f"{REPO}: ")
    assert message in said


def test_the_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself, with an empty cache and HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert one_line(hub.resolve, REPO).startswith(f"{REPO}: {OFFLINE}")


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "owner/",
        "/nowhere/at/all",
        "./here",
        "../there",
        "what is this",
        "a:b",
        "~nobody/x",
        "é" * 999,
    ],
)
def test_what_can_be_no_hub_id_is_a_missing_directory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, AssertionError("the hub was asked"))
    assert one_line(hub.resolve, name) == f"{name}: no such directory"


def test_an_empty_name_is_not_the_working_directory() -> None:
    with pytest.raises(UsageError, match="model is empty"):
        hub.resolve("")


def test_a_directory_comes_before_the_hub(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert hub.resolve(tiny_checkpoint.name) == Path(tiny_checkpoint.name)
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    assert hub.resolve(f"~/{tiny_checkpoint.name}") == tiny_checkpoint
