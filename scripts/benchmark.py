"""Times jaxdelta beside the PyTorch + NumPy reference, in one run, and prints ratios of medians.

    python scripts/benchmark.py end_to_end      # whole processes, a random checkpoint of 0.6B shape
    python scripts/benchmark.py analysis        # spectra alone, beside NumPy's SVD loop
    python scripts/benchmark.py compile         # compile time at 8 and at 64 layers

Both sides run in turn, A B A B ..., so that a machine whose speed drifts slows both. A ratio above 1 means
that jaxdelta is faster. `--results=FILE.json` keeps the figures. Environment variables that force an old
OpenBLAS kernel are taken out for both sides. end_to_end takes about two minutes on two cores; expect a
ratio between 1.5 and 2.
"""

from jaxdelta import console

console.install()

import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from importlib import metadata  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from flax import nnx  # noqa: E402

from jaxdelta import hub  # noqa: E402
from jaxdelta.checkpoint import save_model  # noqa: E402
from jaxdelta.config import ModelConfig, Rope  # noqa: E402
from jaxdelta.errors import JaxDeltaError  # noqa: E402
from jaxdelta.measure import measure  # noqa: E402
from jaxdelta.model import Qwen3, residual_stream  # noqa: E402
from jaxdelta.sweep import Update  # noqa: E402

SCRIPTS = Path(__file__).resolve().parent
OPENBLAS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
# layers, hidden, heads, key/value heads, head size, MLP
SHAPES = {"0.6B": (28, 1024, 16, 8, 128, 3072), "1.7B": (28, 2048, 16, 8, 128, 6144)}
VOCABULARY = 151_936

_SHAPE = flags.DEFINE_enum("shape", "0.6B", list(SHAPES), "end_to_end: shape of the random checkpoint")
_TOKENS = flags.DEFINE_integer("tokens", 295, "end_to_end: tokens of calibration text")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "end_to_end: dtype of both sides' products"
)
_SIZES = flags.DEFINE_list(
    "sizes",
    ["294x1024x28", "294x5120x8", "2047x2560x4"],
    "analysis: tokens x hidden x layers, comma-separated",
)
_CACHE = flags.DEFINE_enum(
    "cache", "cold", ["cold", "warm"], "end_to_end: compiled programs of an earlier run"
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 3, "timed runs of each side, after one that is not counted", lower_bound=1
)
_WORK_DIR = flags.DEFINE_string(
    "work_dir", None, "where checkpoints are kept between runs (default: nowhere)"
)
_RESULTS = flags.DEFINE_string("results", None, "a JSON file to keep the figures in")

Figures = dict[str, Any]


def main(command: str) -> None:
    forced = [os.environ.pop(name, None) for name in OPENBLAS]
    if any(forced):  # NumPy read them when it was imported: start again
        os.execv(sys.executable, [sys.executable, *sys.argv])
    figures = COMMANDS[command]()
    record = {"command": command, "machine": machine(), "figures": figures}
    if _RESULTS.value:
        Path(_RESULTS.value).write_text(json.dumps(record, indent=1) + "\n")


