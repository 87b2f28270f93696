"""Settings of the caller's program and of the process: none breaks a run or changes its numbers."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxdelta
from jaxdelta.report.analysis import Analysis

ROOT = Path(__file__).parents[1]
TEXT = ["The cat sat on the mat, and looked at the moon.", "def f(n):\n    return n"]
OPTIONS: dict[str, Any] = {"top_k": 2, "bootstrap": 20, "null_draws": 20, "seed": 1}


def measured(model: Path, **options: Any) -> Analysis:
    return jaxdelta.analyze(model, TEXT, **OPTIONS | options)


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> Analysis:
    return measured(tiny_checkpoint)


@pytest.fixture(scope="module")
def control(tiny_checkpoint: Path) -> Analysis:
    """JAX draws the weights of this one."""
    return measured(tiny_checkpoint, control="random_init")


def assert_same(found: Analysis, wanted: Analysis) -> None:
    for name in Analysis.ARRAYS:
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-6, atol=1e-6)
    loss = "calibration_loss"
    assert found.run[loss] == pytest.approx(wanted.run[loss], rel=1e-6)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "rank promotion warns": lambda: jax.numpy_rank_promotion("warn"),
    "standard dtype promotion": lambda: jax.numpy_dtype_promotion("standard"),
    "without jit": lambda: jax.disable_jit(),
    "infinities": lambda: jax.debug_infs(True),
    "NaNs": lambda: jax.debug_nans(True),
    "transfers": lambda: jax.transfer_guard("disallow"),
    "explicit transfers": lambda: jax.transfer_guard("disallow_explicit"),
    "transfers logged": lambda: jax.transfer_guard_host_to_device("log"),
    "x64": lambda: jax.enable_x64(True),
    "precision": lambda: jax.default_matmul_precision("bfloat16"),
    "device": lambda: jax.default_device(jax.devices()[-1]),
    "leaks": lambda: jax.checking_leaks(),
    "random bits": lambda: jax.default_prng_impl("rbg"),
    "old random numbers": lambda: jax.threefry_partitionable(False),
    "mesh": lambda: jax.set_mesh(jax.make_mesh((1,), ("x",))),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_of_the_caller(
    tiny_checkpoint: Path, plain: Analysis, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with CONTEXTS[name]():
        assert_same(measured(tiny_checkpoint), plain)
    assert capfd.readouterr() == ("", "")


SETTINGS: dict[str, Any] = {
    "jax_numpy_rank_promotion": "raise",
    "jax_disable_jit": True,
    "jax_debug_infs": True,
    "jax_debug_nans": True,
    "jax_transfer_guard": "disallow",
    "jax_enable_x64": True,
    "jax_default_matmul_precision": "bfloat16",
    "jax_default_device": "cpu",
    "jax_check_tracer_leaks": True,
    "jax_random_seed_offset": 3,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_process(tiny_checkpoint: Path, control: Analysis, name: str) -> None:
    """They hold on threads, too; they are as before when the run ends, or fails."""
    before = dict(jax.config.values)
    jax.config.update(name, SETTINGS[name])
    try:
        changed = dict(jax.config.values)
        assert_same(measured(tiny_checkpoint, control="random_init"), control)
        assert jax.config.values == changed
        with pytest.raises(jaxdelta.JaxDeltaError):
            measured(tiny_checkpoint / "missing")
        assert jax.config.values == changed
    finally:
        for setting in (name, *(other for other in before if other.startswith(f"{name}_"))):
            jax.config.update(setting, before[setting])


def test_a_model_loaded_and_run_in_such_a_program(tiny_checkpoint: Path) -> None:
    tokens = np.arange(40).reshape(2, 20)
    wanted = jaxdelta.residual_stream(jaxdelta.load_model(tiny_checkpoint), tokens).states
    for name in ("rank promotion", "without jit", "infinities", "transfers", "x64", "device"):
        with CONTEXTS[name]():
            found = jaxdelta.residual_stream(jaxdelta.load_model(tiny_checkpoint), tokens).states
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4, err_msg=name)
        assert found.dtype == np.float32


def test_the_model_within_the_callers_own_function(tiny_checkpoint: Path) -> None:
    model, tokens = jaxdelta.load_model(tiny_checkpoint), np.arange(20, dtype=np.int32)[None]

    def last(tokens: Any) -> Any:
        return jaxdelta.residual_stream(model, tokens).states[-1]

    np.testing.assert_allclose(jax.jit(last)(tokens), last(tokens), rtol=1e-5, atol=1e-4)


# The process


def command(
    *arguments: str, script: str = "delta_svd.py", redirected: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    line = f'exec "$@" {redirected}'
    given = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(
        ["bash", "-c", line, "bash", *given],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


@pytest.fixture
def arguments(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT[0])
    fast = ["--top_k=2", "--bootstrap=0", "--null_draws=0", "--jax_enable_compilation_cache=false"]
    return [
        f"--model={tiny_checkpoint}",
        f"--calibration={tmp_path}/text.txt",
        f"--out={tmp_path}/a.json",
        *fast,
    ]


@pytest.mark.parametrize("platform", ["cuda", "cudaa", "tpu", "gpu"])
def test_a_platform_that_is_not_here(tmp_path: Path, arguments: list[str], platform: str) -> None:
    if any(device.platform == "gpu" for device in jax.devices("cpu")[0].client.devices()):
        pytest.skip("there is a GPU")
    found = command(*arguments, JAX_PLATFORMS=platform)
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert found.stderr.startswith("delta_svd.py: JAX cannot start on ")
    assert "unset JAX_PLATFORMS" in found.stderr and len(found.stderr) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_platform_that_is_not_here_in_other_commands(tmp_path: Path, tiny_checkpoint: Path) -> None:
    given = [f"--model={tiny_checkpoint}", f"--out={tmp_path}/converted"]
    found = command(*given, script="convert_checkpoint.py", JAX_PLATFORMS="cudaa")
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert "JAX cannot start on cudaa" in found.stderr and not list(tmp_path.iterdir())
    code = f"import jaxdelta; jaxdelta.load_model({str(tiny_checkpoint)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cudaa"},
    )
    assert "jaxdelta.errors.JaxDeltaError: JAX cannot start on cudaa" in done.stderr


@pytest.mark.parametrize("redirected", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, arguments: list[str], redirected: str) -> None:
    found = command(*arguments, redirected=redirected)
    assert (found.returncode, found.stderr) == (0, "")
    assert bool(found.stdout) == (redirected == "2>&-")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.html", "a.json", "a.safetensors", "text.txt")
    ]
    failed = command(*arguments, "--top_k=0", redirected=redirected)
    assert (failed.returncode, failed.stderr) == (2, "")


def test_only_our_own_lines(arguments: list[str]) -> None:
    """None of a library's: transformers, absl, TensorStore, XLA."""
    found = command(*arguments)
    assert (found.returncode, found.stderr) == (0, "")
    lines = [line for line in found.stdout.splitlines() if line.strip()]
    known = (
        "Loading ",
        " open ",
        " tokenize ",
        " plan ",
        " layers ",
        "    ",
        " overlaps ",
        " L=",
        " calibration ",
    )
    begins = lines.index(next(line for line in lines if line.startswith(" calibration tokens: ")))
    assert all(line.startswith(known) for line in lines[: begins + 1])
    assert lines[-1].startswith("Saved: ")
    everything = found.stdout.lower()
    assert not any(
        word in everything for word in ("warning", "i0000", "w0000", "e0000", "deprecat", "traceback")
    )
