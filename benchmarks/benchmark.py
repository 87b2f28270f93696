"""Times jaxdelta and compares it with the PyTorch + NumPy reference, and with an older commit of its own.

    python benchmarks/benchmark.py end_to_end      # whole processes: default run, plain run, reference
    python benchmarks/benchmark.py against --against=COMMIT   # this tree and an older commit's
    python benchmarks/benchmark.py analysis        # spectra alone, compared with NumPy's SVD of each layer
    python benchmarks/benchmark.py trust           # the cost of views, intervals and nulls
    python benchmarks/benchmark.py stream          # the layer-major pass, compared with reading and computing
    python benchmarks/benchmark.py memory          # peak memory of a run, at half of the layers and at all
    python benchmarks/benchmark.py throughput      # a long text, compared with PyTorch and with the bare pass
    python benchmarks/benchmark.py long_memory     # peak memory at --tokens, and at ten times as many
    python benchmarks/benchmark.py compile         # compile time at 8 and at 64 layers

The sides run in turn, A B A B ..., so that a machine whose speed drifts slows both. The ratio is the second
side's median relative to the first's: above 1, the first is faster, or smaller. The rounds' ratios are also
printed. `--results=FILE.json` keeps the measurements and a description of the machine. Environment variables
that force an old OpenBLAS kernel are removed for all sides. end_to_end takes about three minutes on two
cores; expect a plain run to be three times as fast as the reference.
"""

import os

from jaxdelta.utils import cli

os.environ.setdefault(cli.BLAS_WAIT, "26")  # NumPy's default, a fifth faster for its loop
cli.install()

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from benchmark_timing.comparison import Comparison, compared, in_turn, timed
from benchmark_timing.page_cache import forget, read_all
from benchmark_timing.processes import ROOT, Cost, cost_of, environment, machine, script
from benchmark_timing.worktree import commit_hash, worktree
from flax import nnx
from synthetic import SHAPES, VOCABULARY, config_of, random_checkpoint, text_of

from jaxdelta.checkpoint.checkpoint import open_checkpoint
from jaxdelta.checkpoint.weights import InMemoryWeights, Weights
from jaxdelta.errors import UsageError
from jaxdelta.model.decoder import Decoder, residual_stream
from jaxdelta.spectra.scheduler import Finish, Schedule, ThreadedSummaries, layers_at_once, layers_pending
from jaxdelta.spectra.view_summary import LayerSummary, MeasurementPlan
from jaxdelta.spectra.views import ALL, RAW
from jaxdelta.statistics.across_layers.phases import Phases, default_phases
from jaxdelta.statistics.across_layers.table import compare_layers
from jaxdelta.statistics.layer_row import layer_record
from jaxdelta.sweep.sweep import BlockUpdate, PassPlan, Sweep, Update
from jaxdelta.text.groups import Groups, ResamplingGroups
from jaxdelta.text.tokens import Tokens

OPENBLAS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
_SHAPE = flags.DEFINE_enum("shape", "0.6B", list(SHAPES), "all but analysis: shape of the random checkpoint")
_TOKENS = flags.DEFINE_integer("tokens", 295, "all but analysis: tokens of the calibration text")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of all sides' products")
_SIZES = flags.DEFINE_list(
    "sizes",
    ["294x1024x28", "294x5120x8", "2047x2560x4"],
    "analysis: tokens x hidden x layers, comma-separated",
)
_LAYERS = flags.DEFINE_integer("layers", 4, "throughput, long_memory: layers of the checkpoint")
_DEVICE_GB = flags.DEFINE_float("device_gb", 4.0, "long_memory: --device_memory_gb of the runs")
_CACHE = flags.DEFINE_enum(
    "cache", "cold", ["cold", "warm"], "end_to_end, against: warm keeps compiled programs between runs"
)
_AGAINST = flags.DEFINE_string("against", None, "against: the older commit, branch or tag")
_REPEATS = flags.DEFINE_integer(
    "repeats", 3, "measurements of each side, after an uncounted one", lower_bound=1
)
_WORK_DIR = flags.DEFINE_string(
    "work_dir", None, "a directory that keeps checkpoints between runs (default: none)"
)
_RESULTS = flags.DEFINE_string("results", None, "the JSON file to write the measurements to")

# In bfloat16 the reference's numbers differ by up to 2 % from its float32 ones, ours by 1 %.
TOLERANCES = {"float32": (), "bfloat16": ("--rtol=0.03", "--atol_cos=0.03")}
# The reference's statistics and nothing else.
PLAIN = ("--views=none", "--bootstrap=0", "--null_draws=0", "--noreport")


