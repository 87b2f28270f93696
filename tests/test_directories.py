"""Directories without weights to read: what lies there, and the path or command that helps."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from checkpoints import WEIGHTS, assert_same, on_disk, one_line, parameters, to_torch_file, write

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.checkpoint import load_model, open_checkpoint
from jaxdelta.run.fingerprint import weights_fingerprint
from jaxdelta.text.tokenizer import load_encoder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
LFS = "is a git-lfs pointer, not the file itself; run `git lfs pull`"


def said(directory: Path | str) -> str:
    message = one_line(open_checkpoint, str(directory))
    assert len(message) <= 800
    assert "weights_only" not in message
    return message


def put(*names: str) -> Callable[[Path], None]:
    """A directory with empty files of these names; one that ends in / is a folder."""

    def fill(directory: Path) -> None:
        for name in names:
            path = directory / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_bytes(b"")

    return fill


DIRECTORIES = {
    "empty": (put(), "is empty; give the directory"),
    "a cache's model": (put("refs/main", "snapshots/abc/config.json"), "give its snapshot: {}/snapshots/abc"),
    "a cache's model, not fetched": (put("refs/main", "snapshots/"), "without a snapshot; fetch it again"),
    "a cache": (put("models--Qwen--Qwen3-0.6B/refs/main"), "give a hub's id: Qwen/Qwen3-0.6B"),
    "DeepSpeed": (
        put("zero_to_fp32.py", "latest", "global_step500/mp_rank_00_model_states.pt", "config.json"),
        "cd {} && python zero_to_fp32.py . weights --safe_serialization",
    ),
    "DeepSpeed's states": (
        put("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "holds DeepSpeed's states, not weights",
    ),
    "FSDP": (
        put("pytorch_model_fsdp_0/__0_0.distcp"),
        "accelerate merge-weights {}/pytorch_model_fsdp_0 weights",
    ),
    "FSDP's shards": (
        put("__0_0.distcp", "__1_0.distcp", ".metadata"),
        "accelerate merge-weights {} weights",
    ),
    "consolidated": (put("consolidated.safetensors", "params.json"), "in their publisher's own layout"),
    "consolidated parts": (
        put("consolidated.00.pth", "consolidated.01.pth"),
        "in their publisher's own layout",
    ),
    "fp16": (
        put("config.json", "model.fp16.safetensors"),
        "ln -s model.fp16.safetensors {}/model.safetensors",
    ),
    "bf16": (put("pytorch_model.bf16.bin"), "ln -s pytorch_model.bf16.bin {}/pytorch_model.bin"),
    "shards": (
        put("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "without their index; fetch model.safetensors.index.json",
    ),
    "some shards": (
        put("config.json", "pytorch_model-00001-of-00003.bin", "pytorch_model-00003-of-00003.bin"),
        "without pytorch_model-00002-of-00003.bin and their index; fetch pytorch_model.bin.index.json",
    ),
    "a trainer's": (
        put("checkpoint-500/config.json", "checkpoint-1000/config.json", "trainer_state.json"),
        "is a trainer's directory; give one of its checkpoints, such as {}/checkpoint-1000",
    ),
    "an adapter": (put("adapter_config.json", "adapter_model.safetensors"), "--adapter"),
    "MLX": (put("config.json", "weights.npz"), "holds weights of MLX or NumPy only (weights.npz)"),
    "Flax": (put("config.json", "flax_model.msgpack"), "holds weights of Flax only"),
    "an unfinished download": (
        put("config.json", "model.safetensors.incomplete"),
        "holds an unfinished download",
    ),
    "a download stopped": (
        put("config.json", ".cache/huggingface/download/ab.incomplete"),
        "holds an unfinished download (ab.incomplete); fetch it again",
    ),
    "an archive": (put("model.tar.gz"), "holds an archive (model.tar.gz); unpack it first"),
    "another name": (
        put("config.json", "weights.safetensors"),
        "ln -s weights.safetensors {}/model.safetensors",
    ),
    "another file of PyTorch": (put("config.json", "last.ckpt"), "holds last.ckpt, but no pytorch_model.bin"),
    "a folder inside": (put("model/config.json"), "looks like a model: give {}/model"),
    "no weights": (put("config.json", "tokenizer.json"), "has no model.safetensors, nor any other weights"),
    "no model": (put("README.md"), "has no config.json; is it a model's directory?"),
}


@pytest.mark.parametrize("case", DIRECTORIES.values(), ids=DIRECTORIES)
def test_what_lies_there(case: tuple[Callable[[Path], None], str], tmp_path: Path) -> None:
    fill, words = case
    directory = tmp_path / "model of mine"
    directory.mkdir()
    fill(directory)
    message = said(directory)
    assert message.startswith(f"{directory}: ")
    quoted = (
        f"'{directory}'" if "ln -s" not in words and ("cd " in words or "merge" in words) else str(directory)
    )
    found = message.replace("'", "")
    assert words.replace("{}", quoted).replace("'", "") in found


def test_files_in_place_of_a_directory(small: Path, tmp_path: Path) -> None:
    assert "is a file; give the directory" in said(small / WEIGHTS)
    archive = tmp_path / "model.tar"
    archive.touch()
    assert "is a file; unpack it, if it is an archive, and give the directory" in said(archive)


# Files that stand in for others.


def test_git_lfs_pointers(small: Path) -> None:
    tensors = on_disk(small)
    (small / "tokenizer.json").write_text(POINTER)
    assert f"{small / 'tokenizer.json'}: {LFS}" in one_line(load_encoder, small)
    (small / WEIGHTS).unlink()  # The tensors are still mapped.
    (small / WEIGHTS).write_text(POINTER)
    assert f"{small / WEIGHTS}: {LFS}" in said(small)
    (small / WEIGHTS).unlink()
    index = small / f"{WEIGHTS}.index.json"
    write(small, tensors, "a.safetensors")
    (small / "b.safetensors").write_text(POINTER)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    assert f"{small / 'b.safetensors'}: {LFS}" in said(small)
    index.write_text(POINTER)
    assert f"{index}: {LFS}" in said(small)


def test_a_git_lfs_pointer_of_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(POINTER)
    assert f"{tmp_path / 'model.gguf'}: {LFS}" in said(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_git_lfs_pointers_of_pytorch(shards: int, small: Path) -> None:
    to_torch_file(small, shards)
    file = small / ("pytorch_model.bin" if shards == 1 else "pytorch_model-1.bin")
    file.unlink()
    file.write_text(POINTER)
    assert f"{file}: {LFS}" in said(small)


def test_links_of_a_cache(small: Path, tmp_path: Path) -> None:
    """All files of the hub's cache are links, out of the snapshot's directory."""
    tensors = on_disk(small)
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    write(small, tensors, "model-00001-of-00001.safetensors")
    (small / WEIGHTS).unlink()
    owners = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (small / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": owners}))
    for i, file in enumerate(sorted(small.iterdir())):
        shutil.copy(file, cache / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert_same(parameters(load_model(str(snapshot))), tensors)
    assert f"give its snapshot: {snapshot}" in said(cache)
    digest = weights_fingerprint(open_checkpoint(str(snapshot)))
    shard = snapshot / "model-00001-of-00001.safetensors"
    (snapshot / os.readlink(shard)).unlink()
    assert f"{shard}: is a link to a file that is gone (../../blobs/" in said(snapshot)
    assert digest == weights_fingerprint(open_checkpoint(str(small)))


def test_a_dangling_link_to_a_single_file(small: Path) -> None:
    (small / WEIGHTS).unlink()
    (small / WEIGHTS).symlink_to("../nowhere")
    assert f"{small / WEIGHTS}: is a link to a file that is gone (../nowhere)" in said(small)


def test_an_unsafe_torch_file(small: Path) -> None:
    """PyTorch would advise to load it all the same."""
    import torch

    to_torch_file(small)
    torch.save({"model": os.getcwd}, small / "pytorch_model.bin")
    assert "is damaged, or holds other objects than tensors" in said(small)


# What an index may say.

NAMES = [
    "../b.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a\0b",
    "a/../../b",
    "./m.safetensors",
    "a//b",
    "a\nb",
    "\\x",
]


@pytest.mark.parametrize("name", [*NAMES, "\ud800", "x" * 5000, "folder", "pipe", "out/b.safetensors"])
@pytest.mark.parametrize("index", [hub.INDEX, "pytorch_model.bin.index.json"])
def test_an_index_names_files_of_its_directory(index: str, name: str, small: Path, tmp_path: Path) -> None:
    (small / WEIGHTS).rename(tmp_path / "b.safetensors")
    (small / "folder").mkdir()
    os.mkfifo(small / "pipe")
    (small / "out").symlink_to(tmp_path)
    (small / index).write_text(json.dumps({"weight_map": {"a": name}}))
    message = said(small)
    assert message.isprintable()
    assert message.startswith(f"{small / index}: names ") or "is not a regular file" in message


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_name_outside_is_never_asked_of_a_hub(
    index: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, name: str, *, revision: str | None = None) -> str:
        asked.append(name)
        if not (small / name).exists():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(small / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (small / WEIGHTS).unlink()
    (small / index).write_text(json.dumps({"weight_map": {"a": "m.safetensors", "b": "../../etc/passwd"}}))
    assert "names the file '../../etc/passwd'" in said("owner/name")
    assert asked[-1] == index


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": "m.safetensors"}',
        '{"weight_map": [["a", "m.safetensors"]]}',
        "null",
        "1e999",
        "[" * 100_000,
        '{"weight_map": {"a": ' + "9" * 5000 + "}}",
    ],
)
def test_an_index_that_is_none(text: str, small: Path) -> None:
    (small / WEIGHTS).unlink()
    (small / hub.INDEX).write_text(text)
    assert f"{small / hub.INDEX}: cannot be read as an index of shards (" in said(small)
