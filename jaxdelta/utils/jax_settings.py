"""The JAX settings of a run, whatever the caller's program has set for itself."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from textwrap import shorten
from typing import Any

import jax

from jaxdelta.errors import JaxDeltaError

_SETTINGS: dict[str, Any] = {
    "jax_numpy_rank_promotion": "allow",  # weights of the last axis meet any number of axes before it
    "jax_disable_jit": False,
    "jax_debug_nans": False,  # masked scores are infinite
    "jax_debug_infs": False,
    "jax_transfer_guard_host_to_device": "allow",
    "jax_transfer_guard_device_to_device": "allow",
    "jax_transfer_guard_device_to_host": "allow",
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
    "jax_default_device": None,
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": 0,
}


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Gives the block, and all threads that start in it, the settings that numbers are defined for.

    Only settings with other values change: those of the process, for the threads, until the block ends; and
    settings that a context of this thread has made.

    Raises:
        JaxDeltaError: JAX has no device, see `check_devices`.
    """
    with ThreadPoolExecutor(1) as pool:  # another thread sees none of this one's contexts
        everywhere = pool.submit(_differing).result()
    with contextlib.ExitStack() as stack:
        for name, value in everywhere.items():
            stack.callback(jax.config.update, name, value)
            jax.config.update(name, _SETTINGS[name])
        for name in _differing():  # a context of the caller's hides the process' value
            context = getattr(jax, name.removeprefix("jax_"))
            stack.enter_context(context(_SETTINGS[name]))
        check_devices()
        yield


def _differing() -> dict[str, Any]:
    """The settings of this thread that are not those of a run."""
    values = jax.config.values
    found = {name: values[name] for name in _SETTINGS if name in values}
    unset = {name for name in found if "guard" in name and found[name] is None}
    return {name: value for name, value in found.items() if value != _SETTINGS[name] and name not in unset}


def check_devices() -> None:
    """Starts JAX's backend.

    Raises:
        JaxDeltaError: the platforms that JAX is to use are not here, or are misspelt.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where an accelerator's plugin is missing
        wanted = jax.config.values["jax_platforms"] or "any platform"
        reason = str(error).partition(". (set JAX_PLATFORMS")[0] or "no such device, or no plugin for it"
        raise JaxDeltaError(
            f"JAX cannot start on {wanted}: {shorten(reason, 200)}; unset JAX_PLATFORMS, or set it to cpu"
        ) from error
