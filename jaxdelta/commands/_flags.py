"""Flags shared by several commands."""

from pathlib import Path

from absl import flags

from jaxdelta.utils.files import given_path

MODEL = "the checkpoint to measure, e.g. --model=demo"
RUN = "the JSON of a saved run, e.g. --run=demo.json"
OUT_JSON = "the JSON file to write, e.g. --out=demo.json"


def define_checkpoint() -> None:
    """Defines --model, --revision, --loader, --ignore_config_keys and --adapter."""
    # Imported here because it imports JAX, which some commands do not need.
    from jaxdelta.checkpoint.checkpoint import LOADERS

    flags.DEFINE_string("model", None, "hub id, local directory, or `demo`, the small model of the package")
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_enum(
        "loader",
        "auto",
        LOADERS,
        "how the weights are read; torch dequantises bitsandbytes, too",
    )
    flags.DEFINE_string(
        "ignore_config_keys", None, "unknown keys of config.json that change nothing, such as a,b"
    )
    flags.DEFINE_string(
        "adapter", None, "LoRA adapter of PEFT that is added to the weights: hub id or local directory"
    )


def define_run() -> None:
    """Defines --run."""
    flags.DEFINE_string("run", None, "JSON file that jaxdelta wrote, its .safetensors next to it")


def define_out_json() -> None:
    """Defines --out for commands that write a run."""
    flags.DEFINE_string("out", None, "JSON file to write; .safetensors and .html go next to it")


def define_figures() -> None:
    """Defines --figures."""
    flags.DEFINE_string("figures", None, "directory for all figures as PNG and PDF, with captions")


def path(name: str) -> Path | None:
    """The path given by a flag, or None."""
    value = flags.FLAGS[name].value
    return None if value is None else given_path(value, name)


def required_path(name: str) -> Path:
    """The path given by a required flag."""
    return given_path(str(flags.FLAGS[name].value), name)
