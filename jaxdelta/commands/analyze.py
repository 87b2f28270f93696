"""Measures what each layer of a Qwen3 model writes into its residual stream.

    jaxdelta --model=demo --out=demo.json

Takes about ten seconds on two cores, mostly compilation. Writes demo.json,
demo.safetensors and demo.html, a page that shows them. The calibration loss of
the demo model is 5.10 nats per token.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from jaxdelta.checkpoint.controls import CONTROLS
from jaxdelta.commands import _flags
from jaxdelta.errors import UsageError
from jaxdelta.report import write
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.tables import tables
from jaxdelta.run import analyze, control_comparison, memory_plan, resume
from jaxdelta.run.options import DTYPES, LAST_STATES, Options
from jaxdelta.spectra.spectrum import METHODS
from jaxdelta.sweep import mesh
from jaxdelta.text.windows import LAYOUTS
from jaxdelta.utils import cli, files
from jaxdelta.utils.command import Command

DEFAULTS = Options()
OPTIONS = tuple(vars(DEFAULTS))
COORDINATION = ("coordinator_address", "num_processes", "process_id")


def main() -> None:
    """The command `jaxdelta`; also `python -m jaxdelta` and scripts/delta_svd.py."""
    cli.run_command(COMMAND)


def act() -> None:
    """Joins the other processes, if there are any, and analyses the model."""
    distributed, given = flags.FLAGS.distributed, [flags.FLAGS[name].value for name in COORDINATION]
    if not distributed and given != [None, None, None]:
        raise UsageError("coordinator_address, num_processes and process_id need --distributed")
    with mesh.processes(*given) if distributed else nullcontext():
        run(leads=not distributed or mesh.leads())


def run(leads: bool) -> None:
    """Analyses the model. Of several processes only the one that leads writes files and prints."""
    out, figures = _flags.required_path("out"), _flags.path("figures")
    if leads:
        files.check_output(out, *([write.PAGE] if flags.FLAGS.report else []))
        if figures:
            write.check_figures(figures)
    quiet = flags.FLAGS.quiet or not leads
    say = (lambda line: None) if quiet else partial(print, flush=True)
    say(f"Loading {flags.FLAGS.model} ...")
    result = _analysed(say, quiet)
    # All files before the tables: their reader may stop reading, as `head` does.
    saved = _save(result, out, figures) if leads else []
    resume.remove(flags.FLAGS.checkpoint_dir)
    say(f" L={result.num_layers}, hidden={result.hidden}")
    say(f" calibration tokens: {result.n_calib_tokens}")
    if not quiet:
        say(tables(result))
    say("\nSaved: " + ", ".join(map(str, saved)))


def _save(result: Analysis, out: Path, figures: Path | None) -> list[Path]:
    """Writes all files of the run; returns their paths, and the directory of the figures."""
    page = out.with_suffix(write.PAGE) if flags.FLAGS.report else None
    more = write.shown(result, page, figures)
    with write.directory_for(figures):
        result.save(out, more)
    return [path for path in (out, out.with_suffix(".safetensors"), page, figures) if path]


def _analysed(say: Callable[[str], Any], quiet: bool) -> Analysis:
    """Runs the analysis; compares it with a control's run if one is given."""
    file = _flags.path("compare_control")
    control = file and control_comparison.load_control(file)
    result = analyze.analyze(
        flags.FLAGS.model,
        flags.FLAGS.calibration,
        listener=say,
        progress=not quiet,
        before=partial(control_comparison.check_control, control) if control else None,
        keep_checkpoint=True,
        **{name: flags.FLAGS[name].value for name in OPTIONS},
    )
    return control_comparison.compare_control(result, control, file.name) if file and control else result


def define_text() -> None:
    """Defines the flags that choose the calibration text."""
    flags.DEFINE_string(
        "calibration",
        None,
        "text to run the model on: a .txt, .json, .jsonl or .parquet file, a directory of them, or a data "
        "set, saved on disk or by its hub id (default: 25 short prompts)",
    )
    flags.DEFINE_string(
        "text_key", DEFAULTS.text_key, "field of a .jsonl file, or column of a table, that holds the text"
    )
    flags.DEFINE_string("split", DEFAULTS.split, "which split of a data set")
    flags.DEFINE_string("dataset_config", DEFAULTS.dataset_config, "which configuration of a data set")
    flags.DEFINE_integer(
        "max_tokens",
        DEFAULTS.max_tokens,
        "maximum number of tokens; only as many documents are read as needed",
    )
    flags.DEFINE_enum(
        "layout",
        DEFAULTS.layout,
        LAYOUTS,
        "stream joins the documents with blank lines into one text, as the reference does; packed keeps "
        "them separate, several in a window",
    )
    flags.DEFINE_integer("seq_len", DEFAULTS.seq_len, "tokens in a window")
    flags.DEFINE_bool("shuffle", DEFAULTS.shuffle, "take the documents in random order, see --seed")


