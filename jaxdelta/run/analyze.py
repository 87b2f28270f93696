"""analyze(): from a checkpoint and a text to an Analysis."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdelta.checkpoint.checkpoint import Checkpoint
from jaxdelta.checkpoint.controls import controlled
from jaxdelta.checkpoint.weights import InMemoryWeights, Weights
from jaxdelta.errors import JaxDeltaError, first_line
from jaxdelta.model.decoder import count_parameters
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.tables import in_nats
from jaxdelta.run import resume
from jaxdelta.run.collect import collect
from jaxdelta.run.context import Identity, RunContext
from jaxdelta.run.fingerprint import weights_fingerprint
from jaxdelta.run.inputs import open_model, read_text, read_tokens, tokenizer_name
from jaxdelta.run.memory_plan import Measurement, MemoryDemand, Plan, device_limit
from jaxdelta.run.options import Options, check_rank
from jaxdelta.run.provenance import pass_times, run_record
from jaxdelta.spectra import scheduler
from jaxdelta.spectra.moments.accumulate import MomentSummaries, TextBlocks
from jaxdelta.spectra.moments.files import RUN, keep_layer, keep_text, keeping
from jaxdelta.spectra.moments.on_mesh import mesh_kernels
from jaxdelta.spectra.on_mesh import on_mesh
from jaxdelta.spectra.scheduler import (
    BatchedSummaries,
    Schedule,
    Summaries,
    ThreadedSummaries,
    layers_pending,
    on_one_device,
)
from jaxdelta.spectra.view_summary import MeasurementPlan
from jaxdelta.spectra.views import parse_views, parts_of_views
from jaxdelta.statistics.across_layers.phases import Phases, default_phases, parse_phases
from jaxdelta.statistics.layer_row import LayerRecord, layer_record
from jaxdelta.sweep.mesh import DeviceMesh, Devices, leads, make_devices
from jaxdelta.sweep.progress import shown, tokens_per_second
from jaxdelta.sweep.states import States, scratch_directory
from jaxdelta.sweep.sweep import PassPlan, Resume, Sweep
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.text.measure import measured
from jaxdelta.text.rows import Reading
from jaxdelta.utils.jax_settings import own_settings
from jaxdelta.utils.timing import Clock, Stages

Listener = Callable[[str], None]


def analyze(
    model: Any,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
    progress: bool = False,
    before: Callable[[RunContext], None] | None = None,
    keep_checkpoint: bool = False,
    **options: Any,
) -> Analysis:
    """Measures what each layer of a model writes into its residual stream on a calibration text.

    >>> import jaxdelta
    >>> run = jaxdelta.analyze("demo", max_tokens=100, bootstrap=0, null_draws=0)
    >>> print(f"{run.n_calib_tokens} tokens, loss {run.run['calibration_loss']:.2f} nats per token")
    100 tokens, loss 4.77 nats per token

    Args:
        model: `demo`, a directory, a hub id, a loaded Decoder, or a transformers model in memory.
        calibration: a file, directory or data set as for --calibration; an iterable of texts, or of chats,
            each a list of messages; a `datasets` Dataset or a DataFrame with its column `text_key`; token ids
            as lists, an array or a tokenizer's output (a sequence is a document, padding is left out), or
            Tokens. Default: the prompts in the package.
        tokenizer: a directory, a transformers tokenizer or a tokenizers.Tokenizer, instead of the model's
            own; a text for a loaded model needs it. The record names it.
        listener: called with a line of text after each stage.
        progress: show a progress bar with tokens per second, if standard error is a terminal.
        before: called with the RunContext before any layer is read; it may raise.
        keep_checkpoint: leave `checkpoint_dir` in place; the caller removes it with `resume.remove` once the
            result is saved.
        **options: the fields of Options.

    Raises:
        UsageError: an impossible option.
        JaxDeltaError: an unusable model, checkpoint or text. The messages are the commands' error lines.
    """
    chosen = Options.of(options | {"tokenizer": tokenizer_name(tokenizer)})
    with own_settings(), _out_of_memory_in_a_line():
        run = _opened(model, calibration, tokenizer, chosen, Stages(listener))
        if before:
            before(run)
        run = _loaded(run)
        waiting = resume.moments(run.options.checkpoint_dir)
        with keeping(run.options.keep_moments if leads() else None, waiting) as kept:
            result = _measure(run, progress, kept)
            if kept:
                result.save(kept / RUN)
        if not keep_checkpoint:
            resume.remove(run.options.checkpoint_dir)
        return result


def _opened(model: Any, calibration: Any, tokenizer: Any, options: Options, stages: Stages) -> RunContext:
    """Looks at the text, opens the model, tokenizes and plans the memory; reads no layer's weights."""
    reading = Reading()
    text = read_text(calibration, options, reading)  # Before a model is fetched: its name may be misspelt.
    with stages("open") as note:
        name, weights = open_model(model, options)
        note(f"{count_parameters(weights.config) / 1e6:,.1f} M parameters")
    layers, given = weights.config.num_layers, options.phases
    phases = Phases(default_phases(layers) if given is None else parse_phases(given, layers))
    with stages("tokenize") as note:
        tokens, said = read_tokens(text, tokenizer, weights, options)
        tokens = measured(tokens, options.measure)
        note(f"{tokens.count} tokens")
    devices = make_devices(options.mesh, weights.config)
    check_rank(options, int(tokens.counted.sum()), weights.config.hidden_size)
    sample = ResamplingGroups.of(tokens, options.bootstrap, options.seed)
    with stages("plan") as note:
        plan = _plan(weights, sample, options, devices)
        note(str(plan))
    if plan.groups:
        sample = sample.coarser(plan.groups, options.seed)
    notes = (*(weights.notes if isinstance(weights, Checkpoint) else ()), *reading.notes, *said)
    for sentence in notes:
        stages.listener(f" note: {sentence}")
    identity = Identity(weights_fingerprint(weights), tokens.fingerprint)
    return RunContext(name, weights, weights, sample, phases, options, stages, devices, plan, identity, notes)


