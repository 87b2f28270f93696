"""The type of an array on the device or on the host."""

import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray
