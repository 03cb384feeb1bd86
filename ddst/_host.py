"""Work on the host that touches numpy arrays and never a tensor: compiled where possible, else the same in Python.

The compiled module, ``ddst._lib._host``, exists once per CPython that the wheel was built for (pybind11 has no stable
ABI). On another CPython this file's own functions serve; both give the same results, and `IMPLEMENTATION` says which
one runs.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import numpy.typing as npt


def _compiled() -> ModuleType | None:
    try:
        return importlib.import_module("ddst._lib._host")
    except ModuleNotFoundError:  # another failure is a broken file, and is not hidden
        return None


_HOST = _compiled()
IMPLEMENTATION = "python" if _HOST is None else "pybind11"


def build_topology_python(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """`build_topology` without the compiled module."""
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"mask must be a bool array, got {type(mask).__name__}")
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be a bool array, got dtype {mask.dtype}")
    if mask.ndim not in (2, 4):
        raise ValueError(f"mask must have the shape [R, C] or [R, C, kH, kW], got {mask.shape}")
    if mask.size > np.iinfo(np.int32).max:
        raise ValueError(f"mask has more blocks than int32 can index, got {mask.shape}")
    rows, cols = mask.shape[:2]
    row, col, tap = np.nonzero(mask.reshape(rows, cols, int(np.prod(mask.shape[2:]))))
    row_ptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    col_ptr = np.concatenate([[0], np.cumsum(np.bincount(col, minlength=cols))])
    col_order = np.argsort(col, kind="stable")
    row_order = np.arange(row.size)
    return np.concatenate([row_ptr, col_ptr, row, col, tap, row_order, col_order]).astype(np.int32)


def build_topology(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """The topology vector of a block mask, in the layout of `ddst.topology` with row-major slots, from and to numpy.

    Args:
        mask: bool, ``[R, C]`` or ``[R, C, kH, kW]``.

    Returns:
        int32 vector of ``R + C + 2 + 5 · nnz`` entries.

    Raises:
        TypeError: ``mask`` is no bool array.
        ValueError: ``mask`` has not 2 or 4 dimensions, or more blocks than int32 can index.

    Cost: two passes over the mask.

    >>> build_topology(np.array([[True, False], [True, True]])).tolist()
    [0, 1, 3, 0, 2, 3, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 2]
    """
    if _HOST is None:
        return build_topology_python(mask)
    topology: npt.NDArray[np.int32] = _HOST.build_topology(mask)
    return topology


def build_info() -> dict[str, str]:
    """Which implementation runs, and what the compiled one was built with."""
    return {"implementation": IMPLEMENTATION, **({} if _HOST is None else _HOST.build_info())}
