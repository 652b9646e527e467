"""How kernels are compiled: for one set of types, without Python's lock, and kept on disk."""

# mypy: allow-untyped-defs

from __future__ import annotations

from numba import njit, types


def compiled(*arguments):
    """Compiles a kernel for one set of types, or reads it from Numba's folder for machine code if it has one."""

    def decorate(function):
        try:
            return njit(types.void(*arguments), nogil=True, cache=True)(function)
        except RuntimeError:  # there is no folder to write to
            return njit(types.void(*arguments), nogil=True)(function)

    return decorate
