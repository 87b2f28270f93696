"""Times jaxdelta beside the PyTorch + NumPy reference, in one run, and prints ratios of medians.

    python scripts/benchmark.py end_to_end      # whole processes, a random checkpoint of 0.6B shape
    python scripts/benchmark.py analysis        # spectra alone, beside NumPy's SVD loop
    python scripts/benchmark.py trust           # what views, intervals and nulls cost
    python scripts/benchmark.py stream          # the layer-major pass beside reading, and beside computing
    python scripts/benchmark.py memory          # peak memory of a run, at half of the layers and at all
    python scripts/benchmark.py throughput      # a long text, beside PyTorch and the bare pass
    python scripts/benchmark.py long_memory     # peak memory at --tokens, and at ten times as many
    python scripts/benchmark.py compile         # compile time at 8 and at 64 layers

Both sides run in turn, A B A B ..., so that a machine whose speed drifts slows both. A ratio above 1 means
that jaxdelta is faster. `--results=FILE.json` keeps the figures. Environment variables that force an old
OpenBLAS kernel are taken out for both sides. end_to_end takes about two minutes on two cores; expect a
ratio of about 3.
"""

import os

from jaxdelta.utils import cli

os.environ.setdefault(cli.BLAS_WAIT, "26")  # what NumPy's loop has by itself, a fifth faster
cli.install()

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from absl import flags
from flax import nnx
from synthetic import SHAPES, VOCABULARY, config_of, random_checkpoint

from jaxdelta.checkpoint.checkpoint import open_checkpoint
from jaxdelta.checkpoint.weights import Resident, Weights
from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.decoder import Decoder, residual_stream
from jaxdelta.spectra.scheduler import measure
from jaxdelta.spectra.scheduler import measured as measured_in_turn
from jaxdelta.spectra.view_summary import Design, LayerFigures
from jaxdelta.spectra.views import ALL, RAW
from jaxdelta.statistics.across_layers.phases import Phases, default_phases
from jaxdelta.statistics.across_layers.table import relate
from jaxdelta.statistics.layer_row import described
from jaxdelta.sweep.sweep import Sweep, Update, Wrote
from jaxdelta.text.documents import shipped_prompts
from jaxdelta.text.groups import Sample
from jaxdelta.text.tokens import Tokens

SCRIPTS = Path(__file__).resolve().parent
OPENBLAS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
_SHAPE = flags.DEFINE_enum("shape", "0.6B", list(SHAPES), "all but analysis: shape of the random checkpoint")
_TOKENS = flags.DEFINE_integer("tokens", 295, "all but analysis: tokens of calibration text")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "end_to_end: dtype of both sides' products"
)
_SIZES = flags.DEFINE_list(
    "sizes",
    ["294x1024x28", "294x5120x8", "2047x2560x4"],
    "analysis: tokens x hidden x layers, comma-separated",
)
_LAYERS = flags.DEFINE_integer("layers", 4, "throughput, long_memory: layers of the checkpoint")
_DEVICE_GB = flags.DEFINE_float("device_gb", 4.0, "long_memory: --device_memory_gb of the runs")
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

# In bfloat16 the reference's own figures are up to 2 % off its float32 ones, and ours 1 %.
TOLERANCES = {"float32": (), "bfloat16": ("--rtol=0.03", "--atol_cos=0.03")}
# The reference's figures and no more.
PLAIN = ("--views=none", "--bootstrap=0", "--null_draws=0", "--noreport")


def main(command: str) -> None:
    """Runs the command's timings, and keeps them where --results says."""
    forced = [os.environ.pop(name, None) for name in OPENBLAS]
    if any(forced):  # NumPy read them when it was imported: start again
        os.execv(sys.executable, [sys.executable, *sys.argv])
    os.environ.pop(cli.BLAS_WAIT, None)  # other processes' own affair
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
        common.append(f"--calibration={text_of(_TOKENS.value, Path(scratch) / 'text.json')}")
        ours = [*common, *PLAIN, f"--compute_dtype={_DTYPE.value}", f"--out={scratch}/jaxdelta.json"]
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
                *TOLERANCES[_DTYPE.value],
            ],
            capture_output=True,
            text=True,
        )
        print(f"   figures {'agree' if agree.returncode == 0 else 'DISAGREE'}, see compare_reference.py")
        if agree.returncode:
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
        nothing = jnp.zeros((n, d), jnp.float32)
        updates = [Update(jnp.asarray(delta), nothing, jnp.asarray(delta)) for delta in arrays]
        found.append(
            in_turn(
                f"analysis, {n} tokens, hidden {d}, {layers} layers",
                partial(timed, partial(measured, updates, (n, d), Design(8))),
                partial(timed, partial(numpy_spectra, arrays)),
            )
        )
    return found


def numpy_spectra(arrays: Sequence[np.ndarray]) -> None:
    """As the reference takes them."""
    for delta in arrays:
        np.linalg.svd(delta, full_matrices=False)