def main(command: str) -> None:
    """Runs the command, and writes its measurements where --results says."""
    forced = [os.environ.pop(name, None) for name in OPENBLAS]
    if any(forced):  # NumPy has read them at import: restart
        os.execv(sys.executable, [sys.executable, *sys.argv])
    os.environ.pop(cli.BLAS_WAIT, None)  # a setting for this process alone
    found = COMMANDS[command]()
    record = {"command": command, "machine": machine(), "figures": found}
    if _RESULTS.value:
        Path(_RESULTS.value).write_text(json.dumps(record, indent=1) + "\n")


def end_to_end() -> list[Comparison]:
    """Whole processes, imports and compilation included: a default run, a plain one, reference_torch.py."""
    with tempfile.TemporaryDirectory() as scratch:
        common, title = whole_run(Path(scratch))
        ours, normed = [*common, f"--compute_dtype={_DTYPE.value}"], "--last_state=normed"
        theirs = [*common, f"--dtype={_DTYPE.value}", "--device=cpu", normed]
        commands = {
            "plain": script("delta_svd.py", [*ours, *PLAIN, normed, f"--out={scratch}/plain.json"]),
            "default": script("delta_svd.py", [*ours, f"--out={scratch}/default.json"]),
            "reference": script("reference_torch.py", [*theirs, f"--out={scratch}/reference.json"]),
        }
        sides = {name: partial(cost_of, command) for name, command in commands.items()}
        plain, default, reference = column(in_turn(sides, _REPEATS.value), "seconds").values()
        found = [
            compared(f"end to end, {title}", {"plain": plain, "reference": reference}),
            compared(f"default and plain run, {title}", {"default": default, "plain": plain}),
        ]
        found[0]["agree"] = agrees(Path(scratch))
        return found


def whole_run(scratch: Path) -> tuple[list[str], str]:
    """The flags of a run of the whole checkpoint, and a title; sets the cache of compiled programs."""
    checkpoint = random_checkpoint(Path(_WORK_DIR.value or scratch) / _SHAPE.value, _SHAPE.value)
    text = text_of(_TOKENS.value, scratch / "text.json")
    # The uncounted run fills the new cache, if there is one.
    os.environ["XDG_CACHE_HOME"] = str(scratch)
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = str(_CACHE.value == "warm")
    title = f"{_SHAPE.value} shape, {_TOKENS.value} tokens, {_DTYPE.value}, {_CACHE.value} cache"
    return [f"--model={checkpoint}", f"--max_tokens={_TOKENS.value}", f"--calibration={text}"], title


def agrees(scratch: Path) -> bool:
    """Whether the plain run's statistics are the reference's; if not, prints both."""
    files = [f"--reference={scratch}/reference.json", f"--candidate={scratch}/plain.json"]
    command = script("compare_reference.py", [*files, *TOLERANCES[_DTYPE.value]])
    done = subprocess.run(command, capture_output=True, text=True)
    agree = done.returncode == 0
    print("   statistics agree" if agree else f"   statistics DISAGREE\n{done.stdout}")
    return agree


def against() -> list[Comparison]:
    """Seconds and peak memory of this tree's default and plain runs, compared with an older commit's."""
    if not _AGAINST.value:
        raise UsageError("against: name the older commit, as in --against=HEAD~1")
    older = commit_hash(ROOT, _AGAINST.value)
    with tempfile.TemporaryDirectory() as scratch, worktree(ROOT, older, Path(scratch) / "older") as tree:
        common, title = whole_run(Path(scratch))
        trees, found = {"this tree": ROOT, older[:12]: tree}, list[Comparison]()
        for kind, more in (("default", ()), ("plain", PLAIN)):
            arguments = [*common, *more, f"--compute_dtype={_DTYPE.value}"]
            costs = in_turn(two_trees(trees, arguments, Path(scratch)), _REPEATS.value)
            about = f"{kind} run, this tree and {older[:12]}, {title}"
            found.append(compared(about, column(costs, "seconds")))
            found.append(compared(f"peak memory, {about}", column(costs, "gigabytes"), "GB"))
        return found


def column(costs: Mapping[str, Sequence[Cost]], field: str) -> dict[str, list[float]]:
    """One field of every cost, by side."""
    return {name: [getattr(cost, field) for cost in side] for name, side in costs.items()}


def two_trees(
    trees: Mapping[str, Path], arguments: Sequence[str], scratch: Path
) -> dict[str, Callable[[], Cost]]:
    """A run of each tree's delta_svd.py, with that tree's package and its own cache."""
    return {
        name: partial(
            cost_of,
            script("delta_svd.py", [*arguments, f"--out={scratch}/{index}.json"], tree),
            environment(tree, scratch / f"cache-{index}"),
        )
        for index, (name, tree) in enumerate(trees.items())
    }


