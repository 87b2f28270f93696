"""Types that several modules share, and which of two libraries works on them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray  # on the device or on the host


def namespace(x: AnyArray) -> Any:
    """NumPy for an array of the host's, jax.numpy for one of a device's, or one that is traced.

    What is small and of many steps is written for either: on a CPU NumPy needs no compiling, and several
    threads that call it do not wait for XLA's.
    """
    return np if isinstance(x, np.ndarray) else jnp
