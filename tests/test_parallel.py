"""Several devices and several processes: the numbers are those of one, and errors end all."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EXPERTS, QUICK, summarise_from
from flax import nnx
from on_mesh import MESHES

from jaxdelta import Analysis, analyze
from jaxdelta.checkpoint.checkpoint import Checkpoint, open_checkpoint
from jaxdelta.checkpoint.weights import InMemoryWeights
from jaxdelta.errors import UsageError
from jaxdelta.run.memory_plan import Measurement, MemoryDemand
from jaxdelta.run.resume import RUN
from jaxdelta.sweep.devices import ALL, DATA, WHOLE, OneDevice
from jaxdelta.sweep.mesh import DeviceMesh, make_devices, parse_mesh, share
from jaxdelta.sweep.mesh import processes as processes_of
from jaxdelta.sweep.sweep import Blocks, PassPlan, Sweep, concatenate_blocks
from jaxdelta.text.tokens import Tokens

HERE = Path(__file__).parent
SHAPE = {"attention_bias": True, "num_key_value_heads": 4}  # four of everything that is split


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), **SHAPE)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Checkpoint:
    """A dense layer and a sparse one."""
    shape = EXPERTS | {"decoder_sparse_step": 2, "num_hidden_layers": 2}
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("experts"), **shape)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "documents.json"
    file.write_text(json.dumps([f"document {i} says {'something ' * (i % 7 + 1)}" for i in range(14)]))
    return file


def start(devices: int, *arguments: object) -> "subprocess.Popen[str]":
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(HERE.parent),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # nearly all of the time is compiling
    }
    command = [sys.executable, str(HERE / "on_mesh.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        said, complained = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, said, complained


@pytest.fixture(scope="module")
def runs(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the runs on one device and on every mesh."""
    directory = tmp_path_factory.mktemp("runs")
    status, _, complained = ended(start(4, "runs", checkpoint, text, directory))
    assert status == 0, complained
    return directory


def processes(mode: str, checkpoint: Path, text: Path, out: Path, *flags: str) -> list[tuple[int, str, str]]:
    """delta_svd.py in two processes of two devices each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        start(
            2, "script", mode, f"--model={checkpoint}", f"--calibration={text}", f"--out={out}", "--noreport",
            "--distributed", f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}",
            *flags,
        )
        for index in range(2)
    ]  # fmt: skip
    return [ended(process) for process in started]


def assert_same(found: Analysis, wanted: Analysis) -> None:
    """Every figure that was found within 1e-5 of itself, or of 1 if it is smaller; the ledger, of the whole
    energy."""
    fields = [field.name for field in dataclasses.fields(Analysis) if field.name != "run"]
    for name in fields:
        one, other = getattr(found, name), getattr(wanted, name)
        if isinstance(other, np.ndarray):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)
        else:
            known = {where: (same, scale) for where, same, scale in leaves(other, name)}
            for where, value, _ in leaves(one, name):
                same, scale = known[where]
                assert value == pytest.approx(same, rel=1e-5, abs=1e-5 * scale), where
    assert found.run["calibration_loss"] == pytest.approx(wanted.run["calibration_loss"], rel=1e-6)
    assert found.run["closure_error"] < 1e-6


def leaves(entry: Any, where: str, scale: float = 1.0) -> Iterator[tuple[str, float, float]]:
    """Every number, where it is, and what it is to be compared with."""
    if isinstance(entry, dict):
        scale = entry["update"] if where.endswith("/ledger") else scale
        for key, value in entry.items():
            yield from leaves(value, f"{where}/{key}", scale)
    elif isinstance(entry, list):
        for place, value in enumerate(entry):
            yield from leaves(value, f"{where}/{place}", scale)
    elif isinstance(entry, int | float):
        yield where, entry, scale


@pytest.mark.parametrize("mode", MESHES)
def test_meshes(mode: str, runs: Path) -> None:
    one, *others = (Analysis.load(runs / f"{mode}{number}.json") for number in range(len(MESHES[mode])))
    assert one.run["mesh"] is None
    for found, (mesh, _, _) in zip(others, MESHES[mode][1:], strict=True):
        assert found.run["mesh"] == parse_mesh(mesh) | {"processes": 1}
        assert_same(found, one)


@pytest.mark.parametrize("mode", MESHES)
def test_processes(mode: str, runs: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Two of them, with two devices each; one prints and writes."""
    out = tmp_path / "out.json"
    mesh = "data:2,model:2" if mode == "short" else "data:4"
    first, second = processes(mode, checkpoint, text, out, f"--mesh={mesh}")
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "Saved: " in first[1]
    # what Gloo says may come in pieces: its threads write without asking one another
    assert not set(second[1].splitlines()) & {
        line for line in first[1].splitlines() if line and "Gloo" not in line
    }
    found = Analysis.load(out)
    assert found.run["mesh"] == parse_mesh(mesh) | {"processes": 2}
    assert_same(found, Analysis.load(runs / f"{mode}0.json"))


