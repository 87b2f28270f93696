"""The leading eigenvectors of a symmetric matrix on the host, by direct calls of LAPACK."""

import ctypes
import functools
from typing import Any

import numpy as np
from jaxtyping import Float64

_BLOCK = 64  # largest block of columns of dsytrd and dormtr


def largest(
    matrix: Float64[np.ndarray, "m m"], k: int
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, "m k"]]:
    """All eigenvalues, ascending, and the eigenvectors of the k largest, in columns, of a symmetric matrix.

    `eigh` spends two thirds of its time on the eigenvectors. Here T = QᵀAQ is tridiagonal (dsytrd), its
    eigenvalues come from the QR iteration of Pal, Walker and Kahan (dsterf), and k of its vectors from
    inverse iteration, orthogonalised for close eigenvalues (dstein; Peters & Wilkinson 1979), times Q
    (dormtr). NaN where LAPACK fails.
    """
    m = len(matrix)
    if not matrix.any():  # dstein divides by its norm
        return np.zeros(m), np.eye(m)[:, m - k :]
    reflectors, work, space = matrix.copy(), np.empty(m * max(_BLOCK, k)), np.empty(m, np.intc)
    diagonal, off_diagonal, scales, values, overwritten = np.zeros((5, m))
    vectors, failed = np.zeros((k, m)), np.empty(k, np.intc)
    call = _Calls()
    call("dsytrd", b"L", m, reflectors, m, diagonal, off_diagonal, scales, work, len(work))
    values[:], overwritten[:] = diagonal, off_diagonal
    call("dsterf", m, values, overwritten)
    # T as one block, even where it splits into several, so that the eigenvalues have one order.
    wanted, block, end = values[m - k :].copy(), np.ones(k, np.intc), np.full(1, m, np.intc)
    call("dstein", m, diagonal, off_diagonal, k, wanted, block, end, vectors, m, work, space, failed)
    call("dormtr", b"L", b"L", b"N", m, k, reflectors, m, scales, vectors, m, work, len(work))
    if call.failed or np.isnan(values).any():
        values[:], vectors[:] = np.nan, np.nan
    return values, vectors.T


class _Calls:
    """Calls of SciPy's LAPACK, which is XLA's, without its wrappers, which hold Python's lock."""

    failed = False

    def __call__(self, name: str, *arguments: Any) -> None:
        """Passes numbers by address and arrays as they are: Fortran sees them transposed."""
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
    from scipy.linalg import cython_lapack  # imported here: only CPUs need it

    capsule, python = cython_lapack.__pyx_capi__[name], ctypes.pythonapi
    python.PyCapsule_GetName.argtypes, python.PyCapsule_GetName.restype = [ctypes.py_object], ctypes.c_char_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    signature = python.PyCapsule_GetName(capsule)
    if b"int *" not in signature:  # SciPy was built with 64-bit integers
        return None
    return ctypes.CFUNCTYPE(None)(python.PyCapsule_GetPointer(capsule, signature))