def analysis() -> list[Comparison]:
    """The spectra of all layers, compiled, compared with NumPy's SVD of each."""
    found = []
    for size in _SIZES.value:
        n, d, layers = (int(number) for number in size.split("x"))
        generator = np.random.default_rng(0)
        tail = np.arange(1, d + 1, dtype=np.float32) ** -0.5
        arrays = [generator.standard_normal((n, d), np.float32) * tail for _ in range(layers)]
        nothing = jnp.zeros((n, d), jnp.float32)
        updates = [Update(jnp.asarray(delta), nothing, jnp.asarray(delta)) for delta in arrays]
        sides = {
            "jaxdelta": partial(timed, partial(summarised, updates, MeasurementPlan(8))),
            "NumPy": partial(timed, partial(numpy_spectra, arrays)),
        }
        found.append(pair(f"analysis, {n} tokens, hidden {d}, {layers} layers", sides))
    return found


def numpy_spectra(arrays: Sequence[np.ndarray]) -> None:
    """The spectra as the reference computes them."""
    for delta in arrays:
        np.linalg.svd(delta, full_matrices=False)


def trust() -> list[Comparison]:
    """The cost of all views, compared with one; of intervals, nulls and overlaps, compared with all views."""
    found = []
    for size in _SIZES.value:
        n, d, layers = (int(number) for number in size.split("x"))
        updates = [random_update(n, d, seed) for seed in range(layers)]
        tokens = Tokens(
            np.zeros((1, n + 1), np.int32), np.arange(n + 1, dtype=np.int32)[None] * 25 // (n + 1)
        )
        sample = ResamplingGroups.of(tokens, 200, 0)
        views = tuple(ALL.values())
        one = partial(timed, partial(summarised, updates, MeasurementPlan(8)))
        spectra = partial(timed, partial(summarised, updates, MeasurementPlan(8, views=views)))
        everything = partial(timed, partial(measured_and_related, updates, (n, d), sample))
        title = f"{n} tokens, hidden {d}, {layers} layers"
        found.append(
            pair(f"{len(views)} views and one, {title}", {f"{len(views)} views": spectra, "one": one})
        )
        sides = {"everything": everything, "spectra": spectra}
        found.append(
            pair(f"intervals, nulls and overlaps of {len(views)} views, and their spectra, {title}", sides)
        )
    return found


def summarised(updates: list[Update], plan: MeasurementPlan) -> list[LayerSummary]:
    """The summary of every update."""
    return through_threads(updates, plan, None, lambda number, summary: summary)


def through_threads(
    updates: list[Update], plan: MeasurementPlan, groups: Groups | None, finish: Finish
) -> list[Any]:
    """What `finish` makes of the summary of every update, as in a run on a CPU."""
    n, d = updates[0].h.shape
    at_once = layers_at_once((n, d), len(updates), 0)
    schedule = Schedule(at_once, layers_pending(at_once))
    with ThreadedSummaries(plan, finish, schedule, groups) as summaries:
        found = [one for update in updates for one in summaries.add([BlockUpdate(update)])]
        return [*found, *summaries.rest()]


def random_update(n: int, d: int, seed: int) -> Update:
    """Updates with a covariance spectrum i⁻¹."""
    generator = np.random.default_rng(seed)
    tail = np.arange(1, d + 1, dtype=np.float32) ** -0.5
    parts = (jnp.asarray(generator.standard_normal((n, d), np.float32) * tail) for _ in range(3))
    return Update(*parts)


def measured_and_related(updates: list[Update], shape: tuple[int, int], sample: ResamplingGroups) -> None:
    """All views with what resampling needs, every layer's row, and the overlaps of the layers."""
    plan = MeasurementPlan(8, views=tuple(ALL.values()), resampled=True)
    phases = Phases(default_phases(len(updates)))
    finish = partial(layer_record, phases=phases, sample=sample, k=8, hidden=shape[1])
    layers = through_threads(updates, plan, sample.groups, finish)
    # As in a run, where the masked view of a text without sinks is the raw one.
    compare_layers([layer.views[RAW] for layer in layers], phases, sample, 8, 200, 0)


