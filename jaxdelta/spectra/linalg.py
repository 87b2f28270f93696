"""Matrix decompositions and products, in XLA or, for NumPy's arrays, in NumPy.

The decompositions take one matrix, or many by `jax.vmap`. On a CPU XLA then solves them one after the other:
a batch would call a threaded OpenBLAS from several threads (jax issue 39292) and, in JAX 0.10, can deadlock
when XLA has few threads.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jaxtyping import Array, Float, Float64

from jaxdelta.utils.arrays import AnyArray

_GRAM_BLOCK = 256  # rows; products of smaller blocks are too slow to save anything


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """A context, or a decorator, in which BLAS and LAPACK use one thread.

    Small matrices gain nothing from more (next to another busy process they took fifty times longer), and
    several threads calling a threaded OpenBLAS are slow and, on many cores, unsafe (jax issue 39292).
    """
    import scipy.linalg.cython_lapack  # noqa: F401 - XLA's LAPACK; loaded now so that it is limited too

    with threadpoolctl.threadpool_limits(1, "blas"):
        yield


def _sequential_on_cpu(decomposition: Callable[[Array], Any]) -> Callable[[Array], Any]:
    sequential = jax.custom_batching.sequential_vmap(decomposition)

    @functools.wraps(decomposition)
    def decompose(matrix: Array) -> Any:
        return jax.lax.platform_dependent(matrix, cpu=sequential, default=decomposition)

    return decompose


def eigh(matrix: Float[AnyArray, "*sets m m"]) -> tuple[Any, Any]:
    """Eigenvalues (m,), ascending, and eigenvectors (m, m), in columns, of a symmetric matrix.

    Only the lower triangle is read. NumPy also takes batches; NaN where LAPACK fails.
    """
    if not isinstance(matrix, np.ndarray):
        return _eigh(matrix)
    try:
        return np.linalg.eigh(matrix)
    except np.linalg.LinAlgError:
        return np.full(matrix.shape[:-1], np.nan), np.full(matrix.shape, np.nan)


def eigenvalues(matrix: Float64[np.ndarray, "*sets m m"]) -> Float64[np.ndarray, "*sets m"]:
    """The eigenvalues of `eigh`, by NumPy, in half the time."""
    try:
        return np.linalg.eigvalsh(matrix)
    except np.linalg.LinAlgError:
        return np.full(matrix.shape[:-1], np.nan)


@_sequential_on_cpu
def _eigh(matrix: Float[Array, "m m"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    vectors, values = jax.lax.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


@_sequential_on_cpu
def orthonormal(matrix: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """Q of the QR decomposition: its first j columns span the first j columns of the matrix, for every j."""
    return jnp.linalg.qr(matrix)[0]


@_sequential_on_cpu
def svd(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "r n"]]:
    """U, σ and Vᵀ, r = min(m, n)."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def row_sums(matrices: Sequence[Float64[Array, "n d"]]) -> list[Float64[Array, " n"]]:
    """The row sums of every matrix, in one pass: separate sums take XLA on a CPU far longer."""
    zeros = (np.float64(0),) * len(matrices)
    return list(jax.lax.reduce(tuple(matrices), zeros, _add_each, dimensions=(1,)))


def _add_each(x: tuple[Array, ...], y: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(jnp.add, x, y))


def gram(x: Float[Array, "m d"]) -> Float[Array, "m m"]:
    """x xᵀ, at little more than half the cost of a product: the upper triangle is copied from the lower."""
    m = len(x)
    if m <= _GRAM_BLOCK:
        return product(x, x.T)
    top, bottom = x[: m // 2], x[m // 2 :]
    corner = product(bottom, top.T)
    return jnp.block([[gram(top), corner.T], [corner, gram(bottom)]])


def product(x: AnyArray, y: AnyArray) -> Any:
    """x y at full precision, which accelerators give only on request."""
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return x @ y
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