def _plan(weights: Weights, sample: ResamplingGroups, options: Options, devices: Devices) -> Plan:
    views, groups = parse_views(options.views), options.resampled
    measurement = Measurement(
        len({view._replace(masked=False) for view in views}),
        len(parts_of_views(views)),
        sample.documents if groups else 1,
        sample.most_in_a_window if groups else 1,
        moments_only=options.keep_moments is not None,
    )
    demand = MemoryDemand(
        weights,
        sample.tokens.ids.shape,
        options.compute_dtype,
        options.residual_dtype,
        options.memory == "resident" or isinstance(weights, InMemoryWeights),
        measurement,
        options.scratch is not None,
        devices.data,
        devices.model,
    )
    return demand.plan(device_limit(options.device_memory_gb, len(devices.local)))


def _loaded(run: RunContext) -> RunContext:
    """The run with all weights in memory, if they are to be resident."""
    if run.options.memory != "resident" or not isinstance(run.weights, Checkpoint):
        return run
    with run.stages("load"):
        return dataclasses.replace(run, weights=InMemoryWeights(run.weights.load()))


@contextlib.contextmanager
def _out_of_memory_in_a_line() -> Iterator[None]:
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise JaxDeltaError(
                f"out of memory ({first_line(error)}); lower --device_memory_gb, or --max_tokens"
            ) from error
        raise


def _measure(run: RunContext, progress: bool, kept: Path | None) -> Analysis:
    """Runs and summarises every layer, then compares the layers; moments go to the directory `kept`."""
    stages, plan = run.stages, run.plan
    with stages("layers") as note, contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch_directory(run.options.scratch, plan.blocks.place))
        checkpoint = stack.enter_context(_checkpoint(run))
        run, clock = _controlled(run), Clock()
        sweep = _sweep(run, checkpoint, States(plan.blocks.place, directory, run.devices), clock)
        records = checkpoint.records() if checkpoint else []
        summaries = stack.enter_context(_summaries(run, sweep, clock, kept))
        for layer in shown(sweep, run.sample.tokens.count, progress):
            _keep(summaries.add(layer), records, checkpoint)
        outcome = sweep.finish()  # while the last layers' spectra are computed
        _keep(summaries.rest(), records, checkpoint)
        if checkpoint:
            checkpoint.wait()
        facts = run_record(run, outcome, records)
        note(f"closure {outcome.closure_error:.1e}, certificate {facts['certificate']:.1e}")
        note(f"loss {in_nats(facts)}")
        if facts["rows_on_host"]:
            note(f"spectra recomputed on the host: rows {facts['rows_on_host']}")
    rate = tokens_per_second(sweep, run.sample.tokens.count, stages.clock.seconds["layers"])
    stages.listener(f"           {rate:,.0f} tokens/s: {pass_times(clock.seconds)}")
    _check_finite(run.weights, records, outcome.loss)
    if kept:
        keep_text(kept, run.sample)
    with stages("overlaps"):
        fields = collect(records, run.phases, run.sample, run.options)
    facts |= {"layers_seconds": dict(clock.seconds), "seconds": dict(stages.clock.seconds)}
    return Analysis(
        model=run.name,
        num_layers=run.weights.config.num_layers,
        hidden=run.weights.config.hidden_size,
        n_calib_tokens=run.sample.tokens.count,
        run=facts | {"tokens_per_second": rate},
        **fields,
    )


