"""Orbax: what is converted is read back bit for bit, by layers, whole or sharded; or fails in one line."""

import asyncio
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import EMBEDDING, HEAD, assert_same, bits, on_disk, one_line, parameters, write
from flax import nnx
from test_checkpoint import BIG, python, write_holes

from jaxdelta import analyze
from jaxdelta.checkpoint import orbax_files
from jaxdelta.checkpoint.checkpoint import load_model, open_checkpoint
from jaxdelta.checkpoint.convert import convert as converted
from jaxdelta.errors import UsageError
from jaxdelta.model.decoder import count_parameters
from jaxdelta.model.families.registry import config_from_dict

SCRIPTS = Path(__file__).parents[1] / "scripts"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices and many portions, as a large model has."""
    monkeypatch.setattr(orbax_files, "VOCAB_SLICE", 47)
    monkeypatch.setattr(orbax_files, "PORTION", 60_000)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A converted checkpoint of two layers, not to be written to; its original is beside it."""
    directory = tmp_path_factory.mktemp("stored")
    make_checkpoint(directory / "original", num_hidden_layers=2, dtype="bfloat16")
    converted(str(directory / "original"), directory / "orbax")
    return directory / "orbax"


@pytest.mark.parametrize(
    "overrides",
    [
        {"dtype": "bfloat16", "attention_bias": True},
        {"dtype": "float16", "tie_word_embeddings": True},
        {"dtype": "float32"},
    ],
)
def test_round_trip(
    overrides: dict[str, Any], tmp_path: Path, make_checkpoint: Callable[..., Path], cut: None
) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    wanted = on_disk(make_checkpoint(original, **overrides))
    converted(str(original), copy)
    found = open_checkpoint(str(copy))
    assert found.config == open_checkpoint(str(original)).config
    assert_same(parameters(found.load()), wanted)
    for i in range(4):
        prefix = f"model.layers.{i}."
        layer = {prefix + ".".join(path): v[...] for path, v in nnx.to_flat_state(found.layer(i))}
        assert_same(layer, {name: t for name, t in wanted.items() if name.startswith(prefix)})
    assert {p.name for p in copy.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "orbax",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"original", "copy"}


def test_mixed_dtypes(small: Path, tmp_path: Path) -> None:
    import torch

    tensors = on_disk(small)
    tensors[GATE] = tensors[GATE].to(torch.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float16)
    write(small, tensors)
    converted(str(small), tmp_path / "copy")
    source = open_checkpoint(str(tmp_path / "copy")).source
    assert_same({name: source.read(name) for name in source.specs}, tensors)


