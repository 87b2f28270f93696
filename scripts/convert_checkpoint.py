"""Writes a Qwen3 checkpoint once in Orbax's format; every --model=, and load_model, reads it back.

    python scripts/convert_checkpoint.py --model=demo --out=demo_orbax
    python scripts/delta_svd.py --model=demo_orbax --out=demo.json

The demo model takes five seconds, most of them imports.
"""

from jaxdelta.utils import cli

cli.install()

from absl import flags

from jaxdelta.checkpoint import checkpoint, convert

_MODEL = flags.DEFINE_string("model", None, "hub id, local directory, or `demo`")
_OUT = flags.DEFINE_string("out", None, "the directory to make")
_DTYPE = flags.DEFINE_enum("dtype", convert.STORED, convert.DTYPES, "dtype of the parameters written")
_REVISION = flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
_LOADER = flags.DEFINE_enum(
    "loader", "auto", checkpoint.LOADERS, "how weights are read; torch opens more formats"
)


def main() -> None:
    """Reads the checkpoint, writes the directory, and says what it took."""
    print(f"Converting {_MODEL.value} ...", flush=True)
    model, out = cli.value_of(_MODEL), cli.value_of(_OUT)
    convert.convert(model, out, dtype=_DTYPE.value, revision=_REVISION.value, loader=_LOADER.value)
    print(f"Saved: {_OUT.value}")


if __name__ == "__main__":
    cli.run(main, required=["model", "out"])
