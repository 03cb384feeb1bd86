"""Keeps freed memory in the process while it measures."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> str:
    """Tells glibc to give no freed memory back to the system; returns what was set, for the record.

    By default it returns a large tensor's memory at every free, or does not, depending on what else lies on the heap;
    the page faults of the next allocation then take more time than a fast kernel, and hit whichever program is
    unlucky. Set for the whole process, it treats all programs that are compared alike.

    >>> keep_freed_memory() in ("freed memory is kept (M_MMAP_MAX=0, M_TRIM_THRESHOLD=2^31-1)", "system default")
    True
    """
    try:
        libc = ctypes.CDLL(None)
        done = libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (AttributeError, OSError, TypeError):  # no glibc
        done = 0
    return "freed memory is kept (M_MMAP_MAX=0, M_TRIM_THRESHOLD=2^31-1)" if done else "system default"
