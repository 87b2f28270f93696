"""What lies in a directory that has no weights to read: a sentence that names it, and the path or command."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.safetensors_files import safetensors_files, shard_files
from jaxdelta.errors import JaxDeltaError, listed, plain_errors
from jaxdelta.utils.files import check_whole

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".zip", ".7z")
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.(safetensors|bin)")
_VARIANT = re.compile(r"(model|pytorch_model)\.(\w+)\.(safetensors|bin)")
_OTHERS = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".npz": "MLX or NumPy", ".ot": "Rust"}
_UNFINISHED = (".incomplete", ".part", ".aria2", ".crdownload", ".partial")


def check_readable(directory: Path) -> None:
    """Fails unless the directory has weights, of any format, that are whole.

    Raises:
        JaxDeltaError: a file is a git-lfs pointer, a link to nothing or missing, or there are no weights; the
            message says what there is instead.
    """
    weights = [directory / name for name in hub.TORCH_WEIGHTS if _is_there(directory / name)]
    weights += sorted(directory.glob("*.gguf"))
    for file in weights:
        check_whole(file)
        for shard in shard_files(file) if file.suffix == ".json" else ():
            check_whole(shard)
    if not weights and not safetensors_files(directory):
        raise JaxDeltaError(f"{directory}: {_described(directory)}")


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _described(directory: Path) -> str:
    with plain_errors(directory, {OSError: "{}: cannot be read ({})"}):
        names = sorted(path.name for path in directory.iterdir())
    for describe in _KINDS:
        for sentence in describe(directory, names):
            return sentence
    if hub.CONFIG not in names:
        return f"has no {hub.CONFIG}; is it a model's directory?"
    return f"has no {hub.WEIGHTS}, nor any other weights"


def _empty(directory: Path, names: list[str]) -> Iterator[str]:
    if not names:
        yield "is empty; give the directory that holds config.json and the weights"


def _hub_cache(directory: Path, names: list[str]) -> Iterator[str]:
    """`models--owner--name`, or a folder of a cache."""
    if "snapshots" in names:
        revisions = [path for path in (directory / "snapshots").glob("*") if path.is_dir()]
        newest = max(revisions, key=lambda path: path.stat().st_mtime, default=None)
        if newest:
            yield f"is a model in the hub's cache; give its snapshot: {newest}"
        yield "is a model in the hub's cache without a snapshot; fetch it again (`hf download`)"
    models = [name for name in names if name.startswith("models--")]
    if models:
        yield f"is the hub's cache; give a hub's id: {listed([_hub_id(name) for name in models], 'models')}"


def _hub_id(name: str) -> str:
    return name.removeprefix("models--").replace("--", "/")


def _deepspeed(directory: Path, names: list[str]) -> Iterator[str]:
    steps = [name for name in names if re.fullmatch(r"global_step[0-9]+", name)]
    states = [name for name in names if re.fullmatch(r".*(mp_rank_\d+_model|optim)_states\.pt", name)]
    if steps or states or "zero_to_fp32.py" in names:
        root = directory if steps or "zero_to_fp32.py" in names else directory.parent
        yield (
            "holds DeepSpeed's states, not weights; make them by: "
            f"cd {shlex.quote(str(root))} && python zero_to_fp32.py . weights --safe_serialization"
        )


def _fsdp(directory: Path, names: list[str]) -> Iterator[str]:
    folders = [directory / name for name in names if re.fullmatch(r"pytorch_model_fsdp_[0-9]+", name)]
    if any(name.endswith(".distcp") for name in names):
        folders = [directory]
    if folders:
        yield (
            "holds FSDP's shards, not weights; make them by: "
            f"accelerate merge-weights {shlex.quote(str(folders[0]))} weights"
        )


def _trainer(directory: Path, names: list[str]) -> Iterator[str]:
    steps = {int(match[1]): name for name in names if (match := re.fullmatch(r"checkpoint-([0-9]+)", name))}
    if steps:
        latest = directory / steps[max(steps)]
        yield f"is a trainer's directory; give one of its checkpoints, such as {latest}"


def _consolidated(directory: Path, names: list[str]) -> Iterator[str]:
    if found := [name for name in names if re.fullmatch(r"consolidated.*\.(safetensors|pth|pt)", name)]:
        yield (
            f"holds {listed(found, 'files')}, the weights in their publisher's own layout; fetch the "
            "repository's model*.safetensors, or convert it with transformers"
        )


def _variants(directory: Path, names: list[str]) -> Iterator[str]:
    for name in names:
        if (match := _VARIANT.fullmatch(name)) and not _SHARD.fullmatch(name):
            plain = f"{match[1]}.{match[3]}"
            link = _command("ln -s", name, directory / plain)
            yield f"holds the weights as {name}; name them {plain}: {link}"


def _shards(directory: Path, names: list[str]) -> Iterator[str]:
    matches = [match for name in names if (match := _SHARD.fullmatch(name))]
    if matches:
        first = matches[0]
        there = {int(match[2]) for match in matches if (match[1], match[3]) == (first[1], first[3])}
        numbers = [i for i in range(1, min(int(first[3]), 999) + 1) if i not in there]
        absent = [f"{first[1]}-{i:05}-of-{first[3]}.{first[4]}" for i in numbers]
        lacking = f"{listed(absent, 'shards')} and " if absent else ""
        yield (
            f"holds shards of weights ({listed([match[0] for match in matches], 'files')}) without "
            f"{lacking}their index; fetch {first[1]}.{first[4]}.index.json from their source"
        )


def _unfinished(directory: Path, names: list[str]) -> Iterator[str]:
    download = directory / ".cache" / "huggingface" / "download"
    inside = [path.name for path in download.glob("*.incomplete")]
    if found := [*(name for name in names if name.endswith(_UNFINISHED)), *inside]:
        yield f"holds an unfinished download ({listed(found, 'files')}); fetch it again (`hf download`)"


def _single_file(directory: Path, names: list[str]) -> Iterator[str]:
    files = [name for name in names if name.endswith(".safetensors")]
    if files:
        plain = _command("ln -s", files[0], directory / hub.WEIGHTS)
        yield f"holds {listed(files, 'files')}, but no {hub.WEIGHTS}; if it has all weights: {plain}"
    if files := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        yield (
            f"holds {listed(files, 'files')}, but no {hub.TORCH_WEIGHTS[0]}; load it with the program that "
            "wrote it, and save it with save_pretrained"
        )


def _archives(directory: Path, names: list[str]) -> Iterator[str]:
    if found := [name for name in names if name.endswith(ARCHIVES)]:
        yield f"holds an archive ({listed(found, 'files')}); unpack it first"


def _other_frameworks(directory: Path, names: list[str]) -> Iterator[str]:
    for name in names:
        if kind := _OTHERS.get(Path(name).suffix):
            yield f"holds weights of {kind} only ({name}); give a checkpoint of safetensors"


def _folders(directory: Path, names: list[str]) -> Iterator[str]:
    for name in names:
        if (directory / name / hub.CONFIG).is_file():
            yield f"has no weights itself; its folder {name} looks like a model: give {directory / name}"


def _command(command: str, target: str, path: Path) -> str:
    return f"{command} {shlex.quote(target)} {shlex.quote(str(path))}"


_KINDS: tuple[Callable[[Path, list[str]], Iterator[str]], ...] = (
    _empty,
    _hub_cache,
    _deepspeed,
    _fsdp,
    _trainer,
    _unfinished,
    _consolidated,
    _shards,
    _variants,
    _single_file,
    _archives,
    _other_frameworks,
    _folders,
)