def trust() -> list[Figures]:
    """What views, intervals, nulls and overlaps cost: beside spectra alone, and of the whole process."""
    found = []
    for size in _SIZES.value:
        n, d, layers = (int(number) for number in size.split("x"))
        updates = [random_update(n, d, seed) for seed in range(layers)]
        tokens = Tokens(
            np.zeros((1, n + 1), np.int32), np.arange(n + 1, dtype=np.int32)[None] * 25 // (n + 1)
        )
        sample = Sample.of(tokens, 200, 0)
        views = tuple(ALL.values())
        plain = partial(measured, updates, (n, d), Design(8))
        everything = partial(measured, updates, (n, d), Design(8, views=views))
        trusted = partial(measured_and_related, updates, (n, d), sample)
        title = f"{n} tokens, hidden {d}, {layers} layers"
        found.append(
            in_turn(
                f"{len(views)} views beside one, {title}", partial(timed, everything), partial(timed, plain)
            )
        )
        found.append(
            in_turn(
                f"intervals, nulls and overlaps beside the spectra of {len(views)} views, {title}",
                partial(timed, trusted),
                partial(timed, everything),
            )
        )
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = random_checkpoint(Path(_WORK_DIR.value or scratch) / _SHAPE.value, _SHAPE.value)
        os.environ["XDG_CACHE_HOME"] = scratch
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = str(_CACHE.value == "warm")
        common = [f"--model={checkpoint}", f"--max_tokens={_TOKENS.value}", f"--out={scratch}/a.json"]
        title = f"a default run beside a plain one, {_SHAPE.value} shape, {_TOKENS.value} tokens"
        default, plain_run = common, [*common, *PLAIN]
        found.append(
            in_turn(
                f"{title}, {_CACHE.value} cache",
                lambda: run_script("delta_svd.py", default),
                lambda: run_script("delta_svd.py", plain_run),
            )
        )
    return found


def measured(updates: list[Update], shape: tuple[int, int], design: Design) -> list[LayerFigures]:
    """The figures of every update."""
    return measure([[Wrote(update)] for update in updates], shape, design)


def random_update(n: int, d: int, seed: int) -> Update:
    """Updates with a covariance spectrum i⁻¹."""
    generator = np.random.default_rng(seed)
    tail = np.arange(1, d + 1, dtype=np.float32) ** -0.5
    parts = (jnp.asarray(generator.standard_normal((n, d), np.float32) * tail) for _ in range(3))
    return Update(*parts)


def measured_and_related(updates: list[Update], shape: tuple[int, int], sample: Sample) -> None:
    """All views with all that resampling needs, every layer's row, and what relates the layers."""
    design = Design(8, views=tuple(ALL.values()), groups=sample.groups)
    phases = Phases(default_phases(len(updates)))
    figures = measured_in_turn([[Wrote(update)] for update in updates], shape, design)
    layers = list(described(figures, phases, sample, 8, shape[1]))
    # As in a run, where the masked view of a text without sinks is the raw one.
    relate([layer.views[RAW] for layer in layers], phases, sample, 200, 0)


def stream() -> list[Figures]:
    """The pass over a checkpoint on disk beside the larger of: reading its files, and computing without."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = random_checkpoint(Path(_WORK_DIR.value or scratch) / _SHAPE.value, _SHAPE.value)
        files = sorted(directory.glob("*.safetensors"))
        checkpoint = open_checkpoint(str(directory))
        resident = Resident(checkpoint.load())
        found = []
        for cache in ("cold", "warm"):
            title = f"pass over {_SHAPE.value} shape, {_TOKENS.value} tokens, {cache} page cache"
            before = partial(forget if cache == "cold" else read_all, files)
            on_disk = partial(timed, partial(run_pass, checkpoint), before=before)
            reading = partial(timed, partial(read_all, files), before=before)
            found.append(in_turn(f"{title}, beside a plain read", on_disk, reading))
            computing = partial(timed, partial(run_pass, resident))
            found.append(in_turn(f"{title}, beside resident weights", on_disk, computing))
        return found


def run_pass(weights: Weights) -> None:
    """All layers, none of them measured, and the loss."""
    ids = np.arange(_TOKENS.value, dtype=np.int32)[None]
    sweep = Sweep(weights, Tokens(ids, np.zeros_like(ids)), _DTYPE.value)
    for layer in sweep:
        jax.block_until_ready(list(layer))
    sweep.finish_loss()


def read_all(files: list[Path]) -> None:
    """Reads the files from end to end into one buffer."""
    buffer = bytearray(64 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(files: list[Path]) -> None:
    """Drops the files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def throughput() -> list[Figures]:
    """The passes over a long text, moments and masks included, beside PyTorch's with the same moments, and
    beside our own without: of a few layers, imports and compilation not counted. The ratio is that of tokens
    per second."""
    import throughput as sides

    length, layers = 2048, _LAYERS.value
    with tempfile.TemporaryDirectory() as scratch:
        name = f"{_SHAPE.value}-{layers}"
        directory = random_checkpoint(Path(_WORK_DIR.value or scratch) / name, _SHAPE.value, layers)
        windows = max(1, _TOKENS.value // length)
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (windows, length)).astype(np.int32)
        ours, bare = (
            sides.measuring(directory, ids, _DTYPE.value),
            sides.passing(directory, ids, _DTYPE.value),
        )
        theirs = sides.torch_measuring(directory, ids, _DTYPE.value)
        title = f"{ids.size} tokens through {layers} layers of {_SHAPE.value} shape, {_DTYPE.value}"
        found = [
            in_turn(f"{title}, beside PyTorch", partial(timed, ours), partial(timed, theirs)),
            in_turn(f"{title}, beside the pass alone", partial(timed, ours), partial(timed, bare)),
        ]
    for figures in found:
        for side in ("seconds", "seconds_beside"):
            figures[side.replace("seconds", "tokens_per_second")] = ids.size / statistics.median(
                figures[side]
            )
    return found