def _keep(ready: Iterable[LayerRecord], records: list[LayerRecord], checkpoint: resume.Run | None) -> None:
    """Adds records in the layers' order, and writes them to the checkpoint."""
    for record in ready:
        if checkpoint:
            checkpoint.keep_record(len(records), record)
        records.append(record)


def _controlled(run: RunContext) -> RunContext:
    """The run with the weights or the text of its control, if it has one."""
    options = run.options
    weights, tokens = controlled(run.weights, run.sample.tokens, options.control, options.seed)
    if options.control:
        run.stages.listener(f" control: {options.control} (seed {options.seed})")
    return dataclasses.replace(run, weights=weights, sample=dataclasses.replace(run.sample, tokens=tokens))


def _sweep(run: RunContext, checkpoint: resume.Run | None, states: States, clock: Clock) -> Sweep:
    """The pass, starting after the last layer of the checkpoint."""
    options = run.options
    resumed = Resume(states, checkpoint.restore(states), checkpoint.keep) if checkpoint else Resume(states)
    plan = PassPlan(
        run.plan.blocks, options.compute_dtype, options.residual_dtype, all_tokens=run.plan.groups > 0
    )
    sweep = Sweep(run.weights, run.sample.tokens, plan, run.devices, resumed, clock)
    sweep.trace()
    return sweep


def _summaries(run: RunContext, sweep: Sweep, clock: Clock, kept: Path | None) -> Summaries:
    """Summarises layers from moments, or from rows: on threads or in batches."""
    options, sample, devices = run.options, run.sample, run.devices
    views = parse_views(options.views)
    plan = MeasurementPlan(options.top_k, options.svd, views, options.sink_factor, options.resampled)
    at_once = run.plan.at_once * devices.size
    pending = resume.PENDING if options.checkpoint_dir else layers_pending(at_once)
    schedule = Schedule(at_once, pending, sweep.start, clock)
    hidden = run.weights.config.hidden_size
    finish = partial(layer_record, phases=run.phases, sample=sample, k=options.top_k, hidden=hidden)
    mesh = devices if isinstance(devices, DeviceMesh) else None
    if run.plan.groups:
        text = TextBlocks.of(sweep.counted, sample.group_of_token)
        keep = partial(keep_layer, kept) if kept else None
        return MomentSummaries(plan, finish, schedule, text, keep, mesh_kernels(mesh) if mesh else None)
    groups = sample.groups if options.resampled else None
    if mesh is None and not scheduler.in_batches():
        return ThreadedSummaries(plan, finish, schedule, groups)
    solver = on_mesh(mesh, at_once, groups) if mesh else on_one_device(at_once, groups)
    return BatchedSummaries(plan, finish, schedule, solver)


def _checkpoint(run: RunContext) -> contextlib.AbstractContextManager[resume.Run | None]:
    """The run's checkpoint, new or from before an interruption; None without --checkpoint_dir."""
    directory, weights = run.options.checkpoint_dir, run.original
    if directory is None or not isinstance(weights, Checkpoint):
        return contextlib.nullcontext()
    manifest = resume.manifest(run, weights)
    return resume.opened(directory, manifest, weights.config.num_layers, run.stages.listener)


def _check_finite(weights: Weights, layers: Sequence[LayerRecord], loss: float | None) -> None:
    bad = [row for row, layer in enumerate(layers) if not layer.finite]
    if not bad and (loss is None or np.isfinite(loss)):
        return
    if name := weights.first_bad_tensor():
        raise JaxDeltaError(f"the weights hold a NaN or an infinity: {name}")
    where = f"layer {bad[0]}" if bad else "the loss"
    raise JaxDeltaError(f"{where} is not finite although all weights are; try --compute_dtype=float32")