def test_a_head_that_is_the_embedding_is_written_once(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    original = make_checkpoint(tmp_path / "original", num_hidden_layers=2, tie_word_embeddings=True)
    tensors = on_disk(original)
    write(original, tensors | {HEAD: tensors[EMBEDDING]})
    converted(str(original), tmp_path / "copy")
    checkpoint = open_checkpoint(str(tmp_path / "copy"))
    assert set(checkpoint.source.specs) == set(tensors)
    # A head of its own is kept, whatever config.json says.
    write(original, tensors | {HEAD: tensors[EMBEDDING] * 2})
    converted(str(original), tmp_path / "own")
    assert_same(parameters(load_model(str(tmp_path / "own"))), on_disk(original))


def test_rows(small: Path, tmp_path: Path, cut: None) -> None:
    """Any rows, of tensors in one slice and in several."""
    converted(str(small), tmp_path / "copy")
    source, wanted = open_checkpoint(str(tmp_path / "copy")).source, on_disk(small)
    for name in (HEAD, GATE, "model.norm.weight"):
        rows = wanted[name].shape[0]
        for start, stop in ((0, None), (0, 1), (46, 48), (47, 94), (3, 200), (rows - 1, rows + 9), (5, 5)):
            np.testing.assert_array_equal(
                bits(source.read(name, start, stop)), bits(wanted[name][start:stop])
            )
    ids = np.array([[3, 255, 0], [94, 93, 3]], np.int32)
    rows = open_checkpoint(str(tmp_path / "copy")).embeddings(ids)
    np.testing.assert_array_equal(bits(rows), bits(wanted[EMBEDDING][ids]))


def test_neighbouring_rows_read_their_slice_once(
    small: Path, tmp_path: Path, cut: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted(str(small), tmp_path / "copy")
    checkpoint, read_into = open_checkpoint(str(tmp_path / "copy")), orbax_files._read_into
    reads = []
    monkeypatch.setattr(orbax_files, "_read_into", lambda *args: (reads.append(args), read_into(*args)))
    checkpoint.embeddings(np.array([[50, 1, 51, 2, 49, 0]], np.int32))
    assert len(reads) == 2


def test_orbax_itself_loads_it(stored: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    assert_same(ocp.load(stored / "orbax"), on_disk(stored.parent / "original"))


def test_analysis_is_the_same(stored: Path, tmp_path: Path) -> None:
    runs = [analyze(str(d), top_k=3, max_tokens=60) for d in (stored.parent / "original", stored)]
    for run, name in zip(runs, ("a", "b"), strict=True):
        run.save(tmp_path / f"{name}.json")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert runs[0].per_layer == runs[1].per_layer


@pytest.mark.parametrize("stored_as", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_numpys(
    stored_as: str, dtype: str, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    original = make_checkpoint(tmp_path / "original", num_hidden_layers=1, dtype=stored_as)
    converted(str(original), tmp_path / "copy", dtype=dtype)
    model = load_model(str(tmp_path / "copy"))
    values = parameters(load_model(str(original)))
    assert_same(parameters(model), {name: v.astype(np.dtype(dtype)) for name, v in values.items()})
    assert model.config.dtype == dtype


def test_numbers_too_large(small: Path, tmp_path: Path) -> None:
    tensors = on_disk(small)
    tensors[GATE][3, 3] = 7e4
    write(small, tensors)
    said = one_line(converted, str(small), tmp_path / "copy", dtype="float16")
    assert f"{GATE}: holds numbers too large for float16" in said
    assert not (tmp_path / "copy").exists()
    converted(str(small), tmp_path / "copy", dtype="bfloat16")
    tensors[GATE][3, 3] = np.inf  # is no smaller in any dtype
    write(small, tensors)
    converted(str(small), tmp_path / "infinite", dtype="float16")
    assert open_checkpoint(str(tmp_path / "infinite")).first_bad_tensor() == GATE


def test_safetensors_do_not_need_orbax(tiny_checkpoint: Path) -> None:
    code = """
import sys
from jaxdelta import load_model
load_model(sys.argv[1])
print(sorted({"orbax.checkpoint", "tensorstore"} & set(sys.modules)))
"""
    assert python(code, tiny_checkpoint) == "[]\n"


# Memory


MEASURE = """
import resource, sys
import jax
import orbax.checkpoint.v1
from jaxdelta.checkpoint import convert, orbax_files
jax.block_until_ready(jax.device_put(0))
orbax_files.PORTION = 8 << 20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert.convert(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_memory(tmp_path: Path) -> None:
    config = config_from_dict(BIG)
    write_holes(config, tmp_path)
    assert 2 * count_parameters(config) > 350e6
    # Orbax and TensorStore take some 40 MB themselves.
    assert int(python(MEASURE.replace(".v1", ""), tmp_path, tmp_path / "copy")) < 100e6
    checkpoint = open_checkpoint(str(tmp_path / "copy"))
    assert not checkpoint.layer(39)["mlp"]["up_proj"]["weight"][...].any()


# Sharded


SHARDED = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from flax import nnx
from jaxdelta import load_model
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
specs = {"layers.mlp.up_proj.weight": (None, "x", "y"), "layers.mlp.down_proj.weight": ("y", None, "x"),
         "embed_tokens.weight": (("x", "y"),), "layers.input_layernorm.weight": ("x", "y")}
place = lambda name, shape: NamedSharding(mesh, PartitionSpec(*specs.get(name, ())))
whole, placed = load_model(sys.argv[1]), load_model(sys.argv[2], sharding=place)
for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (whole, placed))):
    name, shard = ".".join(path), b[...].addressable_shards[0].data.size
    assert b[...].sharding == place(name, a.shape)
    assert shard * (4 if name in specs else 1) == a[...].size, name
    assert a.dtype == b.dtype and np.array_equal(a[...], b[...]), name
print(len(jax.devices()))
"""


@pytest.mark.parametrize("layout", ["orbax", "original"])
def test_shardings(stored: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter straight to its shards, on four devices, from either layout."""
    code = "import os; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'\n" + SHARDED
    assert python(code, stored.parent / "original", stored.parent / layout) == "4\n"


def test_shards_read_only_their_rows(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    checkpoint = open_checkpoint(str(stored))
    mesh, reads = Mesh(np.array(jax.devices()), "x"), []

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        reads.append((name, start, stop))
        return checkpoint.source.read(name, start, stop)

    source = type(checkpoint.source)(checkpoint.source.specs, read)
    spied = type(checkpoint)(checkpoint.directory, checkpoint.config, source)
    spied.load(lambda name, shape: NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 2), "x")))
    assert sorted(r for r in reads if r[0] == EMBEDDING) == [(EMBEDDING, 0, 128), (EMBEDDING, 128, 256)]
    assert sorted(r for r in reads if r[0] == GATE) == [(GATE, 0, 40), (GATE, 40, 80)]


# What is damaged


def read_all(directory: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(str(directory))
    return {name: checkpoint.source.read(name) for name in checkpoint.names}


@pytest.mark.parametrize("size", [None, 0, 0.5, 0.95])
def test_any_file_missing_or_cut(stored: Path, tmp_path: Path, size: float | None) -> None:
    """One line that names the directory; or nothing is lost that is needed."""
    wanted = read_all(stored)
    failed = 0
    for file in [path for path in (stored / "orbax").rglob("*") if path.is_file()]:
        copy = tmp_path / "copy"
        shutil.copytree(stored, copy)
        spoilt = copy / file.relative_to(stored)
        if size is None:
            spoilt.unlink()
        else:
            os.truncate(spoilt, int(file.stat().st_size * size))
        try:
            found = read_all(copy)
        except Exception:
            assert str(copy) in one_line(read_all, copy)
            failed += 1
        else:
            assert_same(found, wanted)
        shutil.rmtree(copy)
    assert failed >= 3


def test_parts_missing(stored: Path, tmp_path: Path, cut: None) -> None:
    from orbax.checkpoint import v1 as ocp

    converted(str(stored), tmp_path / "copy")
    leaves = ocp.load(tmp_path / "copy" / "orbax")

    def said_without(*names: str) -> str:
        shutil.rmtree(tmp_path / "copy" / "orbax")
        ocp.save(tmp_path / "copy" / "orbax", {n: leaf for n, leaf in leaves.items() if n not in names})
        return one_line(load_model, str(tmp_path / "copy"))

    assert f"missing: {GATE}" in said_without(f"{GATE}.rows_000000000", f"{GATE}.rows_000000047")
    assert f"{GATE} lacks its rows from 0 on" in said_without(f"{GATE}.rows_000000000")
    assert f"wrong shape: {GATE} is (47, 48), not (80, 48)" in said_without(f"{GATE}.rows_000000047")
    leaves["model.layers.1.self_attn.q_norm.weight"] = np.ones(16, np.int8)
    assert (
        "model.layers.1.self_attn.q_norm.weight has dtype int8; jaxdelta reads BF16, F16, F32"
        in said_without()
    )


def run(script: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_damage_ends_the_script_in_one_line(stored: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stored, copy)
    [*data] = copy.glob("orbax/*/ocdbt.process_*/d/*")
    for file in data:
        os.truncate(file, file.stat().st_size // 2)
    done = run("delta_svd.py", f"--model={copy}", f"--out={tmp_path / 'a.json'}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"delta_svd.py: {copy}/orbax: ")
    assert done.stderr.count("\n") == 1
    (copy / "config.json").unlink()
    assert "config.json: cannot be read" in one_line(load_model, str(copy))
    shutil.rmtree(stored_orbax := copy / "orbax")
    stored_orbax.mkdir()
    shutil.copy(stored / "config.json", copy)
    assert "it has 0 files */manifest.ocdbt" in one_line(load_model, str(copy))
    assert not (tmp_path / "a.json").exists()


# The output


def test_script(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run("convert_checkpoint.py", f"--model={tiny_checkpoint}", "--out=copy", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("Saved: copy\n")
    assert_same(parameters(load_model(str(tmp_path / "copy"))), on_disk(tiny_checkpoint))
    done = run("convert_checkpoint.py", f"--model={tiny_checkpoint}", "--out=copy", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "copy: is there already" in done.stderr


def test_out_that_cannot_be(small: Path, tmp_path: Path) -> None:
    assert "no such directory; create it first" in one_line(converted, str(small), tmp_path / "a" / "b")
    assert "cannot be written" in one_line(converted, str(small), "/proc/a")
    assert "is there already" in one_line(converted, str(small), small)
    assert "is there already" in one_line(converted, str(small), small / "config.json")
    (tmp_path / "empty").mkdir()
    converted(str(small), tmp_path / "empty")
    assert_same(parameters(load_model(str(tmp_path / "empty"))), on_disk(small))
    with pytest.raises(UsageError, match="dtype must be one of stored, float32"):
        converted(str(small), tmp_path / "b", dtype="int8")


def test_failure_leaves_nothing(small: Path, tmp_path: Path) -> None:
    (small / "config.json").write_text("{")
    assert "config.json: is not JSON" in one_line(converted, str(small), tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_full_disk(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The limit lets no file grow beyond 20 KB."""
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20480, 20480)); "
    script = SCRIPTS / "convert_checkpoint.py"
    code = f"{limit}sys.argv[0] = {str(script)!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    command = [sys.executable, "-B", "-c", code, f"--model={tiny_checkpoint}", f"--out={tmp_path / 'copy'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "copy: cannot be written (File too large)" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(sent: signal.Signals, status: int, tmp_path: Path) -> None:
    """While a portion is being written: nothing is left, under no name."""
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    write_holes(config_from_dict(BIG), model)
    # Tests in the background ignore SIGINT.
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    script = [SCRIPTS / "convert_checkpoint.py", f"--model={model}", f"--out={out / 'copy'}"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", start, *map(str, script)], **pipes)
    while not any(out.rglob("ocdbt.process_*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sent)
    _, stderr = process.communicate()
    assert process.returncode == status, stderr
    assert stderr == ("convert_checkpoint.py: interrupted; nothing was written\n" if sent == 2 else "")
    assert not list(out.iterdir())


@pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
def test_signal_in_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM may come while Orbax makes its event loop: of the half that it then removes Python tells."""

    def interrupted() -> None:
        raise SystemExit(143)

    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(socket, "socketpair", interrupted)
    with pytest.raises(SystemExit), orbax_files.quiet():
        asyncio.SelectorEventLoop()
    gc.collect()
    assert not told


def test_signal_in_coroutine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or while it starts a task, which nobody then waits for."""

    async def task() -> None:
        """Never starts."""

    def interrupted() -> None:
        task()
        raise SystemExit(143)

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # no later test shall be quiet
    with pytest.raises(SystemExit), orbax_files.quiet():
        interrupted()
    task()  # All that is left over is quiet from then on, and after a success nothing is.
    with warnings.catch_warnings(record=True) as told:
        warnings.resetwarnings()
        with orbax_files.quiet():
            task()
        assert not told
        task()
    assert "never awaited" in str(told[0].message)