def memory() -> list[Figures]:
    """Peak resident memory of delta_svd.py, in GB, at half of the shape's layers and at all of them."""
    depth = SHAPES[_SHAPE.value][0]
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            f"{layers} layers": partial(peak_of_run, Path(scratch), layers, _TOKENS.value)
            for layers in (depth // 2, depth)
        }
        return [peaks_in_turn(f"peak memory, {_SHAPE.value} shape", runs)]


def long_memory() -> list[Figures]:
    """The same of a few layers at --tokens tokens and at ten times as many, whose states wait in files."""
    layers, runs = _LAYERS.value, {}
    with tempfile.TemporaryDirectory() as scratch:
        for tokens in (_TOKENS.value, 10 * _TOKENS.value):
            flags_of_run = [
                f"--calibration={text_of(tokens, Path(scratch) / f'{tokens}.json')}",
                f"--scratch={scratch}",
                f"--device_memory_gb={_DEVICE_GB.value}",
            ]
            runs[f"{tokens} tokens"] = partial(peak_of_run, Path(scratch), layers, tokens, *flags_of_run)
        return [peaks_in_turn(f"peak memory, {layers} layers of {_SHAPE.value} shape", runs)]


def text_of(tokens: int, path: Path) -> Path:
    """A file of so many tokens and more: the prompts that ship, then their words in random orders."""
    documents, generator = shipped_prompts(), np.random.default_rng(0)
    words = " ".join(documents).split()
    documents += [" ".join(generator.permutation(words)) for _ in range(tokens // len(words))]
    path.write_text(json.dumps(documents), encoding="utf-8")
    return path


def peak_of_run(scratch: Path, layers: int, tokens: int, *more: str) -> float:
    """In GB, of a run with all default figures."""
    checkpoint = random_checkpoint(
        Path(_WORK_DIR.value or scratch) / f"{_SHAPE.value}-{layers}", _SHAPE.value, layers
    )
    arguments = [f"--model={checkpoint}", f"--max_tokens={tokens}", f"--out={scratch}/a.json", *more]
    return peak_memory([sys.executable, str(SCRIPTS / "delta_svd.py"), *arguments]) / 1e9


def peaks_in_turn(title: str, runs: Mapping[str, Callable[[], float]]) -> Figures:
    """Medians of each, and the second's beside the first's: a peak is a matter of threads' timing, too."""
    rounds = [{name: run() for name, run in runs.items()} for _ in range(_REPEATS.value)]
    peaks = {name: sorted(one[name] for one in rounds) for name in runs}
    first, second = map(statistics.median, peaks.values())
    print(title)
    for name, side in peaks.items():
        print(f"   {name:<16} median {statistics.median(side):.2f} GB   ({side[0]:.2f} .. {side[-1]:.2f})")
    print(f"   ratio {second / first:.3f}", flush=True)
    return {"title": title, "gigabytes": peaks, "ratio": second / first}


def compile_time() -> list[Figures]:
    """Tracing and compiling the scanned forward pass of a small model of 8 and of 64 layers."""

    def compiling(layers: int) -> Callable[[], float]:
        model = Decoder(config_of((layers, 64, 4, 2, 32, 128), vocabulary=256), rngs=nnx.Rngs(0))
        tokens = np.zeros((1, 64), np.int32)

        def run() -> float:
            jax.clear_caches()
            return timed(lambda: jax.block_until_ready(residual_stream(model, tokens)))

        return run

    return [in_turn("compile and first run: 8 layers beside 64", compiling(8), compiling(64))]


def peak_memory(command: Sequence[str]) -> int:
    """Peak resident bytes of a process. Not its rusage, which starts with what its parent had at the fork."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
        time.sleep(0.02)
    if process.returncode:
        raise JaxDeltaError(f"{command[1]} failed")
    return peak


COMMANDS = {
    "end_to_end": end_to_end,
    "analysis": analysis,
    "trust": trust,
    "stream": stream,
    "throughput": throughput,
    "memory": memory,
    "long_memory": long_memory,
    "compile": compile_time,
}


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


def timed(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds that `work` takes, what comes before it not counted."""
    before()
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


def machine() -> Figures:
    """What the figures were taken on."""
    return {
        "processor": processor(),
        "blas": [pool.get("architecture", "") for pool in threadpoolctl.threadpool_info()],
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    }


def processor() -> str:
    """Its name; of one that hides it, which instructions it has says the rest: see `blas`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    cli.run(main, commands=COMMANDS)
