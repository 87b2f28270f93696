"""The matrix decompositions: in XLA, of one matrix or, by `jax.vmap`, of many; and on the host.

In XLA on a CPU those come one after the other: batches there have several threads call a threaded OpenBLAS
(jax issue 39292) and, in JAX 0.10, wait inside XLA's threads for XLA's threads: for ever where those are few.
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

# Blocks this small are no work for several threads: beside another busy process they took fifty times longer.
one_blas_thread = threadpoolctl.threadpool_limits.wrap(limits=1, user_api="blas")


def _alone_on_a_cpu(decomposition: Callable[[Array], Any]) -> Callable[[Array], Any]:
    alone = jax.custom_batching.sequential_vmap(decomposition)

    @functools.wraps(decomposition)
    def decompose(matrix: Array) -> Any:
        return jax.lax.platform_dependent(matrix, cpu=alone, default=decomposition)

    return decompose


def eigh(matrix: Float[AnyArray, "*sets m m"]) -> tuple[Any, Any]:
    """Eigenvalues, ascending, and eigenvectors, in columns, of matrices whose lower triangles are given.

    Of NumPy's arrays by NumPy; NaN where LAPACK fails.
    """
    if isinstance(matrix, np.ndarray):
        return _unless_it_fails(np.linalg.eigh, matrix, matrix.shape[:-1], matrix.shape)
    return _batched(_eigh, matrix)


def eigenvalues(matrix: Float[AnyArray, "*sets m m"]) -> Float[AnyArray, "*sets m"]:
    """Those of `eigh`: NumPy finds them in half the time, without the vectors."""
    if isinstance(matrix, np.ndarray):
        return _unless_it_fails(np.linalg.eigvalsh, matrix, matrix.shape[:-1])
    return _batched(_eigh, matrix)[0]


def _batched(decomposition: Callable[[Array], Any], matrices: Array) -> Any:
    for _ in matrices.shape[:-2]:
        decomposition = jax.vmap(decomposition)
    return decomposition(matrices)


@_alone_on_a_cpu
def _eigh(matrix: Float[Array, "m m"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    vectors, values = jax.lax.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


@_alone_on_a_cpu
def orthonormal(matrix: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """Orthonormal columns with the span of the first of them, for each number of them: Q of Q R."""
    return jnp.linalg.qr(matrix)[0]


@_alone_on_a_cpu
def svd(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "r n"]]:
    """U, σ and Vᵀ, r = min(m, n)."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _unless_it_fails(decomposition: Callable[..., Any], matrix: np.ndarray, *shapes: tuple[int, ...]) -> Any:
    try:
        return decomposition(matrix)
    except np.linalg.LinAlgError:
        nothing = [np.full(shape, np.nan, matrix.dtype) for shape in shapes]
        return tuple(nothing) if len(nothing) > 1 else nothing[0]


def row_sums(matrices: Sequence[Float64[Array, "n d"]]) -> list[Float64[Array, " n"]]:
    """The sum of each row, of all of them in one pass: one after the other takes XLA on a CPU far longer."""
    zeros = (np.float64(0),) * len(matrices)
    return list(jax.lax.reduce(tuple(matrices), zeros, _add_each, dimensions=(1,)))


def _add_each(x: tuple[Array, ...], y: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(jnp.add, x, y))


def gram(x: Float[Array, "m d"]) -> Float[Array, "m m"]:
    """x xᵀ, at little more than half the work of a product: what lies above the diagonal is mirrored."""
    m = len(x)
    if m <= _GRAM_BLOCK:
        return product(x, x.T)
    top, bottom = x[: m // 2], x[m // 2 :]
    corner = product(bottom, top.T)
    return jnp.block([[gram(top), corner.T], [corner, gram(bottom)]])


def product(x: AnyArray, y: AnyArray) -> Any:
    """x y at full precision, which accelerators give only when asked."""
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return x @ y
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


@contextlib.contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Several threads calling a threaded OpenBLAS is slow and, on many cores, unsafe (jax issue 39292)."""
    import scipy.linalg.cython_lapack  # noqa: F401 - XLA's LAPACK; loaded now so that it is limited too

    with threadpoolctl.threadpool_limits(1, "blas"):
        yield
