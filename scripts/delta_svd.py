"""Measures what each layer of a Qwen3 model writes into its residual stream.

    python scripts/delta_svd.py --model=demo --out=demo.json

The demo model takes ten seconds on two cores, most of them compiling; its calibration loss is 5.10 nats per
token. Writes demo.json, demo.safetensors and the page that shows them, demo.html; see README.md for every
figure.
"""

from jaxdelta.utils import cli

cli.install()

from contextlib import nullcontext
from functools import partial
from pathlib import Path

from absl import flags

from jaxdelta.checkpoint import checkpoint, controls
from jaxdelta.errors import UsageError
from jaxdelta.report import write
from jaxdelta.report.tables import tables
from jaxdelta.run import analyze, control_comparison, memory_plan, resume
from jaxdelta.run.options import DTYPES, LAST_STATES, Options
from jaxdelta.spectra import spectrum
from jaxdelta.sweep import mesh as parallel
from jaxdelta.text import windows as calibration
from jaxdelta.utils import files

DEFAULTS = Options()

_MODEL = flags.DEFINE_string("model", None, "hub id, local directory, or `demo`")
_OUT = flags.DEFINE_string("out", None, "the JSON to write; .safetensors and .html are written beside it")
_CALIBRATION = flags.DEFINE_string(
    "calibration",
    None,
    "text to run the model on: .txt, .json, .jsonl, .parquet, a directory of them, or a data set, saved on "
    "disk or by its hub id (default: 25 prompts)",
)
_COMPARE = flags.DEFINE_string(
    "compare_control", None, "the JSON of a control's run, whose figures are set beside this run's"
)
_REPORT = flags.DEFINE_bool("report", True, "one HTML page that shows the run, beside the JSON")
_FIGURES = flags.DEFINE_string("figures", None, "a directory for every figure as PNG and PDF, with captions")
_QUIET = flags.DEFINE_bool("quiet", False, "no progress, no tables: the files alone")

flags.DEFINE_string("revision", DEFAULTS.revision, "branch, tag or commit of a hub id")
flags.DEFINE_enum(
    "loader", DEFAULTS.loader, checkpoint.LOADERS, "how weights are read; torch opens more formats"
)
flags.DEFINE_integer("top_k", DEFAULTS.top_k, "singular values and directions kept of each layer")
flags.DEFINE_integer("max_tokens", DEFAULTS.max_tokens, "so many tokens of the text are taken")
flags.DEFINE_enum(
    "layout",
    DEFAULTS.layout,
    calibration.LAYOUTS,
    "documents joined by blank lines as in the reference, or each by itself and packed into windows",
)
flags.DEFINE_integer("seq_len", DEFAULTS.seq_len, "tokens in a window")
flags.DEFINE_string("text_key", DEFAULTS.text_key, "field of a .jsonl, column of a table that holds the text")
flags.DEFINE_string("split", DEFAULTS.split, "of a data set that has several")
flags.DEFINE_string("dataset_config", DEFAULTS.dataset_config, "of a data set on the hub that has several")
flags.DEFINE_bool("shuffle", DEFAULTS.shuffle, "documents in random order, by the seed")
flags.DEFINE_enum(
    "last_state",
    DEFAULTS.last_state,
    LAST_STATES,
    "the last layer's update: before the final norm, or after it as in the reference",
)
flags.DEFINE_enum("svd", DEFAULTS.svd, spectrum.METHODS, "spectra from Gram matrices, or by a full SVD")
flags.DEFINE_enum("compute_dtype", DEFAULTS.compute_dtype, DTYPES, "dtype of the factors of products")
flags.DEFINE_enum("residual_dtype", DEFAULTS.residual_dtype, DTYPES, "dtype of the residual stream")
flags.DEFINE_string("phases", DEFAULTS.phases, "map of phases, as in A:0-6,B:7-9,... (default: by depth)")
flags.DEFINE_enum(
    "memory", DEFAULTS.memory, memory_plan.MODES, "weights read layer by layer, or all before the first layer"
)
flags.DEFINE_float(
    "device_memory_gb", DEFAULTS.device_memory_gb, "cap on the device's memory, in 10^9 bytes (default: all)"
)
flags.DEFINE_string(
    "scratch", DEFAULTS.scratch, "a directory for the states of a long text that the device cannot hold"
)
flags.DEFINE_string(
    "keep_moments", DEFAULTS.keep_moments, "a directory to keep the moments in, for merge_runs.py"
)
flags.DEFINE_string(
    "checkpoint_dir",
    DEFAULTS.checkpoint_dir,
    "a directory to keep every finished layer in: the same command goes on from there after a kill",
)
flags.DEFINE_string("views", DEFAULTS.views, "all, none, or views of each update, see README")
flags.DEFINE_float(
    "sink_factor", DEFAULTS.sink_factor, "a token is a sink beyond so many times the median state's norm"
)
flags.DEFINE_integer("bootstrap", DEFAULTS.bootstrap, "draws of documents for intervals; 0: no intervals")
flags.DEFINE_integer("null_draws", DEFAULTS.null_draws, "random draws for nulls; 0: no nulls")
flags.DEFINE_integer("seed", DEFAULTS.seed, "seed of everything random")
flags.DEFINE_enum(
    "control", DEFAULTS.control, controls.CONTROLS, "instead of the real run: other weights, or another text"
)