def test_one_process_fails(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    first, second = processes(
        "short-broken", checkpoint, text, tmp_path / "out.json", "--mesh=data:2,model:2"
    )
    assert (second[0], second[2]) == (1, "delta_svd.py: the disk is gone\n")
    assert first[0] != 0
    assert not list(tmp_path.iterdir())


def test_processes_go_on(make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """From the last layer that all of them have whole, when one has failed; the numbers are those of a run
    that nobody stopped, bit for bit, and so are the moments."""

    def run(mode: str, name: str, *flags: str) -> list[tuple[int, str, str]]:
        moments = f"--keep_moments={tmp_path / name}-moments"
        return processes(mode, model, text, tmp_path / f"{name}.json", "--mesh=data:4", moments, *flags)

    model = make_checkpoint(tmp_path / "model", **SHAPE, num_hidden_layers=6)
    where = tmp_path / "checkpoint"
    _, broken = run("long-broken", "stopped", f"--checkpoint_dir={where}")
    assert (broken[0], broken[2]) == (1, "delta_svd.py: the disk is gone\n")
    steps = [sorted(step.name for step in (where / name).glob("step-*.json")) for name in (RUN, f"{RUN}-1")]
    assert steps == 2 * [["step-000000.json", "step-000001.json"]]
    (where / f"{RUN}-1" / "step-000001.json").unlink()
    first, second = run("long", "stopped", f"--checkpoint_dir={where}")
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "resumed after layer 0" in first[1]
    assert not [*where.iterdir()]
    run("long", "whole")
    found, whole = (Analysis.load(tmp_path / f"{name}.json") for name in ("stopped", "whole"))
    assert found.per_layer == whole.per_layer
    assert found.arrays_file() == whole.arrays_file()
    kept, wanted = (tmp_path / f"{name}-moments" for name in ("stopped", "whole"))
    assert {path.name for path in kept.iterdir()} == {path.name for path in wanted.iterdir()}
    for path in kept.glob("layer-*"):
        assert path.read_bytes() == (wanted / path.name).read_bytes()


@pytest.mark.parametrize(("mesh", "whole"), [("data:2", False), ("model:2", True)])
def test_experts(mesh: str, whole: bool, experts: Checkpoint) -> None:
    """What each layer wrote, dense or sparse, in windows of several segments, the last block half empty."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (5, 40)).astype(np.int32)
    positions = np.tile(np.r_[:25, :15], (5, 1)).astype(np.int32)
    tokens = Tokens(ids, np.zeros_like(ids), positions=positions)
    plan = PassPlan(Blocks(4, 16, "host"), all_tokens=whole)
    devices = make_devices(mesh, experts.config)
    assert isinstance(devices, DeviceMesh)
    one, two = Sweep(experts, tokens, plan), Sweep(experts, tokens, plan, devices)
    for update, other in zip(concatenate_blocks(two), concatenate_blocks(one), strict=True):
        for part, same in zip(update, other, strict=True):
            np.testing.assert_allclose(part, same, rtol=0, atol=1e-5)
    found = two.finish()
    assert found.loss == pytest.approx(one.finish().loss, rel=1e-6)
    assert found.closure_error < 1e-6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("data", "size of data must be a positive integer, not ''"),
        ("data:0", "size of data must be a positive integer, not '0'"),
        ("data:two", "size of data must be a positive integer, not 'two'"),
        ("pipeline:2", "'pipeline:2' must be data:SIZE or model:SIZE, each once"),
        ("data:2,data:1", "'data:1' must be data:SIZE or model:SIZE, each once"),
        ("data:2,model:4", "data:2,model:4 has 8 places, and there are 2 devices"),
    ],
)
def test_no_mesh(given: str, said: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=f"^mesh: .*{said}$"):
        analyze(str(tiny_checkpoint), ["some text"] * 4, mesh=given)


def test_a_mesh_must_fit_the_model(checkpoint: Path) -> None:
    config = open_checkpoint(str(checkpoint)).config
    config = dataclasses.replace(config, num_kv_heads=1, intermediate_size=81)
    with pytest.raises(UsageError, match=r"model:2 does not divide num_key_value_heads \(1\), intermediate"):
        make_devices("model:2", config)


def test_no_address() -> None:
    with pytest.raises(UsageError, match="must be HOST:PORT, not 'host'"), processes_of("host"):
        pass


def test_a_cpus_simulated_devices_are_one_unless_asked_for(checkpoint: Path) -> None:
    config = open_checkpoint(str(checkpoint)).config
    assert make_devices(None, config) == OneDevice()
    devices = make_devices("data:2", config)
    assert isinstance(devices, DeviceMesh)
    assert (devices.facts, list(devices.local_rows)) == ({"data": 2, "model": 1, "processes": 1}, [0, 1])


@pytest.mark.parametrize("mesh", [None, "data:2", "model:2"])
def test_devices_compute_the_same(mesh: str | None, checkpoint: Path) -> None:
    """Of windows, of what each device has, and of what all have."""
    devices = make_devices(mesh, open_checkpoint(str(checkpoint)).config)
    assert devices.size == len(devices.local) == (1 if mesh is None else 2)
    block = np.arange(12, dtype=np.float32).reshape(4, 3)
    windows = devices.put_windows(devices.local_windows(block))
    twice = devices.jit(devices.shard_map(lambda x: 2 * x, DATA, DATA), DATA)
    np.testing.assert_array_equal(devices.fetch(twice(windows)), 2 * block)
    largest = devices.jit(devices.shard_map(lambda x: x.max(axis=0, keepdims=True), ALL, ALL, ALL), ALL)
    assert devices.fetch(largest(devices.put(block))).shape == (devices.size, 3)
    assert devices.fetch(devices.jit(lambda x: x.sum(), WHOLE)(windows)) == block.sum()
    np.testing.assert_array_equal(devices.put_rows(block), block)


def test_a_device_has_its_share(checkpoint: Path) -> None:
    """Of a checkpoint as of a loaded model."""
    opened = open_checkpoint(str(checkpoint))
    devices = make_devices("model:2", opened.config)
    for index in range(2):
        whole, abstract = opened.layer(index), devices.abstract_layer(opened, index)
        for weights in (opened, InMemoryWeights(opened.load())):
            layers = (whole, devices.layer(weights, index), abstract)
            for (path, leaf), (_, same), (_, spec) in zip(*map(nnx.to_flat_state, layers), strict=True):
                np.testing.assert_array_equal(same[...], leaf[...], err_msg=str(path))
                assert same.get_value().sharding == spec.get_value().sharding
                assert same.get_value().addressable_data(1).shape == share(path, leaf, 2).shape


@pytest.mark.parametrize("maker", ["rows", "moments"])
def test_the_plan_is_a_devices(checkpoint: Path, maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    summarise_from(monkeypatch, maker)
    opened = open_checkpoint(str(checkpoint))
    one = MemoryDemand(
        opened, (61, 512), "float32", "float32", False, Measurement(views=4, parts=3, groups=20)
    )
    four = dataclasses.replace(one, data=2, model=2)
    alone, split = one.plan(10**10), four.plan(10**10)
    assert split.blocks.windows % (2 if maker == "rows" else 4) == 0
    assert split.parts["states"] == pytest.approx(alone.parts["states"] / 2, rel=0.02)
    assert alone.parts["weights"] / 2 < split.parts["weights"] < 0.6 * alone.parts["weights"]
    blocks = alone.blocks._replace(windows=2 * (alone.blocks.windows // 2))
    halved = dataclasses.replace(one, data=2)._parts(blocks)
    assert halved["layer"] == one._parts(blocks._replace(windows=blocks.windows // 2))["layer"]
