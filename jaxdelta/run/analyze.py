"""analyze(): the whole way from a checkpoint and a text to an Analysis."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdelta.checkpoint.checkpoint import Checkpoint, open_checkpoint
from jaxdelta.checkpoint.controls import controlled
from jaxdelta.checkpoint.weights import Resident, Weights
from jaxdelta.errors import JaxDeltaError, UsageError, first_line
from jaxdelta.model.decoder import Decoder
from jaxdelta.report.analysis import Analysis
from jaxdelta.run import resume
from jaxdelta.run.memory_plan import Plan, Work, device_limit
from jaxdelta.run.options import Options
from jaxdelta.run.provenance import Spectra, device, pass_times, run_facts, versions
from jaxdelta.spectra import on_mesh as spectra_on_mesh
from jaxdelta.spectra.moments import on_mesh as moments_on_mesh
from jaxdelta.spectra.moments.accumulate import ONE_DEVICE, Windows, pool_layers
from jaxdelta.spectra.moments.files import RUN, keep_layer, keep_text, keeping
from jaxdelta.spectra.scheduler import in_batches, measured
from jaxdelta.spectra.view_summary import CROSSED, Design, LayerFigures, ViewFigures
from jaxdelta.spectra.views import RAW, View, parse_views, parts_looked_at
from jaxdelta.statistics.across_layers.overlap import overlaps, principal_angles
from jaxdelta.statistics.across_layers.phases import Phases, default_phases, parse_phases
from jaxdelta.statistics.across_layers.table import reference_tables, relate, stacked_directions
from jaxdelta.statistics.across_layers.verdict import verdicts
from jaxdelta.statistics.layer_row import Described, described
from jaxdelta.statistics.per_layer.ranks import numerical_rank
from jaxdelta.sweep import on_mesh as sweep_on_mesh
from jaxdelta.sweep.mesh import Grid, leads, make_grid
from jaxdelta.sweep.progress import shown, tokens_per_second
from jaxdelta.sweep.states import States, scratch_directory
from jaxdelta.sweep.sweep import Sweep, Wrote
from jaxdelta.text.documents import read_documents, shuffled
from jaxdelta.text.excerpt import excerpt
from jaxdelta.text.groups import Groups, Sample
from jaxdelta.text.tokenizer import load_encoder
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import tokenize
from jaxdelta.utils.timing import Stages

Listener = Callable[[str], None]


def analyze(
    model: str | Path | Decoder,
    calibration: str | Path | Iterable[str] | Tokens | None = None,
    *,
    listener: Listener | None = None,
    progress: bool = False,
    before: Callable[..., None] | None = None,
    keep_checkpoint: bool = False,
    **options: Any,
) -> Analysis:
    """Runs a model over a calibration text and measures what each layer writes into the residual stream.

    >>> import jaxdelta
    >>> run = jaxdelta.analyze("demo", max_tokens=100, bootstrap=0, null_draws=0)
    >>> print(f"{run.n_calib_tokens} tokens, loss {run.run['calibration_loss']:.2f} nats per token")
    100 tokens, loss 4.77 nats per token

    Args:
        model: `demo`, a directory, a hub id, or a loaded model (with `calibration` as Tokens then).
        calibration: a source of documents as `read_documents` takes it, documents, or Tokens; by default the
            prompts of the package.
        listener: told a line as each stage ends.
        progress: show a bar, with tokens per second, where standard error is a terminal.
        before: called with (config, tokens, phases, Options) before a weight is read; it may raise.
        keep_checkpoint: leave what is in `checkpoint_dir` to the caller, who calls `resume.remove` when the
            result is where it cannot be lost.
        **options: the fields of Options.

    Raises:
        UsageError: an impossible option.
        JaxDeltaError: a model, checkpoint or text that cannot be used. What a script would print in its one
            line of either is the message.
    """
    chosen = Options.of(options)
    stages = Stages(listener)
    with stages("open") as note:
        weights: Weights
        if isinstance(model, Decoder):
            name, weights = model.config.model_type, Resident(model)
        else:
            name = str(model)
            weights = open_checkpoint(name, revision=chosen.revision, loader=chosen.loader)
        note(f"{weights.config.parameters / 1e6:,.1f} M parameters")
    if isinstance(weights, Resident) and chosen.memory == "stream":
        raise UsageError("memory=stream needs a model by its name; this one is loaded already")
    if isinstance(weights, Resident) and chosen.checkpoint_dir is not None:
        raise UsageError("checkpoint_dir needs a model by its name: of a loaded one nothing says which it is")
    phases = _phases(chosen.phases, weights.config.num_layers)
    with stages("tokenize") as note:
        tokens = _tokens(calibration, weights, chosen)
        note(f"{tokens.count} tokens")
    grid = make_grid(chosen.mesh, weights.config)
    _check_rank(chosen.top_k, min(int(tokens.counted.sum()), weights.config.hidden_size), "a layer's update")
    if before:
        before(weights.config, tokens, phases, chosen)
    try:
        waiting = resume.moments(chosen.checkpoint_dir)
        with keeping(chosen.keep_moments if leads() else None, waiting) as kept:
            result = _measure(name, weights, tokens, phases, chosen, stages, progress, kept, grid)
            if kept:
                result.save(kept / RUN)
        if not keep_checkpoint:
            resume.remove(chosen.checkpoint_dir)
        return result
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise JaxDeltaError(
                f"out of memory ({first_line(error)}); lower --device_memory_gb, or --max_tokens"
            ) from error
        raise


def _phases(given: str | None, num_layers: int) -> tuple[str, ...]:
    return default_phases(num_layers) if given is None else parse_phases(given, num_layers)


def _tokens(
    calibration: str | Path | Iterable[str] | Tokens | None, weights: Weights, options: Options
) -> Tokens:
    if isinstance(calibration, Tokens):
        return calibration
    if not isinstance(weights, Checkpoint):
        raise UsageError("calibration must be Tokens where the model is given as an object")
    if calibration is None or isinstance(calibration, str | Path):
        documents: Iterable[str] = read_documents(
            calibration, text_key=options.text_key, split=options.split, config=options.dataset_config
        )
    else:
        documents = calibration
    return tokenize(
        shuffled(documents, options.seed) if options.shuffle else documents,
        load_encoder(weights.directory),
        max_tokens=options.max_tokens,
        vocab_size=weights.config.vocab_size,
        layout=options.layout,
        seq_len=options.seq_len,
    )


def _measure(
    name: str,
    weights: Weights,
    tokens: Tokens,
    phases: tuple[str, ...],
    options: Options,
    stages: Stages,
    progress: bool,
    kept: Path | None,
    grid: Grid | None,
) -> Analysis:
    pooled = options.keep_moments is not None
    sample = Sample.of(tokens, options.bootstrap, options.seed, options.resampled, pooled)
    original = weights
    weights, plan = _planned(weights, tokens, options, sample, stages, grid)
    begun = _begun(original, tokens, options, plan, sample, stages.listener, grid)
    weights, tokens = controlled(weights, tokens, options.control, options.seed)
    sample = dataclasses.replace(sample, tokens=tokens)
    if options.control:
        stages.listener(f" control: {options.control} (seed {options.seed})")
    scratch = scratch_directory(options.scratch, plan.blocks.place)
    with stages("layers") as note, scratch as directory, begun as run:
        dtypes, states = (options.compute_dtype, options.residual_dtype), States(plan.blocks.place, directory)
        going_on = (run.restore(states), run.keep) if run else ()
        passed = weights, tokens, *dtypes, plan.blocks, sample.windows is not None, states, *going_on
        sweep = Sweep(*passed) if grid is None else sweep_on_mesh.SplitSweep(grid, *passed)
        sweep.trace()
        passing = _with_loss(sweep, shown(sweep, tokens.count, progress))
        found = _measured(sweep, passing, sample, options, plan.at_once, kept, grid)
        figures = run.keeping(found) if run else found
        layers = list(described(figures, Phases(phases), sample, options.top_k, sweep.shape[1]))
        spectra = Spectra.of(layers)
        note(f"closure {sweep.closure_error:.1e}, certificate {spectra.certificate:.1e}")
        note(f"loss {sweep.loss:.4f} nats per token")
        if spectra.on_host:
            note(f"spectra done again on the host: rows {spectra.on_host}")
    rate = tokens_per_second(sweep, tokens.count, stages.clock.seconds["layers"])
    stages.listener(f"           {rate:,.0f} tokens/s: {pass_times(sweep.clock.seconds)}")
    _check_finite(weights, layers, sweep.loss)
    if kept:
        keep_text(kept, sample)
    with stages("overlaps"):
        result = collect(layers, Phases(phases), sample, options)
    return Analysis(
        model=name,
        num_layers=weights.config.num_layers,
        hidden=weights.config.hidden_size,
        n_calib_tokens=tokens.count,
        text=excerpt(tokens, result["per_layer"]),
        run=run_facts(weights, options, plan, sweep, spectra, sample, grid)
        | {"seconds": dict(stages.clock.seconds), "tokens_per_second": rate},
        **result,
    )


def _measured(
    sweep: Sweep,
    passing: Iterator[Iterator[Wrote]],
    sample: Sample,
    options: Options,
    at_once: int,
    kept: Path | None,
    grid: Grid | None,
) -> Iterator[LayerFigures]:
    """The layers' figures: from their updates kept whole, or, of a long text, from their moments."""
    views, short = parse_views(options.views), sample.windows is None
    groups = (sample.groups if short else Groups.none(sample.halves)) if options.resampled else None
    design = Design(options.top_k, options.svd, views, options.sink_factor, groups)
    if sample.windows is None:
        pending = resume.PENDING if options.checkpoint_dir else None
        call = None if grid is None else spectra_on_mesh.spread(grid)
        at_once *= 1 if grid is None else grid.mesh.size
        return measured(passing, sweep.shape, design, at_once, sweep.clock, pending, call)
    windows = Windows(sweep.counted, sweep.split(sample.windows), sample.halves)
    keep = partial(keep_layer, kept) if kept else None
    programs = ONE_DEVICE if grid is None else moments_on_mesh.split_programs(grid)
    return pool_layers(passing, windows, sweep.shape[1], design, sweep.clock, keep, programs, sweep.start)


