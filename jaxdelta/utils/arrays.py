"""Arrays on the device or on the host, and checks of arrays that a caller gives."""

from typing import Any

import numpy as np
from jaxtyping import Array, Int32

from jaxdelta.errors import UsageError, first_line

AnyArray = Array | np.ndarray
_AXES = ("window", "position")


def as_numpy(given: Any, name: str) -> np.ndarray:
    """A caller's array on the host: NumPy's, JAX's or PyTorch's.

    Raises:
        UsageError: it cannot be converted, such as rows of several lengths.
    """
    try:
        if hasattr(given, "detach"):  # a tensor with a gradient, or on a GPU
            given = given.detach().cpu()
        return np.asarray(given)
    except Exception as error:  # whatever another library raises
        raise UsageError(f"{name} is no array that NumPy can read ({first_line(error)[:80]})") from error


def whole_numbers(given: Any, name: str) -> Int32[np.ndarray, "B T"]:
    """A caller's array of whole numbers in windows.

    Raises:
        UsageError: it is none, is empty, has other axes, or a number beyond int32.
    """
    array = as_numpy(given, name)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise UsageError(
            f"{name} must be whole numbers of shape (windows, positions), not {array.dtype} of shape "
            f"{array.shape}"
        )
    if not array.size:
        raise UsageError(f"{name} is empty, of shape {array.shape}")
    limits = np.iinfo(np.int32)
    check_between(array, name, limits.min, limits.max)
    return np.ascontiguousarray(array, np.int32)


def check_between(array: np.ndarray, name: str, least: int, most: int) -> None:
    """Checks numbers of an array (windows, positions).

    Raises:
        UsageError: one is below `least` or above `most`; it names the first and its place.
    """
    wrong = np.argwhere((array < least) | (array > most))
    if len(wrong):
        place = ", ".join(f"{axis} {index}" for axis, index in zip(_AXES, wrong[0].tolist(), strict=True))
        raise UsageError(f"{name}: {array[tuple(wrong[0])]} at {place} is not one of {least} to {most}")


def check_positions(positions: Int32[np.ndarray, "B T"], shape: tuple[int, ...]) -> None:
    """Checks the positions of tokens in their segments.

    Raises:
        UsageError: the shape is not that of the tokens, or a window's positions do not count up from 0.
    """
    if positions.shape != shape:
        raise UsageError(f"positions have shape {positions.shape}, the tokens {shape}")
    valid = (positions[:, 1:] == 0) | (np.diff(positions) == 1)
    if positions[:, 0].any() or not valid.all():
        raise UsageError("positions must begin with 0 in every window and go on by 1, or from 0 again")