def define_measurement() -> None:
    """Defines the flags that choose what is measured, and how."""
    flags.DEFINE_string(
        "views", DEFAULTS.views, "views of each update: all, none, or names as in docs/definitions.md"
    )
    flags.DEFINE_integer(
        "top_k", DEFAULTS.top_k, "singular values (JSON) and directions (.safetensors) kept per layer"
    )
    flags.DEFINE_enum(
        "last_state",
        DEFAULTS.last_state,
        LAST_STATES,
        "the state that ends the last layer's update: before the final norm, or after it as in the reference",
    )
    flags.DEFINE_string(
        "phases", DEFAULTS.phases, "layers of each phase, such as A:0-6,B:7-9,C:10-27 (default: by depth)"
    )
    flags.DEFINE_float(
        "sink_factor",
        DEFAULTS.sink_factor,
        "mask tokens whose state is longer than this many times the layer's median",
    )
    flags.DEFINE_integer(
        "bootstrap", DEFAULTS.bootstrap, "bootstrap resamples of documents; 0 turns the intervals off"
    )
    flags.DEFINE_integer(
        "null_draws", DEFAULTS.null_draws, "random draws for what chance gives; 0 turns the nulls off"
    )
    flags.DEFINE_enum(
        "control", DEFAULTS.control, CONTROLS, "measure a control: randomised weights or randomised text"
    )
    flags.DEFINE_string("compare_control", None, "JSON of a control's run, to compare this run with")
    flags.DEFINE_integer(
        "seed", DEFAULTS.seed, "random seed of intervals, nulls, controls and the order of documents"
    )


def define_arithmetic() -> None:
    """Defines the flags of precision and method."""
    flags.DEFINE_enum(
        "compute_dtype",
        DEFAULTS.compute_dtype,
        DTYPES,
        "dtype of matrix-multiplication inputs; sums stay float32",
    )
    flags.DEFINE_enum("residual_dtype", DEFAULTS.residual_dtype, DTYPES, "dtype of the residual stream")
    flags.DEFINE_enum(
        "svd", DEFAULTS.svd, METHODS, "spectra from Gram matrices, or by a full SVD: slower, same numbers"
    )


def define_output() -> None:
    """Defines the flags that choose what is written and printed."""
    _flags.define_out_json()
    flags.DEFINE_bool("report", True, "write the HTML page")
    _flags.define_figures()
    flags.DEFINE_string(
        "keep_moments",
        DEFAULTS.keep_moments,
        "directory for every layer's moments, which jaxdelta-merge pools over several texts",
    )
    flags.DEFINE_bool("quiet", False, "no progress and no tables, only the files")


def define_memory() -> None:
    """Defines the flags of memory, and of resuming."""
    flags.DEFINE_enum(
        "memory",
        DEFAULTS.memory,
        memory_plan.MODES,
        "weights in memory: two layers at a time (auto, stream), or the whole model (resident)",
    )
    flags.DEFINE_float(
        "device_memory_gb",
        DEFAULTS.device_memory_gb,
        "cap on the device's memory in 10^9 bytes (default: all of it)",
    )
    flags.DEFINE_string(
        "scratch", DEFAULTS.scratch, "directory for the states of a long text that the device cannot hold"
    )
    flags.DEFINE_string(
        "checkpoint_dir",
        DEFAULTS.checkpoint_dir,
        "directory for every finished layer: after any interruption the same command resumes from there",
    )


def define_devices() -> None:
    """Defines the flags of several devices and several hosts."""
    flags.DEFINE_string(
        "mesh", DEFAULTS.mesh, "devices along each axis, such as data:2,model:4 (default: all on data)"
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "this is one of several processes, as SLURM, GKE or the next three flags describe",
    )
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0")
    flags.DEFINE_integer("num_processes", None, "number of processes")
    flags.DEFINE_integer("process_id", None, "which process this is, from 0")


COMMAND = Command(
    action=act,
    about=__doc__ or "",
    options={
        "Model": _flags.define_checkpoint,
        "Text": define_text,
        "What is measured": define_measurement,
        "Arithmetic": define_arithmetic,
        "Output": define_output,
        "Memory": define_memory,
        "Several devices": define_devices,
    },
    required={"model": _flags.MODEL, "out": _flags.OUT_JSON},
)