def stream() -> list[Comparison]:
    """The pass over a checkpoint on disk, compared with reading its files, and with the pass in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = random_checkpoint(Path(_WORK_DIR.value or scratch) / _SHAPE.value, _SHAPE.value)
        files = sorted(directory.glob("*.safetensors"))
        checkpoint = open_checkpoint(str(directory))
        resident = InMemoryWeights(checkpoint.load())
        found = []
        for cache in ("cold", "warm"):
            title = f"pass over {_SHAPE.value} shape, {_TOKENS.value} tokens, {cache} page cache"
            before = partial(forget if cache == "cold" else read_all, files)
            on_disk = partial(timed, partial(run_pass, checkpoint), before=before)
            reading = partial(timed, partial(read_all, files), before=before)
            found.append(pair(f"{title}, and a plain read", {"pass": on_disk, "read": reading}))
            computing = partial(timed, partial(run_pass, resident))
            found.append(pair(f"{title}, and resident weights", {"pass": on_disk, "resident": computing}))
        return found


def run_pass(weights: Weights) -> None:
    """All layers, without statistics, and the loss."""
    ids = np.arange(_TOKENS.value, dtype=np.int32)[None]
    sweep = Sweep(weights, Tokens(ids, np.zeros_like(ids)), PassPlan(compute_dtype=_DTYPE.value))
    for layer in sweep:
        jax.block_until_ready(list(layer))
    sweep.finish()


def throughput() -> list[Comparison]:
    """The passes over a long text with moments and masks, compared with PyTorch's with the same moments, and
    with our own without: a few layers, after imports and compilation. The ratio is that of tokens per second.
    """
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
            pair(
                f"{title}, and PyTorch", {"jaxdelta": partial(timed, ours), "PyTorch": partial(timed, theirs)}
            ),
            pair(
                f"{title}, and the pass alone",
                {"moments": partial(timed, ours), "pass": partial(timed, bare)},
            ),
        ]
    for entry in found:
        for side in ("seconds", "seconds_beside"):
            entry[side.replace("seconds", "tokens_per_second")] = ids.size / statistics.median(entry[side])
    return found


def memory() -> list[Comparison]:
    """Peak resident memory of delta_svd.py, in GB, at half of the shape's layers and at all of them."""
    depth = SHAPES[_SHAPE.value][0]
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            f"{layers} layers": partial(peak_of_run, Path(scratch), layers, _TOKENS.value)
            for layers in (depth // 2, depth)
        }
        return [pair(f"peak memory, {_SHAPE.value} shape", runs, "GB")]


def long_memory() -> list[Comparison]:
    """The same of a few layers, at --tokens tokens and at ten times as many, with the states in files."""
    layers, runs = _LAYERS.value, {}
    with tempfile.TemporaryDirectory() as scratch:
        for tokens in (_TOKENS.value, 10 * _TOKENS.value):
            flags_of_run = [
                f"--calibration={text_of(tokens, Path(scratch) / f'{tokens}.json')}",
                f"--scratch={scratch}",
                f"--device_memory_gb={_DEVICE_GB.value}",
            ]
            runs[f"{tokens} tokens"] = partial(peak_of_run, Path(scratch), layers, tokens, *flags_of_run)
        return [pair(f"peak memory, {layers} layers of {_SHAPE.value} shape", runs, "GB")]


def peak_of_run(scratch: Path, layers: int, tokens: int, *more: str) -> float:
    """The peak of a run with the default statistics, in GB."""
    checkpoint = random_checkpoint(
        Path(_WORK_DIR.value or scratch) / f"{_SHAPE.value}-{layers}", _SHAPE.value, layers
    )
    arguments = [f"--model={checkpoint}", f"--max_tokens={tokens}", f"--out={scratch}/a.json", *more]
    return cost_of(script("delta_svd.py", arguments)).gigabytes


def compile_time() -> list[Comparison]:
    """Tracing and compiling the scanned forward pass of a small model of 8 and of 64 layers."""

    def compiling(layers: int) -> Callable[[], float]:
        model = Decoder(config_of((layers, 64, 4, 2, 32, 128), vocabulary=256), rngs=nnx.Rngs(0))
        tokens = np.zeros((1, 64), np.int32)

        def run() -> float:
            jax.clear_caches()
            return timed(lambda: jax.block_until_ready(residual_stream(model, tokens)))

        return run

    sides = {"8 layers": compiling(8), "64 layers": compiling(64)}
    return [pair("compile and first run: 8 layers and 64", sides)]


def pair(title: str, sides: Mapping[str, Callable[[], float]], unit: str = "s") -> Comparison:
    """Measures two sides in turn and compares them. Peaks need no warm-up."""
    return compared(title, in_turn(sides, _REPEATS.value, warm_up=unit == "s"), unit)


COMMANDS = {
    "end_to_end": end_to_end,
    "against": against,
    "analysis": analysis,
    "trust": trust,
    "stream": stream,
    "throughput": throughput,
    "memory": memory,
    "long_memory": long_memory,
    "compile": compile_time,
}


if __name__ == "__main__":
    cli.run(main, commands=COMMANDS)
