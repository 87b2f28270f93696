"""A checkpoint of any format -> a model's directory with its parameters in Orbax's format."""

import dataclasses
import shutil
from typing import Any

import jax.numpy as jnp

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.checkpoint import open_checkpoint
from jaxdelta.checkpoint.orbax_files import write_orbax
from jaxdelta.errors import UsageError
from jaxdelta.model.config import DTYPE_BYTES
from jaxdelta.model.families.registry import write_config
from jaxdelta.utils.files import GivenPath, given_path, new_directory
from jaxdelta.utils.jax_settings import check_devices

STORED = "stored"
DTYPES = (STORED, *DTYPE_BYTES)


def convert(model: str, out: GivenPath, *, dtype: str = STORED, **opening: Any) -> tuple[str, ...]:
    """Writes a model's directory: config.json, the tokenizer, and the parameters in Orbax's format.

    One portion of the parameters is in memory at a time; `out` appears whole or not at all. Returns the
    checkpoint's notes.

    Args:
        model: hub id, directory, or `demo`.
        out: the new directory; an existing one must be empty.
        dtype: `stored` keeps the dtype of each parameter; any other rounds to the nearest number.
        **opening: how the model is opened, as for `open_checkpoint`.

    Raises:
        JaxDeltaError: the model cannot be read, `out` cannot be written, a number is too large for `dtype`.
        UsageError: an unknown dtype or loader, or a wrong key to be ignored.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    check_devices()
    with new_directory(given_path(out, "out")) as directory:
        checkpoint = open_checkpoint(model, **opening)
        config = checkpoint.config
        if dtype != STORED:
            config = dataclasses.replace(config, dtype=dtype)
        write_config(config, directory / hub.CONFIG)
        for name in hub.ALL_TOKENIZER_FILES:
            if (checkpoint.directory / name).exists():
                shutil.copyfile(checkpoint.directory / name, directory / name)
        numbers = None if dtype == STORED else jnp.dtype(dtype)
        write_orbax(checkpoint.source, checkpoint.names, directory / hub.ORBAX, numbers)
    return checkpoint.notes