def _begun(
    weights: Weights,
    tokens: Tokens,
    options: Options,
    plan: Plan,
    sample: Sample,
    listener: Listener,
    grid: Grid | None,
) -> contextlib.AbstractContextManager[resume.Run | None]:
    """The checkpoint of this run, begun now or before it was killed; None where none is wanted."""
    if options.checkpoint_dir is None or not isinstance(weights, Checkpoint):
        return contextlib.nullcontext()
    stride = 1
    if sample.windows is None and (grid or in_batches()):
        stride = plan.at_once * (grid.mesh.size if grid else 1)
    program = {**versions(), "device": device(), "layers measured at once": stride}
    manifest = resume.manifest(program, weights, dataclasses.asdict(options), tokens, plan.blocks)
    return resume.opened(options.checkpoint_dir, manifest, weights.config.num_layers, stride, listener)


def _planned(
    weights: Weights,
    tokens: Tokens,
    options: Options,
    sample: Sample,
    stages: Stages,
    grid: Grid | None,
) -> tuple[Weights, Plan]:
    """How the pass is divided; the weights, loaded if they are to be resident."""
    resident = options.memory == "resident" or isinstance(weights, Resident)
    with stages("plan") as note:
        pool = None
        if sample.windows is not None:
            pool = len(parts_looked_at(parse_views(options.views))), sample.documents
        dtypes = options.compute_dtype, options.residual_dtype
        data, model, local = (grid.data, grid.model, len(grid.local)) if grid else (1, 1, 1)
        scratch = options.scratch is not None
        work = Work(weights, tokens.ids.shape, *dtypes, resident, pool, scratch, data, model)
        plan = work.plan(device_limit(options.device_memory_gb, local))
        note(str(plan))
    if resident and isinstance(weights, Checkpoint):
        with stages("load"):
            return Resident(weights.load()), plan
    return weights, plan


