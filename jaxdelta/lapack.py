"""The matrix decompositions: in XLA, of one matrix or, by `jax.vmap`, of many; and on the host.

In XLA on a CPU those come one after the other: batches there have several threads call a threaded OpenBLAS
(jax issue 39292) and, in JAX 0.10, wait inside XLA's threads for XLA's threads: for ever where those are few.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdelta.types import AnyArray

_BLOCK = 64  # columns that dsytrd and dormtr turn at once, at most


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


def largest(
    matrix: Float64[np.ndarray, "m m"], k: int
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, "m k"]]:
    """All eigenvalues, ascending, and the eigenvectors of the k largest, in columns, of a symmetric matrix.

    Finding all vectors takes two thirds of the time of `eigh`. T = QᵀAQ tridiagonal (dsytrd), its
    eigenvalues by the QR iteration of Pal, Walker and Kahan (dsterf), k of its vectors by inverse iteration,
    those of close eigenvalues orthogonalised (dstein; Peters & Wilkinson 1979), turned back by Q (dormtr).
    NaN where LAPACK fails.
    """
    m = len(matrix)
    if not matrix.any():  # dstein divides by its norm
        return np.zeros(m), np.eye(m)[:, m - k :]
    reflectors, work, space = matrix.copy(), np.empty(m * max(_BLOCK, k)), np.empty(m, np.intc)
    diagonal, beside, scales, values, off = np.zeros((5, m))
    vectors, failed = np.zeros((k, m)), np.empty(k, np.intc)
    call = _Calls()
    call("dsytrd", b"L", m, reflectors, m, diagonal, beside, scales, work, len(work))
    values[:], off[:] = diagonal, beside
    call("dsterf", m, values, off)
    # T as one block, also where it falls into several: all eigenvalues are then in one order.
    wanted, block, end = values[m - k :].copy(), np.ones(k, np.intc), np.full(1, m, np.intc)
    call("dstein", m, diagonal, beside, k, wanted, block, end, vectors, m, work, space, failed)
    call("dormtr", b"L", b"L", b"N", m, k, reflectors, m, scales, vectors, m, work, len(work))
    if call.failed or np.isnan(values).any():
        values[:], vectors[:] = np.nan, np.nan
    return values, vectors.T


class _Calls:
    """Calls SciPy's LAPACK, which is XLA's, past its wrappers: they let no other thread work meanwhile."""

    failed = False

    def __call__(self, name: str, *arguments: Any) -> None:
        """A number is passed by its address, an array as it lies: Fortran sees it transposed."""
        function, status = _lapack_function(name), ctypes.c_int(-1)
        if function is not None:
            function(*map(_address, arguments), ctypes.byref(status))
        self.failed = self.failed or status.value != 0


def _address(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, bytes):
        return ctypes.c_char_p(argument)
    return ctypes.byref((ctypes.c_int if isinstance(argument, int) else ctypes.c_double)(argument))


@functools.cache
def _lapack_function(name: str) -> Any:
    from scipy.linalg import cython_lapack  # here: other devices do without

    capsule, python = cython_lapack.__pyx_capi__[name], ctypes.pythonapi
    python.PyCapsule_GetName.argtypes, python.PyCapsule_GetName.restype = [ctypes.py_object], ctypes.c_char_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    signature = python.PyCapsule_GetName(capsule)
    if b"int *" not in signature:  # a SciPy built for integers of 64 bits
        return None
    return ctypes.CFUNCTYPE(None)(python.PyCapsule_GetPointer(capsule, signature))
