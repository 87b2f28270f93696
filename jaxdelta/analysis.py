"""analyze(): the whole way from a checkpoint and a text to the figures; Analysis: the result, its files."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from jaxdelta import __version__
from jaxdelta.calibration import DEFAULT_MAX_TOKENS, Tokens, load_documents, load_encoder, tokenize
from jaxdelta.checkpoint import LOADERS, Checkpoint, open_checkpoint
from jaxdelta.errors import JaxDeltaError, UsageError, first_line
from jaxdelta.files import json_path, write_together
from jaxdelta.measure import LayerFigures, measure
from jaxdelta.model import Qwen3
from jaxdelta.overlap import Overlaps, compile_overlaps, overlaps
from jaxdelta.phases import default_phases, parse_phases
from jaxdelta.plan import MODES, Plan, Work, device_limit
from jaxdelta.spectrum import METHODS, TokenStatistics, effective_rank, energy_shares, numerical_rank
from jaxdelta.sweep import Resident, Sweep, Update, Weights
from jaxdelta.timing import Stages

SCHEMA_VERSION = 1
LAST_STATES = ("residual", "normed")
DTYPES = ("float32", "bfloat16")
VERSIONED = ("jax", "jaxlib", "flax", "numpy")

Listener = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run can be told; each field is the flag of the same name.

    Raises:
        UsageError: a value that no run could use.
    """

    top_k: int = 8
    max_tokens: int = DEFAULT_MAX_TOKENS
    last_state: str = "residual"
    svd: str = "gram"
    compute_dtype: str = "float32"
    residual_dtype: str = "float32"
    phases: str | None = None
    revision: str | None = None
    loader: str = "auto"
    memory: str = "auto"
    device_memory_gb: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "last_state": LAST_STATES,
            "svd": METHODS,
            "compute_dtype": DTYPES,
            "residual_dtype": DTYPES,
            "loader": LOADERS,
            "memory": MODES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}")
        if self.max_tokens < 2:
            raise UsageError(f"max_tokens must be at least 2, not {self.max_tokens}")
        if self.device_memory_gb is not None and not self.device_memory_gb > 0:
            raise UsageError(f"device_memory_gb must be above 0, not {self.device_memory_gb}")


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The figures of one run: the JSON's entries by their names, then the arrays of the safetensors file.

    `per_layer[L]` holds layer L's figures as the reference names them. `last_layer_normed` and
    `last_layer_residual` are the last layer's row with the last state after and before the final norm.
    """

    model: str
    num_layers: int
    hidden: int
    n_calib_tokens: int
    per_layer: list[dict[str, Any]]
    top1_cos_adjacent: list[float]
    phase_overlap: list[dict[str, Any]]
    block_capture: list[dict[str, Any]]
    last_layer_normed: dict[str, Any]
    last_layer_residual: dict[str, Any]
    run: dict[str, Any]
    directions: Float32[np.ndarray, "N k d"] = dataclasses.field(repr=False)
    singular_values: Float32[np.ndarray, "N r"] = dataclasses.field(repr=False)
    top1_cos: Float32[np.ndarray, "N N"] = dataclasses.field(repr=False)
    schema_version: int = SCHEMA_VERSION

    ARRAYS = ("directions", "singular_values", "top1_cos")

    def save(self, path: str | Path) -> list[Path]:
        """Writes `path` (.json) and, beside it, .safetensors with the arrays: both, or neither.

        Raises:
            UsageError: the name does not end in .json.
            JaxDeltaError: a file cannot be written.
        """
        path = json_path(path)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays = {name: np.ascontiguousarray(fields.pop(name)) for name in self.ARRAYS}
        # The JSON is renamed last: where it is, the arrays are.
        files = {
            path.with_suffix(".safetensors"): save(arrays, {"schema_version": str(self.schema_version)}),
            path: (json.dumps(fields, indent=1, allow_nan=False) + "\n").encode(),
        }
        write_together(files)
        return [path, path.with_suffix(".safetensors")]

    @classmethod
    def load(cls, path: str | Path) -> "Analysis":
        """Reads what `save` wrote.

        Raises:
            JaxDeltaError: a file is missing or damaged, or was written by a newer version.
        """
        path = Path(path)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields.get("schema_version", 0)
            if version > SCHEMA_VERSION:
                raise JaxDeltaError(
                    f"{path}: has schema_version {version}, this jaxdelta reads up to {SCHEMA_VERSION}"
                )
            arrays: dict[str, Any] = load_file(path.with_suffix(".safetensors"))
            return cls(**fields, **arrays)
        except OSError as error:
            raise JaxDeltaError(f"{path}: cannot be read ({error})") from error
        except (ValueError, TypeError, AttributeError, SafetensorError) as error:
            raise JaxDeltaError(f"{path}: is not an analysis ({error})") from error

    def to_frame(self) -> Any:
        """The rows of `per_layer` as a pandas DataFrame indexed by layer; pandas is imported only here."""
        import pandas

        return pandas.DataFrame(self.per_layer).set_index("L")


def analyze(
    model: str | Qwen3,
    calibration: str | Path | Sequence[str] | Tokens | None = None,
    *,
    listener: Listener | None = None,
    progress: bool = False,
    **options: Any,
) -> Analysis:
    """Runs a model over a calibration text and measures what each layer writes into the residual stream.

    Args:
        model: `demo`, a directory, a hub id, or a loaded model (with `calibration` as Tokens then).
        calibration: a .txt or .json file, documents, or Tokens; by default the prompts of the package.
        listener: told a line as each stage ends.
        progress: show a bar over the layers where standard error is a terminal.
        **options: the fields of Options.

    Raises:
        UsageError: an impossible option.
        JaxDeltaError: a model, checkpoint or text that cannot be used.
    """
    chosen = Options(**options)
    stages = Stages(listener)
    with stages("open") as note:
        weights: Weights
        if isinstance(model, Qwen3):
            name, weights = "Qwen3", Resident(model)
        else:
            name, weights = model, open_checkpoint(model, revision=chosen.revision, loader=chosen.loader)
        note(f"{weights.config.parameters / 1e6:,.1f} M parameters")
    if isinstance(weights, Resident) and chosen.memory == "stream":
        raise UsageError("memory=stream needs a model by its name; this one is loaded already")
    phases = _phases(chosen.phases, weights.config.num_layers)
    with stages("tokenize") as note:
        tokens = _tokens(calibration, weights, chosen)
        note(f"{tokens.count} tokens")
    _check_rank(chosen.top_k, min(tokens.count - 1, weights.config.hidden_size), "a layer's update")
    try:
        return _measure(name, weights, tokens, phases, chosen, stages, progress)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise JaxDeltaError(
                f"out of memory ({first_line(error)}); lower --device_memory_gb, or --max_tokens"
            ) from error
        raise


def _phases(given: str | None, num_layers: int) -> tuple[str, ...]:
    return default_phases(num_layers) if given is None else parse_phases(given, num_layers)


def _tokens(
    calibration: str | Path | Sequence[str] | Tokens | None, weights: Weights, options: Options
) -> Tokens:
    if isinstance(calibration, Tokens):
        return calibration
    if not isinstance(weights, Checkpoint):
        raise UsageError("calibration must be Tokens where the model is given as an object")
    if calibration is None or isinstance(calibration, str | Path):
        calibration = load_documents(calibration)
    encode = load_encoder(weights.directory)
    return tokenize(calibration, encode, max_tokens=options.max_tokens, vocab_size=weights.config.vocab_size)


def _measure(
    name: str,
    weights: Weights,
    tokens: Tokens,
    phases: tuple[str, ...],
    options: Options,
    stages: Stages,
    progress: bool,
) -> Analysis:
    weights, plan = _planned(weights, tokens, options, stages)
    with stages("layers") as note:
        sweep = Sweep(weights, tokens.ids, options.compute_dtype, options.residual_dtype, plan.blocks)
        sweep.trace()
        ahead = partial(_compile_ahead, sweep, phases, options.top_k)
        updates = _all_updates(sweep, progress, ahead)
        figures = measure(updates, sweep.shape, options.top_k, options.svd, plan.at_once, sweep.clock)
        note(f"closure {sweep.closure_error:.1e}, certificate {figures.spectrum.defect.max():.1e}")
        note(f"loss {sweep.loss:.4f} nats per token")
        if figures.on_host.any():
            note(f"spectra done again on the host: rows {np.flatnonzero(figures.on_host).tolist()}")
    stages.listener(_times(sweep.clock.seconds))
    _check_finite(weights, figures, sweep.loss)
    with stages("overlaps"):
        result = _collect(figures, phases, options)
    return Analysis(
        model=name,
        num_layers=weights.config.num_layers,
        hidden=weights.config.hidden_size,
        n_calib_tokens=tokens.count,
        run=_run_facts(weights, options, plan, sweep, figures) | {"seconds": dict(stages.clock.seconds)},
        **result,
    )


def _planned(weights: Weights, tokens: Tokens, options: Options, stages: Stages) -> tuple[Weights, Plan]:
    """How the pass is divided; the weights, loaded if they are to be resident."""
    resident = options.memory == "resident" or isinstance(weights, Resident)
    with stages("plan") as note:
        work = Work(weights, tokens.ids.shape, options.compute_dtype, options.residual_dtype, resident)
        plan = work.plan(device_limit(options.device_memory_gb))
        note(str(plan))
    if resident and isinstance(weights, Checkpoint):
        with stages("load"):
            return Resident(weights.load()), plan
    return weights, plan


def _run_facts(
    weights: Weights, options: Options, plan: Plan, sweep: Sweep, figures: LayerFigures
) -> dict[str, Any]:
    return {
        "versions": {"jaxdelta": __version__, **{p: metadata.version(p) for p in VERSIONED}},
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "weights_dtype": weights.config.dtype,
        "compute_dtype": options.compute_dtype,
        "residual_dtype": options.residual_dtype,
        "last_state": options.last_state,
        "flags": dataclasses.asdict(options),
        "memory": {"mode": plan.mode, **plan.blocks._asdict(), "bytes": plan.parts, "limit": plan.limit},
        "layers_seconds": dict(sweep.clock.seconds),
        "closure_error": sweep.closure_error,
        "calibration_loss": sweep.loss,
        "certificate": float(figures.spectrum.defect.max()),
        "rows_on_host": np.flatnonzero(figures.on_host).tolist(),
    }


def _times(seconds: Mapping[str, float]) -> str:
    """What bound the pass: the layers wait where reading is slower than computing."""
    own = ", ".join(f"{what} {seconds[what]:.2f} s" for what in ("compute", "wait", "loss"))
    beside = ", ".join(f"{what} {seconds[what]:.2f} s" for what in ("read", "transfer", "spectra"))
    bound = "reading" if seconds["wait"] > seconds["compute"] else "computing"
    return f"           {own}; beside them {beside}: bound by {bound}"


def _all_updates(sweep: Sweep, progress: bool, after_first: Callable[[], None]) -> Iterator[Update]:
    """Every layer's update, then the last layer's in the reference's convention; then the loss is computed:
    here and not later, because the last spectra are still being computed beside it."""
    count = sweep.weights.config.num_layers
    # None: only where standard error is a terminal.
    bar = tqdm(sweep, " layers", count, leave=False, unit="layer", disable=None if progress else True)
    with ThreadPoolExecutor(1, "compile") as beside:
        for layer, update in enumerate(bar):
            if layer == 0:
                beside.submit(after_first)
            yield update
        yield sweep.normed
        sweep.finish_loss()


def _compile_ahead(sweep: Sweep, phases: tuple[str, ...], top_k: int) -> None:
    """Compiles, while the layers compute, what comes after them."""
    sweep.compile_rest()
    compile_overlaps((len(phases), top_k, sweep.weights.config.hidden_size), len(set(phases)))


def _check_rank(top_k: int, rank: int, what: str) -> None:
    if top_k > rank:
        raise UsageError(f"top_k={top_k} is larger than the rank {rank} of {what}")


def _check_finite(weights: Weights, figures: LayerFigures, loss: float) -> None:
    if figures.finite.all() and np.isfinite(loss):
        return
    if name := weights.first_bad_tensor():
        raise JaxDeltaError(f"the weights hold a NaN or an infinity: {name}")
    where = f"layer {int(np.argmin(figures.finite))}" if not figures.finite.all() else "the loss"
    raise JaxDeltaError(f"{where} is not finite although all weights are; try --compute_dtype=float32")


def _collect(figures: LayerFigures, phases: tuple[str, ...], options: Options) -> dict[str, Any]:
    """The Analysis' fields that follow from the layers' figures."""
    count = len(phases)
    residual, normed = count - 1, count
    rows = [_row(figures, row, min(row, count - 1), phases, options.top_k) for row in range(count + 1)]
    chosen = [*range(count - 1), normed if options.last_state == "normed" else residual]
    names = list(dict.fromkeys(phases))
    members = np.array([[phase == name for phase in phases] for name in names])
    found = overlaps(figures.spectrum.directions[chosen], members)
    return {
        "per_layer": [rows[row] for row in chosen],
        "top1_cos_adjacent": np.diagonal(found.top1_cos, 1).tolist(),
        "phase_overlap": _phase_table(names, members, found),
        "block_capture": _capture_table(names, members, found),
        "last_layer_normed": rows[normed],
        "last_layer_residual": rows[residual],
        "directions": figures.spectrum.directions[chosen].astype(np.float32),
        "singular_values": figures.spectrum.singular_values[chosen].astype(np.float32),
        "top1_cos": found.top1_cos.astype(np.float32),
    }


def _row(figures: LayerFigures, row: int, layer: int, phases: tuple[str, ...], k: int) -> dict[str, Any]:
    values = np.asarray(figures.spectrum.singular_values[row])
    rank = numerical_rank(values)
    if rank:
        _check_rank(k, rank, f"layer {layer}'s update")
    shares = energy_shares(values)
    tokens = {
        f.name: float(getattr(figures.tokens, f.name)[row]) for f in dataclasses.fields(TokenStatistics)
    }
    return {
        "L": layer,
        "phase": phases[layer],
        **tokens,
        "top_singvals": values[:k].tolist(),
        "eff_rank": effective_rank(values),
        **{f"top{m}_frac": float(shares[:m].sum()) for m in (1, 3, 10)},
        **({} if rank else {"note": "zero update: it has no directions"}),
    }


def _phase_table(names: list[str], members: np.ndarray, found: Overlaps) -> list[dict[str, Any]]:
    return [
        {
            "phase": name,
            "layers": int(members[p].sum()),
            "intra_cos_mean": float(found.intra_cos_mean[p]),
            "cross_cos_mean": float(found.cross_cos_mean[p]),
        }
        for p, name in enumerate(names)
    ]


def _capture_table(names: list[str], members: np.ndarray, found: Overlaps) -> list[dict[str, Any]]:
    return [
        {"phase": name, "L": int(layer), "capture": float(found.capture[p, layer])}
        for p, name in enumerate(names)
        if members[p].sum() > 1
        for layer in np.flatnonzero(members[p])
    ]