def _with_loss(sweep: Sweep, layers: Iterator[Iterator[Wrote]]) -> Iterator[Iterator[Wrote]]:
    """Every layer; then the loss is computed: here and not later, because the last spectra are still being
    computed beside it."""
    with ThreadPoolExecutor(1, "compile") as beside:
        for number, blocks in enumerate(layers):
            yield blocks
            if number == 0:
                beside.submit(sweep.compile_rest)
        sweep.finish_loss()


def _check_rank(top_k: int, rank: int, what: str) -> None:
    if top_k > rank:
        raise UsageError(f"top_k={top_k} is larger than the rank {rank} of {what}")


def _check_finite(weights: Weights, layers: Sequence[Described], loss: float) -> None:
    bad = [row for row, layer in enumerate(layers) if not layer.finite]
    if not bad and np.isfinite(loss):
        return
    if name := weights.first_bad_tensor():
        raise JaxDeltaError(f"the weights hold a NaN or an infinity: {name}")
    where = f"layer {bad[0]}" if bad else "the loss"
    raise JaxDeltaError(f"{where} is not finite although all weights are; try --compute_dtype=float32")


def collect(layers: Sequence[Described], phases: Phases, sample: Sample, options: Options) -> dict[str, Any]:
    """The Analysis' fields that follow from the layers' figures: the last is the last layer's, normed."""
    *plain, normed = layers
    chosen = [*plain[:-1], normed if options.last_state == "normed" else plain[-1]]
    last = len(plain) - 1
    for index, layer in enumerate(layers):
        rank = numerical_rank(layer.views[RAW].singular_values)
        _check_rank(options.top_k, rank or options.top_k, f"layer {min(index, last)}'s update")

    raw = _view(chosen, RAW)
    directions = stacked_directions(raw)
    angles = principal_angles(directions)
    found = overlaps(directions, phases.members)
    return {
        "per_layer": [layer.row for layer in chosen],
        "last_layer_normed": normed.row,
        "last_layer_residual": plain[-1].row,
        **reference_tables(found, phases),
        **_related(chosen, phases, sample, options),
        "directions": directions.astype(np.float32),
        "singular_values": np.stack([figures.singular_values for figures in raw]).astype(np.float32),
        "top1_cos": found.top1_cos.astype(np.float32),
        "principal_cosines": angles.cosines.astype(np.float32),
        "projection_distance": angles.projection_distance.astype(np.float32),
        "grassmann_distance": angles.grassmann_distance.astype(np.float32),
    }


def _related(layers: Sequence[Described], phases: Phases, sample: Sample, options: Options) -> dict[str, Any]:
    """What relates the layers, with and without sinks; and the verdict, without sinks if they were masked."""
    if not options.resampled:
        return {}
    overlap: dict[str, dict[str, Any]] = {}
    related: dict[tuple[int, ...], dict[str, Any]] = {}
    for view in (view for view in CROSSED if view in layers[0].views):
        figures = _view(layers, view)
        same = tuple(map(id, figures))  # without sinks, the masked view is the raw one
        if same not in related:
            related[same] = relate(figures, phases, sample, options.null_draws, options.seed)
        overlap[view.name] = related[same]
    return {"overlap": overlap, "verdict": verdicts(related[same])}


def _view(layers: Sequence[Described], view: View) -> list[ViewFigures]:
    return [layer.views[view] for layer in layers]