flags.DEFINE_string("mesh", DEFAULTS.mesh, "devices as in data:2,model:4 (default: all of them on data)")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "one of several processes, as SLURM, GKE or the next three flags say"
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of the process 0")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are")
_PROCESS = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")

OPTION_FLAGS = tuple(vars(DEFAULTS))


def main() -> None:
    """Joins the other processes, if there are any, and runs."""
    given = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    if not (_DISTRIBUTED.value or given == (None, None, None)):
        raise UsageError("coordinator_address, num_processes and process_id need --distributed")
    with parallel.processes(*given) if _DISTRIBUTED.value else nullcontext():
        run(leads=not _DISTRIBUTED.value or parallel.leads())


def run(leads: bool) -> None:
    """The whole run; of several processes one writes files and prints."""
    out = Path(cli.value_of(_OUT)).expanduser()
    figures = None if _FIGURES.value is None else Path(_FIGURES.value).expanduser()
    if leads:
        files.check_output(out, *([write.PAGE] if _REPORT.value else []))
    page = out.with_suffix(write.PAGE) if _REPORT.value else None
    if leads and figures:
        write.check_figures(figures)
    file = None if _COMPARE.value is None else Path(_COMPARE.value).expanduser()
    beside = file and control_comparison.load_control(file)
    check = partial(control_comparison.check_control, beside) if beside else None
    options = {name: flags.FLAGS[name].value for name in OPTION_FLAGS}
    quiet = _QUIET.value or not leads
    say = (lambda line: None) if quiet else partial(print, flush=True)
    say(f"Loading {_MODEL.value} ...")
    result = analyze.analyze(
        cli.value_of(_MODEL),
        _CALIBRATION.value,
        listener=say,
        progress=not quiet,
        before=check,
        keep_checkpoint=True,
        **options,
    )
    if file and beside:
        result = control_comparison.compare_control(result, beside, file.name)
    # All files before the tables: whoever reads them may stop reading.
    if leads:
        more = write.shown(result, page, figures)
        with write.directory_for(figures):
            result.save(out, more)
    resume.remove(options["checkpoint_dir"])
    if not leads:
        return
    say(f" L={result.num_layers}, hidden={result.hidden}")
    say(f" calibration tokens: {result.n_calib_tokens}")
    say(tables(result))
    saved = (out, out.with_suffix(".safetensors"), page, figures)
    say("\nSaved: " + ", ".join(str(path) for path in saved if path))


if __name__ == "__main__":
    cli.run(main, required=["model", "out"])
