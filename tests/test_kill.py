"""Killed (SIGKILL) at twenty random moments, the same command ends in the same files."""

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from stopped_runs import differing

from jaxdelta import Analysis
from jaxdelta.run.resume import RUN

KILLS, LAYERS, SEED = 20, 8, 5


@pytest.fixture
def command(
    tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ForkServerProcess]]:
    """command(name): starts the script, which is to write NAME.json and keeps its checkpoint in NAME.

    With `in_batches` it summarises its layers as on an accelerator.
    """
    # A second run compiles nothing: most moments would be in the midst of that.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])  # imported once, where Python finds it
    here = Path(__file__).resolve().parent
    path = [str(here), str(here.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    from killable import delta_svd

    model = make_checkpoint(tmp_path / "model", num_hidden_layers=LAYERS)
    started: list[ForkServerProcess] = []

    def start(name: str, in_batches: bool = False) -> ForkServerProcess:
        flags = {
            "model": model, "out": tmp_path / f"{name}.json", "checkpoint_dir": tmp_path / name, "top_k": 4,
            "bootstrap": 20, "null_draws": 20, "max_tokens": 200, "views": "masked",
        }  # fmt: skip
        given = [*(f"--{flag}={value}" for flag, value in flags.items()), "--noreport"]
        started.append(context.Process(target=delta_svd, args=(given, tmp_path / f"{name}.log", in_batches)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def newest(directory: Path) -> int:
    """The last layer whose record is there."""
    return max((int(path.name[7:13]) for path in directory.glob(f"{RUN}/record-??????")), default=-1)


def wait_for_moment(process: ForkServerProcess, directory: Path, rng: random.Random) -> None:
    """Until some layers have passed, or not even that; and then some more time."""
    if rng.random() < 0.8:
        wanted = newest(directory) + rng.randint(1, 3)
        while process.is_alive() and newest(directory) < wanted:
            time.sleep(0.01)
    process.join(rng.uniform(0, 0.15))


def test_killed_twenty_times(command: Callable[[str], ForkServerProcess], tmp_path: Path) -> None:
    rng, kills, resumed, ended = random.Random(SEED), 0, 0, ["whole"]
    whole = command("whole")
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()
    name = "run-0"
    while kills < KILLS or name != ended[-1]:
        process = command(name)
        if kills < KILLS:
            wait_for_moment(process, tmp_path / name, rng)
            process.kill()
        process.join()
        log = (tmp_path / f"{name}.log").read_text() if (tmp_path / f"{name}.log").exists() else ""
        kills, resumed = kills + (process.exitcode == -9), resumed + ("resumed after layer" in log)
        assert process.exitcode in (0, -9), log
        assert "damaged" not in log
        if process.exitcode == 0:
            ended.append(name)
            assert_same(tmp_path, name)
            name = f"run-{len(ended) - 1}" if kills < KILLS else name
    assert kills == KILLS
    assert resumed > KILLS / 2


def test_killed_in_batches(command: Callable[..., ForkServerProcess], tmp_path: Path) -> None:
    """Each time as soon as another batch is kept."""
    whole = command("whole", in_batches=True)
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()
    kept = []
    for wanted in (1, 3, 5):
        process = command("run", in_batches=True)
        while process.is_alive() and newest(tmp_path / "run") < wanted:
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -9
        kept.append(newest(tmp_path / "run"))
    assert kept == sorted(kept)
    last = command("run", in_batches=True)
    last.join()
    log = (tmp_path / "run.log").read_text()
    assert last.exitcode == 0 and "resumed after layer" in log and "damaged" not in log
    # It may go on within a batch: the last one may then be of another size, which changes last bits.
    found, wanted = (Analysis.load(tmp_path / f"{name}.json") for name in ("run", "whole"))
    assert max(differing(found, wanted).values()) < 1e-12
    assert not [*(tmp_path / "run").iterdir()]


def assert_same(directory: Path, name: str) -> None:
    """The files of the run are those of the one that nobody stopped, and nothing else is left."""
    found, wanted = (directory / f"{one}.safetensors" for one in (name, "whole"))
    assert found.read_bytes() == wanted.read_bytes()
    found, wanted = (json.loads((directory / f"{one}.json").read_text()) for one in (name, "whole"))
    for report in (found, wanted):
        report["run"] = {fact: x for fact, x in report["run"].items() if "second" not in fact}
        del report["run"]["flags"]["checkpoint_dir"]
    assert found == wanted
    assert not [*(directory / name).iterdir()]
    assert not [path.name for path in directory.glob(".*")]
    shutil.rmtree(directory / name)