def end_to_end() -> list[Figures]:
    """Whole processes, imports and compilation included: delta_svd.py beside reference_torch.py."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(_WORK_DIR.value or scratch)
        checkpoint = random_checkpoint(work / _SHAPE.value, _SHAPE.value)
        common = [f"--model={checkpoint}", f"--max_tokens={_TOKENS.value}", "--last_state=normed"]
        ours = [*common, f"--compute_dtype={_DTYPE.value}", f"--out={scratch}/jaxdelta.json"]
        theirs = [*common, f"--dtype={_DTYPE.value}", "--device=cpu", f"--out={scratch}/reference.json"]
        title = (
            f"end to end, {_SHAPE.value} shape, {_TOKENS.value} tokens, {_DTYPE.value}, {_CACHE.value} cache"
        )
        # A cache of our own, which the uncounted run fills, or none.
        os.environ["XDG_CACHE_HOME"] = scratch
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = str(_CACHE.value == "warm")
        figures = in_turn(
            title,
            lambda: run_script("delta_svd.py", ours),
            lambda: run_script("reference_torch.py", theirs),
        )
        agree = subprocess.run(
            [
                sys.executable,
                str(SCRIPTS / "compare_reference.py"),
                f"--reference={scratch}/reference.json",
                f"--candidate={scratch}/jaxdelta.json",
            ],
            capture_output=True,
            text=True,
        )
        print(f"   figures {'agree' if agree.returncode == 0 else 'DISAGREE'}, see compare_reference.py")
        if agree.returncode and _DTYPE.value == "float32":
            print(agree.stdout)
        return [figures | {"agree": agree.returncode == 0}]


def analysis() -> list[Figures]:
    """The figures of all layers, compiled, beside NumPy's SVD loop on the same updates."""
    found = []
    for size in _SIZES.value:
        n, d, layers = (int(number) for number in size.split("x"))
        generator = np.random.default_rng(0)
        tail = np.arange(1, d + 1, dtype=np.float32) ** -0.5
        arrays = [generator.standard_normal((n, d), np.float32) * tail for _ in range(layers)]
        updates = [Update(jnp.asarray(delta), jnp.asarray(delta)) for delta in arrays]
        found.append(
            in_turn(
                f"analysis, {n} tokens, hidden {d}, {layers} layers",
                lambda updates=updates: timed(lambda: measure(updates, updates[0].delta.shape, 8, "gram")),
                lambda arrays=arrays: timed(
                    lambda: [np.linalg.svd(delta, full_matrices=False) for delta in arrays]
                ),
            )
        )
    return found


def compile_time() -> list[Figures]:
    """Tracing and compiling the scanned forward pass of a small model of 8 and of 64 layers."""

    def compiling(layers: int) -> Callable[[], float]:
        model = Qwen3(config_of((layers, 64, 4, 2, 32, 128), vocabulary=256), rngs=nnx.Rngs(0))
        tokens = np.zeros((1, 64), np.int32)

        def run() -> float:
            jax.clear_caches()
            return timed(lambda: jax.block_until_ready(residual_stream(model, tokens)))

        return run

    return [in_turn("compile and first run: 8 layers beside 64", compiling(8), compiling(64))]


COMMANDS = {"end_to_end": end_to_end, "analysis": analysis, "compile": compile_time}


def in_turn(title: str, ours: Callable[[], float], theirs: Callable[[], float]) -> Figures:
    """Runs both sides alternately and prints their medians, ranges and the ratio of the medians."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(_REPEATS.value)]
    first, second = (sorted(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(second) / statistics.median(first)
    print(title)
    for name, side in (("jaxdelta", first), ("beside it", second)):
        print(f"   {name:<10} median {statistics.median(side):8.3f} s   ({side[0]:.3f} .. {side[-1]:.3f})")
    print(f"   ratio {ratio:.2f}", flush=True)
    return {"title": title, "seconds": first, "seconds_beside": second, "ratio": ratio}


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_script(name: str, arguments: Sequence[str]) -> float:
    """Seconds of a whole process."""
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise JaxDeltaError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - start


def config_of(shape: tuple[int, ...], vocabulary: int = VOCABULARY) -> ModelConfig:
    """A Qwen3 configuration with tied embeddings."""
    layers, hidden, heads, kv_heads, head_dim, mlp = shape
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope=Rope(theta=1e6),
        windows=(None,) * layers,
        tie_embeddings=True,
        dtype="bfloat16",
    )


def random_checkpoint(directory: Path, shape: str) -> Path:
    """A checkpoint with random bfloat16 weights, and the demo model's tokenizer."""
    if not (directory / hub.WEIGHTS).exists():
        print(f"making a random checkpoint of {shape} shape ...", flush=True)
        save_model(Qwen3(config_of(SHAPES[shape]), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), directory)
        for name in hub.TOKENIZER_FILES:
            shutil.copy(hub.resolve(hub.DEMO) / name, directory)
    return directory


def machine() -> Figures:
    """What the figures were taken on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    }


if __name__ == "__main__":
    console.run(main, commands=COMMANDS)
