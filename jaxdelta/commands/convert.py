"""Writes a checkpoint once in Orbax's format, which --model= and
load_model read back.

    jaxdelta-convert --model=demo --out=demo_orbax
    jaxdelta --model=demo_orbax --out=demo.json

Takes five seconds for the demo model, mostly imports.
"""

from absl import flags

from jaxdelta.checkpoint import convert
from jaxdelta.commands import _flags
from jaxdelta.utils import cli
from jaxdelta.utils.command import Command


def main() -> None:
    """The command `jaxdelta-convert`; also scripts/convert_checkpoint.py."""
    cli.run_command(COMMAND)


def act() -> None:
    """Reads the checkpoint and writes the directory."""
    given = flags.FLAGS
    print(f"Converting {given.model} ...", flush=True)
    for note in convert.convert(
        given.model,
        given.out,
        dtype=given.dtype,
        revision=given.revision,
        loader=given.loader,
        ignore_config_keys=given.ignore_config_keys,
        adapter=given.adapter,
    ):
        print(f" note: {note}")
    print(f"Saved: {given.out}")


def define_output() -> None:
    """Defines --out and --dtype."""
    flags.DEFINE_string("out", None, "directory to create")
    flags.DEFINE_enum(
        "dtype", convert.STORED, convert.DTYPES, "dtype to write; stored keeps that of the checkpoint"
    )


COMMAND = Command(
    action=act,
    about=__doc__ or "",
    options={"Model": _flags.define_checkpoint, "Output": define_output},
    required={
        "model": "the checkpoint to convert, e.g. --model=demo",
        "out": "the directory to create, e.g. --out=demo_orbax",
    },
)
