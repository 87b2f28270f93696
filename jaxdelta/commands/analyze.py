"""Measures what each layer of a language model writes into its residual stream.

    jaxdelta --model=demo --out=demo.json

Takes about ten seconds on two cores, mostly compilation. Writes demo.json,
demo.safetensors and demo.html, a page that shows them. The calibration loss of
the demo model is 5.10 nats per token.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from jaxdelta.commands import _flags
from jaxdelta.errors import UsageError
from jaxdelta.report import write
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.tables import tables
from jaxdelta.run import analyze, control_comparison, resume
from jaxdelta.run.options import CHOICES, Options
from jaxdelta.sweep import mesh
from jaxdelta.utils import cli, files
from jaxdelta.utils.command import Command

COORDINATION = ("coordinator_address", "num_processes", "process_id")


def main() -> None:
    """The command `jaxdelta`; also `python -m jaxdelta` and scripts/delta_svd.py."""
    cli.run_command(COMMAND)


def act() -> None:
    """Joins the other processes if --distributed is given, and analyses the model."""
    distributed, given = flags.FLAGS.distributed, [flags.FLAGS[name].value for name in COORDINATION]
    if not distributed and given != [None, None, None]:
        raise UsageError("coordinator_address, num_processes and process_id need --distributed")
    with mesh.processes(*given) if distributed else nullcontext():
        run(leads=not distributed or mesh.leads())


def run(leads: bool) -> None:
    """Analyses the model. Only the leading process writes files and prints."""
    out, figures = _flags.required_path("out"), _flags.path("figures")
    if leads:
        files.check_output(out, *([write.PAGE] if flags.FLAGS.report else []))
        if figures:
            write.check_figures(figures)
    quiet = flags.FLAGS.quiet or not leads
    say = (lambda line: None) if quiet else partial(print, flush=True)
    say(f"Loading {flags.FLAGS.model} ...")
    result = _analysed(say, quiet)
    # Files come before the tables: a reader such as `head` may close standard output.
    saved = _save(result, out, figures) if leads else ""
    resume.remove(flags.FLAGS.checkpoint_dir)
    say(f" L={result.num_layers}, hidden={result.hidden}")
    say(f" calibration tokens: {result.n_calib_tokens}")
    if not quiet:
        say(tables(result))
    say(f"\nSaved: {saved}")


def _save(result: Analysis, out: Path, figures: Path | None) -> str:
    """Writes all files of the run; returns their paths, and an earlier page's if that is removed."""
    page, wanted = out.with_suffix(write.PAGE), flags.FLAGS.report
    earlier = page.exists()
    more = write.shown(result, page if wanted else None, figures)
    with write.directory_for(figures):
        result.save(out, more)
    paths = (out, out.with_suffix(".safetensors"), page if wanted else None, figures)
    removed = f"; removed {page}, of an earlier run" if earlier and not page.exists() else ""
    return ", ".join(str(path) for path in paths if path) + removed


def _analysed(say: Callable[[str], Any], quiet: bool) -> Analysis:
    """Runs the analysis, and compares it with the control's run if one is given."""
    file = _flags.path("compare_control")
    control = file and control_comparison.load_control(file)
    result = analyze.analyze(
        flags.FLAGS.model,
        flags.FLAGS.calibration,
        listener=say,
        progress=not quiet,
        before=partial(control_comparison.check_control, control) if control else None,
        keep_checkpoint=True,
        **{name: flags.FLAGS[name].value for name in vars(Options())},
    )
    return control_comparison.compare_control(result, control, file.name) if file and control else result


def define_options(**meanings: str) -> None:
    """Defines flags for fields of Options: their types, defaults and choices, with these meanings."""
    of_type: dict[Any, Callable[..., Any]] = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        float | None: flags.DEFINE_float,
    }
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(Options)}
    for name, meaning in meanings.items():
        default = fields[name].default
        if name in CHOICES:
            flags.DEFINE_enum(name, default, list(filter(None, CHOICES[name])), meaning)
        else:
            of_type.get(fields[name].type, flags.DEFINE_string)(name, default, meaning)


def define_text() -> None:
    """Defines the flags that choose the calibration text."""
    flags.DEFINE_string(
        "calibration",
        None,
        "text to run the model on: a .txt, .json, .jsonl, .ndjson, .csv, .tsv or .parquet file, also .gz or "
        ".zst, a directory of them, a data set, saved on disk or by its hub id, or - for standard input "
        "(default: 25 short prompts)",
    )
    define_options(
        text_key="field of an object, or column of a table, that holds the text or a chat's messages; "
        "meta.text for nested ones",
        ids_key="field or column that holds token ids, which are used instead of a text",
        split="which split of a data set",
        dataset_config="which configuration of a data set",
        max_tokens="maximum number of tokens; only as many documents are read as needed",
        layout="stream joins the documents with blank lines into one text, as the reference does; packed "
        "keeps them separate, several in a window",
        seq_len="tokens in a window",
        shuffle="take the documents in random order, see --seed",
        chat="auto writes chats (lists of messages) with the model's chat template; off refuses them",
        measure="tokens that statistics count, while all pass the model: all, a role's (assistant, user, "
        "...), or positions in each document (10:, 5:100, :-1)",
        tokenizer="directory of another tokenizer than the model's",
    )


def define_measurement() -> None:
    """Defines the flags that choose what is measured, and how."""
    define_options(
        views="views of each update: all, none, or names as in docs/definitions.md",
        top_k="singular values (JSON) and directions (.safetensors) kept per layer",
        last_state="the state that ends the last layer's update: before the final norm, or after it as in "
        "the reference",
        phases="layers of each phase, such as A:0-6,B:7-9,C:10-27 (default: by depth)",
        sink_factor="mask tokens whose state is longer than this many times the layer's median",
        bootstrap="bootstrap resamples of documents; 0 turns the intervals off",
        null_draws="random draws for each null; 0 turns the nulls off",
        control="measure a control: randomised weights or randomised text",
    )
    flags.DEFINE_string("compare_control", None, "JSON of a control's run, to compare this run with")
    define_options(seed="random seed of intervals, nulls, controls and the order of documents")


def define_arithmetic() -> None:
    """Defines the flags of precision and method."""
    define_options(
        compute_dtype="dtype of matrix-multiplication inputs; sums stay float32",
        residual_dtype="dtype of the residual stream",
        svd="spectra from Gram matrices, or by a full SVD: slower, same numbers",
    )


def define_output() -> None:
    """Defines the flags that choose what is written and printed."""
    _flags.define_out_json()
    flags.DEFINE_bool("report", True, "write the HTML page")
    _flags.define_figures()
    define_options(
        keep_moments="directory for every layer's moments, which jaxdelta-merge pools over several texts"
    )
    flags.DEFINE_bool("quiet", False, "no progress and no tables, only the files")


def define_memory() -> None:
    """Defines the flags of memory, and of resuming."""
    define_options(
        memory="weights in memory: two layers at a time (auto, stream), or the whole model (resident)",
        device_memory_gb="cap on the device's memory in 10^9 bytes (default: all of it)",
        scratch="directory for the states of a long text that the device cannot hold",
        checkpoint_dir="directory for every finished layer: after any interruption the same command resumes "
        "from there",
    )


def define_devices() -> None:
    """Defines the flags of several devices and several hosts."""
    define_options(mesh="devices along each axis, such as data:2,model:4 (default: all on data)")
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
