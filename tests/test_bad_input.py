"""Whatever is wrong with the input: one line on standard error, a status that tells, and no file.

Most runs are in this process, as `python scripts/delta_svd.py` would be but for the imports; what concerns
the process itself (signals, pipes, full disks) runs in one of its own.
"""

import contextlib
import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import app, flags
from safetensors.numpy import load_file, save_file

from jaxdelta.utils import cli

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "delta_svd.py"
TEXT = "The cat sat on the mat, and looked at the moon."
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Run = Callable[..., tuple[int, str, str]]
Spoil = Callable[[Path], Any]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """run(*arguments) -> exit status, standard output, standard error of the script."""
    monkeypatch.setattr(app, "faulthandler", None)  # pytest has its own
    monkeypatch.setattr(cli, "keep_compiled", lambda: None)  # nor may tests write to the user's cache

    def run_script(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        defined = set(flags.FLAGS)
        hooks = sys.excepthook, sys.unraisablehook
        handlers = {sent: signal.getsignal(sent) for sent in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        try:
            with pytest.raises(SystemExit) as exited:
                runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            sys.excepthook, sys.unraisablehook = hooks
            for sent, handler in handlers.items():
                signal.signal(sent, handler)
            # JAX's own flags stay, as JAX defines them only once; all are as if they had not been given.
            for name in set(flags.FLAGS) - defined:
                if not name.startswith("jax_"):
                    delattr(flags.FLAGS, name)
            for name in flags.FLAGS:
                flags.FLAGS[name].unparse()
        assert isinstance(exited.value.code, int | None)
        return exited.value.code or 0, *capfd.readouterr()

    yield run_script


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the JSON is to be, in a directory of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "a.json"


@pytest.fixture
def fails(run: Run, out: Path, text: Path, tiny_checkpoint: Path) -> Callable[..., str]:
    """fails(status, flag=value, ...) -> the one line. Flags that are not given have values that work."""

    def check(status: int, *arguments: str, **given: Any) -> str:
        values = {"model": tiny_checkpoint, "calibration": text, "out": out, "top_k": 2} | given
        named = [f"--{name}={value}" for name, value in values.items() if value is not None]
        found, _, stderr = run(*named, *arguments)
        assert_one_line(stderr)
        assert found == status
        assert not list(out.parent.iterdir())
        return stderr

    return check


def assert_one_line(stderr: str) -> None:
    assert stderr.startswith("delta_svd.py: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1


@pytest.fixture
def spoilt(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[Spoil], Path]:
    """spoilt(spoil): a copy of the tiny checkpoint that `spoil` has been let loose on."""

    def make(spoil: Spoil) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(tiny_checkpoint, directory)
        spoil(directory)
        return directory

    return make


def test_what_works(run: Run, tiny_checkpoint: Path, text: Path, out: Path) -> None:
    arguments = [f"--model={tiny_checkpoint}", f"--calibration={text}", f"--out={out}", "--top_k=2"]
    status, stdout, stderr = run(*arguments)
    assert (status, stderr) == (0, "")
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.html", "a.json", "a.safetensors"]
    assert stdout.splitlines()[0] == f"Loading {tiny_checkpoint} ..."
    assert (
        stdout.splitlines()[-1]
        == f"Saved: {out}, {out.with_suffix('.safetensors')}, {out.with_suffix('.html')}"
    )
    flags_of_run = json.loads(out.read_text())["run"]["flags"]
    assert (flags_of_run["top_k"], flags_of_run["max_tokens"]) == (2, 2048)


def test_without_the_page_or_with_figures(run: Run, tiny_checkpoint: Path, text: Path, out: Path) -> None:
    arguments = [f"--model={tiny_checkpoint}", f"--calibration={text}", f"--out={out}", "--top_k=2"]
    fast = ["--views=none", "--bootstrap=0", "--null_draws=0"]
    assert run(*arguments, *fast, "--noreport")[0] == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.json", "a.safetensors"]
    figures = out.parent / "figures"
    status, stdout, stderr = run(*arguments, *fast, "--noreport", f"--figures={figures}")
    assert (status, stderr) == (0, "") and stdout.splitlines()[-1].endswith(f", {figures}")
    assert {"norms.png", "norms.pdf", "captions.md"} <= {path.name for path in figures.iterdir()}


# The model


def test_missing_directory(fails: Callable[..., str], tmp_path: Path) -> None:
    for model in (tmp_path / "missing", "./missing", "~/missing/model", "a/b/c"):
        assert f"{model}: no such directory" in fails(1, model=model)


def test_file_as_model(fails: Callable[..., str], tiny_checkpoint: Path) -> None:
    assert f"{WEIGHTS}: is a file" in fails(1, model=tiny_checkpoint / WEIGHTS)


def test_hub_id_without_a_network(fails: Callable[..., str]) -> None:
    """conftest.py puts the hub offline."""
    for revision in (None, "main"):
        line = fails(1, model="jaxdelta-tests/no-such-model", revision=revision)
        assert "jaxdelta-tests/no-such-model: no such directory here" in line
        assert "the hub cannot be reached" in line


def edit_config(**changes: Any) -> Spoil:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))

    return edit


def write(name: str, content: str | bytes) -> Spoil:
    return lambda directory: (directory / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def remove(name: str) -> Spoil:
    return lambda directory: (directory / name).unlink()


def truncate(name: str, keep: float) -> Spoil:
    def cut(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(keep * len(content))])

    return cut


def edit_header(edit: Callable[[dict[str, Any]], None]) -> Spoil:
    """Lets `edit` loose on the header of the safetensors file; the data stay as they are."""

    def rewrite(directory: Path) -> None:
        content = (directory / WEIGHTS).read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        edit(header)
        text = json.dumps(header).encode()
        (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return rewrite


def edit_tensors(edit: Callable[[dict[str, np.ndarray]], Any]) -> Spoil:
    def rewrite(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        edit(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def shift_offsets(header: dict[str, Any]) -> None:
    name = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
    header[name]["data_offsets"] = [offset + 4096 for offset in header[name]["data_offsets"]]


def overlap_offsets(header: dict[str, Any]) -> None:
    names = sorted(
        (name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"]
    )
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def index_of_missing_shards(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": shards}))


def set_value(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].flat[7] = value

    return edit


GATE = "model.layers.2.mlp.gate_proj.weight"

MODELS: dict[str, tuple[Spoil, str]] = {
    "no config": (remove("config.json"), "config.json"),
    "empty config": (write("config.json", ""), "config.json: is not JSON"),
    "binary config": (write("config.json", b"\xff\xfe\x00"), "config.json: is not JSON"),
    "config is a list": (write("config.json", "[]"), "config.json: holds no JSON object"),
    "another family": (
        edit_config(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "config.json: model_type is 'gpt2'",
    ),
    "unknown key": (edit_config(rope_twist=2), "unknown key in config.json: rope_twist"),
    "impossible size": (edit_config(hidden_size=-1), "hidden_size must be a positive integer, not -1"),
    "text for a number": (edit_config(rms_norm_eps="small"), "rms_norm_eps"),
    "other sizes": (edit_config(hidden_size=64), "wrong shape: "),
    "more layers": (
        edit_config(num_hidden_layers=5, layer_types=None),
        "(model.layers.4.input_layernorm.weight, ",
    ),
    "no weights": (remove(WEIGHTS), f"has no {WEIGHTS}"),
    "empty weights": (write(WEIGHTS, ""), f"{WEIGHTS}: is not a whole safetensors file"),
    "truncated weights": (truncate(WEIGHTS, 0.7), f"{WEIGHTS}: is not a whole safetensors file"),
    "truncated header": (truncate(WEIGHTS, 0.001), f"{WEIGHTS}: is not a whole safetensors file"),
    "huge header": (write(WEIGHTS, b"\xff" * 64), f"{WEIGHTS}: is not a whole safetensors file"),
    "shifted offsets": (edit_header(shift_offsets), f"{WEIGHTS}: is not a whole safetensors file"),
    "overlapping offsets": (edit_header(overlap_offsets), f"{WEIGHTS}: is not a whole safetensors file"),
    "lying shape": (
        edit_header(lambda header: header[GATE].update(shape=[80, 47])),
        f"{WEIGHTS}: is not a whole safetensors file",
    ),
    "missing shard": (index_of_missing_shards, "names model-00002-of-00002.safetensors, which is missing"),
    "index is no JSON": (
        lambda directory: (remove(WEIGHTS)(directory), write(INDEX, "{")(directory)),
        f"{INDEX}: cannot be read as an index",
    ),
    "missing tensor": (edit_tensors(lambda tensors: tensors.pop(GATE)), f"missing: {GATE}"),
    "extra tensor": (
        edit_tensors(lambda tensors: tensors.update({"model.layers.0.extra.weight": np.ones(3)})),
        "model.layers.0.extra.weight",
    ),
    "wrong shape": (
        edit_tensors(lambda tensors: tensors.update({GATE: np.ones((80, 47), np.float32)})),
        f"wrong shape: {GATE} is (80, 47), not (80, 48)",
    ),
    "transposed": (
        edit_tensors(lambda tensors: tensors.update({GATE: tensors[GATE].T.copy()})),
        f"wrong shape: {GATE} is (48, 80), not (80, 48)",
    ),
    "integers": (
        edit_tensors(lambda tensors: tensors.update({GATE: np.ones((80, 48), np.int8)})),
        f"{GATE} has dtype I8",
    ),
    "NaN": (edit_tensors(set_value(GATE, np.nan)), GATE),
    "infinity": (edit_tensors(set_value("model.norm.weight", np.inf)), "model.norm.weight"),
    "NaN in the head": (edit_tensors(set_value("lm_head.weight", np.nan)), "lm_head.weight"),
    "NaN in the embedding": (
        edit_tensors(lambda tensors: tensors["model.embed_tokens.weight"].fill(np.nan)),
        "model.embed_tokens.weight",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer"),
    "damaged tokenizer": (write("tokenizer.json", "{"), "tokenizer.json: is not a tokenizer"),
    "smaller vocabulary": (
        lambda directory: (
            edit_config(vocab_size=10)(directory),
            edit_tensors(
                lambda tensors: tensors.update(
                    {name: tensors[name][:10] for name in ("model.embed_tokens.weight", "lm_head.weight")}
                )
            )(directory),
        ),
        "the model has 10: they do not belong together",
    ),
}


@pytest.mark.parametrize(("spoil", "named"), MODELS.values(), ids=MODELS)
def test_spoilt_model(
    fails: Callable[..., str], spoilt: Callable[[Spoil], Path], spoil: Spoil, named: str
) -> None:
    assert named in fails(1, model=spoilt(spoil))


# The text


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", b"", "a.txt: is empty"),
        ("a.txt", b"  \n\n", "a.txt: is empty"),
        ("a.txt", b"a", "has 1 token; at least 2 are needed"),
        ("a.txt", b"caf\xe9", "a.txt: is not UTF-8"),
        ("a.json", b"{}", "a.json: must hold a JSON list of strings"),
        ("a.json", b'["a", ', "a.json: is not JSON"),
        ("a.json", b'["\\ud800 half a character"]', "not Unicode"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'{"body": "a"}', "a.jsonl, line 1: has no 'text', only body; choose with --text_key"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read"),
    ],
)
def test_calibration(
    fails: Callable[..., str], tmp_path: Path, name: str, content: bytes, named: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert named in fails(1, calibration=tmp_path / name)


def test_missing_calibration(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "missing.txt: cannot be read" in fails(1, calibration=tmp_path / "missing.txt")
    assert "has no file of a kind that is read" in fails(1, calibration=tmp_path / "out")
    assert "owner/data: no such file or directory here, and the hub" in fails(1, calibration="owner/data")


def test_impossible_windows(fails: Callable[..., str]) -> None:
    assert "seq_len must be at least 2, not 1" in fails(2, seq_len=1)
    assert "layout" in fails(2, layout="loose")


# The flags


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_k": 47}, "top_k=47 is larger than the rank 46"),
        ({"top_k": "many"}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": ""}, "top_k"),
        ({"max_tokens": 1}, "max_tokens must be at least 2, not 1"),
        ({"max_tokens": "all"}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"phases": "A:0-1,B:3"}, "phases: no phase for layer 2"),
        ({"phases": "A:0-7"}, "phases: 'A:0-7' names layer 7"),
        ({"phases": "all"}, "phases: cannot read 'all'"),
        ({"loader": "bogus"}, "loader"),
        ({"svd": "bogus"}, "svd"),
        ({"last_state": "bogus"}, "last_state"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
        ({"residual_dtype": "int8"}, "residual_dtype"),
        ({"model": None}, "model"),
        ({"out": None}, "out"),
        ({"unknown": 1}, "unknown"),
        ({"topk": 3}, "topk"),
    ],
)
def test_flags(fails: Callable[..., str], given: dict[str, Any], named: str) -> None:
    assert named in fails(2, **given)


def test_arguments(fails: Callable[..., str], run: Run) -> None:
    assert "unexpected argument 'extra'" in fails(2, "extra")
    assert "unexpected argument 'extra'" in fails(2, "--", "extra")
    assert "unexpected argument 'help'" in fails(2, "help")
    assert "unexpected argument 'true'" in fails(2, "true")
    status, _, stderr = run()
    assert_one_line(stderr)
    assert status == 2
    assert "model" in stderr


# The output


def test_out_that_cannot_be(fails: Callable[..., str], tmp_path: Path, text: Path) -> None:
    missing = tmp_path / "missing"
    assert f"{missing}: no such directory" in fails(1, out=missing / "a.json")
    assert not missing.exists()
    assert f"{text}: no such directory" in fails(1, out=text / "a.json")
    assert "cannot be written" in fails(1, out="/proc/a.json")
    assert "cannot be written" in fails(1, out=tmp_path / f"{'a' * 300}.json")
    assert "must end in .json" in fails(2, out=tmp_path / "a.txt")
    assert "out must be a path" in fails(2, out="")
    (tmp_path / "directory.json").mkdir()
    assert "directory.json: is a directory" in fails(1, out=tmp_path / "directory.json")
    assert not list((tmp_path / "directory.json").iterdir())


def test_out_is_tried_before_any_work(run: Run, tmp_path: Path) -> None:
    status, stdout, stderr = run("--model=/nowhere", f"--out={tmp_path / 'missing' / 'a.json'}")
    assert (status, stdout) == (1, "")
    assert "no such directory" in stderr


def test_full_disk(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "cannot be written (No space left on device)" in fails(1)


def test_failure_leaves_earlier_results(
    run: Run, spoilt: Callable[[Spoil], Path], text: Path, out: Path
) -> None:
    out.write_text("before")
    model = spoilt(edit_tensors(set_value(GATE, np.nan)))
    status, _, _ = run(f"--model={model}", f"--calibration={text}", f"--out={out}", "--top_k=2")
    assert status == 1
    assert [path.name for path in out.parent.iterdir()] == ["a.json"]
    assert out.read_text() == "before"


# The process


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For processes: a cache of compiled programs of their own."""
    return os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def arguments(tiny_checkpoint: Path, text: Path, out: Path) -> list[str]:
    """A command that works."""
    flags = [f"--model={tiny_checkpoint}", f"--calibration={text}", f"--out={out}", "--top_k=2"]
    return after("signal.signal(signal.SIGINT, signal.default_int_handler)", [str(SCRIPT), *flags])


def after(preparation: str, script: list[str]) -> list[str]:
    """A command that runs the script after `preparation`. (Tests in the background ignore SIGINT.)"""
    start = "import os, resource, signal, sys; {}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return [sys.executable, "-c", start.format(preparation), *script]


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    process = subprocess.Popen(command, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def finished(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_help_and_unknown_flag(environment: dict[str, str]) -> None:
    found = finished([sys.executable, str(SCRIPT), "--help"], environment)
    assert found.stderr == ""
    assert "Measures what each layer of a language model writes" in found.stdout
    for name in ("model", "out", "calibration", "top_k", "last_state", "svd", "phases"):
        assert f"--{name}" in found.stdout
    found = finished([sys.executable, str(SCRIPT), "--unknown"], environment)
    assert (found.returncode, found.stdout) == (2, "")
    assert_one_line(found.stderr)


def test_output_in_ascii(arguments: list[str], environment: dict[str, str], out: Path) -> None:
    """A terminal without δ and → is no reason to lose the result."""
    found = finished(arguments, environment | {"PYTHONIOENCODING": "ascii"})
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.isascii()
    assert out.exists()


def test_file_size_limit(
    arguments: list[str], environment: dict[str, str], out: Path, tmp_path: Path
) -> None:
    """A disk that is full in the middle of a file: the limit lets no file grow beyond 2 KB."""
    full = environment | {"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))"
    found = finished(after(limit, arguments[3:]), full)
    assert found.returncode == 1
    assert_one_line(found.stderr)
    assert "cannot be written (File too large)" in found.stderr
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (signal.SIGINT, 130, "delta_svd.py: interrupted; nothing was written\n"),
        (signal.SIGTERM, 143, ""),
    ],
)
def test_signal_in_the_middle(
    arguments: list[str],
    environment: dict[str, str],
    out: Path,
    sent: signal.Signals,
    status: int,
    said: str,
) -> None:
    with started(arguments, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("Loading")
        assert process.stdout.readline().split()[0] == "open"
        process.send_signal(sent)
        _, stderr = process.communicate()
    assert process.returncode == status
    assert stderr == said
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("module", ["absl", "jax", "flax", "numpy"])
def test_interrupted_at_start(
    arguments: list[str], environment: dict[str, str], out: Path, tmp_path: Path, module: str
) -> None:
    """A stand-in for a module interrupts the process while it is imported."""
    (tmp_path / "first" / module).mkdir(parents=True)
    (tmp_path / "first" / module / "__init__.py").write_text(
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    found = finished(arguments, environment | {"PYTHONPATH": f"{tmp_path / 'first'}{os.pathsep}{ROOT}"})
    assert found.returncode == 130
    assert found.stderr == "delta_svd.py: interrupted; nothing was written\n"
    assert not list(out.parent.iterdir())


def test_reader_goes_away(arguments: list[str], environment: dict[str, str]) -> None:
    """`delta_svd.py | head -1`"""
    with started(arguments, env=environment) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("Loading")
        process.stdout.close()
        stderr = process.stderr.read()
        process.wait()
    assert stderr == ""
    assert process.returncode == 1


def test_output_device_is_full(arguments: list[str], environment: dict[str, str], out: Path) -> None:
    with open("/dev/full", "w") as full, started(arguments, stdout=full, env=environment) as process:
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert_one_line(stderr)
    assert "No space left on device" in stderr
    assert not list(out.parent.iterdir())


def test_output_device_is_full_but_nothing_is_said(
    arguments: list[str], environment: dict[str, str], out: Path
) -> None:
    quiet = [*arguments, "--quiet"]
    with open("/dev/full", "w") as full, started(quiet, stdout=full, env=environment) as process:
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")
    assert out.exists()
