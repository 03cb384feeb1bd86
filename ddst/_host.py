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


def topology_of_slots_python(
    slot_blocks: npt.NDArray[np.int32], rows: int, cols: int, taps: int
) -> npt.NDArray[np.int32]:
    """`topology_of_slots` without the compiled module."""
    if not isinstance(slot_blocks, np.ndarray):
        raise TypeError(f"slot_blocks must be an int32 array, got {type(slot_blocks).__name__}")
    if slot_blocks.dtype != np.int32:
        raise TypeError(f"slot_blocks must be an int32 array, got dtype {slot_blocks.dtype}")
    if slot_blocks.ndim != 1:
        raise ValueError(f"slot_blocks must have the shape [slots], got {slot_blocks.shape}")
    if min(rows, cols, taps) < 1:
        raise ValueError(f"rows, cols and taps must be at least 1, got {(rows, cols, taps)}")
    total = rows * cols * taps
    if total > np.iinfo(np.int32).max:
        raise ValueError(f"rows, cols and taps make more blocks than int32 can index, got {(rows, cols, taps)}")
    wrong = np.flatnonzero((slot_blocks < -1) | (slot_blocks >= total))
    if wrong.size:
        slot = wrong[0]
        raise ValueError(f"slot_blocks must hold ranks below {total}, or -1, got {slot_blocks[slot]} in slot {slot}")
    free = slot_blocks < 0
    key = np.where(free, total, slot_blocks)  # free slots come last in both orders
    row = key // (cols * taps)
    col = np.where(free, cols, key // taps % cols)
    tap = np.where(free, 0, key % taps)
    row_order = np.argsort(key, kind="stable")
    ranks = key[row_order]
    twice = np.flatnonzero((ranks[1:] == ranks[:-1]) & (ranks[1:] < total))
    if twice.size:
        one, two = row_order[twice[0] : twice[0] + 2]
        raise ValueError(f"slot_blocks must hold each block once, got {slot_blocks[two]} in the slots {one} and {two}")
    # Stable: within a column the row-major order stays, which is by output row, then tap.
    col_order = row_order[np.argsort(col[row_order], kind="stable")]
    row_ptr = np.searchsorted(row[row_order], np.arange(rows + 1))
    col_ptr = np.searchsorted(col[col_order], np.arange(cols + 1))
    return np.concatenate([row_ptr, col_ptr, row, col, tap, row_order, col_order]).astype(np.int32)


def topology_of_slots(slot_blocks: npt.NDArray[np.int32], rows: int, cols: int, taps: int) -> npt.NDArray[np.int32]:
    """The topology vector of the blocks in slots, in the layout of `ddst.topology`, from and to numpy.

    Args:
        slot_blocks: int32 ``[slots]``, the rank of the block in each slot, -1 for a free one.
        rows, cols, taps: of the grid of blocks.

    Returns:
        int32 vector of ``rows + cols + 2 + 5 · slots`` entries.

    Raises:
        TypeError: ``slot_blocks`` is no int32 array.
        ValueError: ``slot_blocks`` has not one dimension, holds a rank outside the grid, or one twice; or the grid is
            empty, or larger than int32 can index.

    Cost: a few passes over slots, rows, columns and taps.

    >>> topology_of_slots(np.array([3, -1, 0], np.int32), 2, 2, 1).tolist()
    [0, 1, 2, 0, 1, 2, 1, 2, 0, 1, 2, 0, 0, 0, 0, 2, 0, 1, 2, 0, 1]
    """
    if _HOST is None:
        return topology_of_slots_python(slot_blocks, rows, cols, taps)
    topology: npt.NDArray[np.int32] = _HOST.topology_of_slots(slot_blocks, rows, cols, taps)
    return topology


def build_info() -> dict[str, str]:
    """Which implementation runs, and what the compiled one was built with."""
    return {"implementation": IMPLEMENTATION, **({} if _HOST is None else _HOST.build_info())}
