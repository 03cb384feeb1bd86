"""Keeps the memory that tensors free in the process, for whoever trains on the CPU."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
#: Larger than the 32 MiB up to which glibc may by itself come to keep freed blocks.
_PROBE_BYTES = 64 * 2**20


class _MallInfo2(ctypes.Structure):
    # From malloc.h of glibc 2.33 and later.
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()  # noqa: SIM905
    ]


def given_out() -> tuple[int, int] | None:
    """Bytes that glibc's malloc has given out and not got back: from its heaps, and mapped one by one.

    None without glibc 2.33 or later.
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    mallinfo2.restype = _MallInfo2
    found = mallinfo2()
    return int(found.uordblks), int(found.hblkhd)


def keep_freed_memory() -> bool:
    """Tells the C library to give no freed memory back to the system, in the whole process; returns whether it does so.

    glibc maps a large tensor's memory anew at every allocation and returns it at every free, or does not, depending on
    what else lies on the heap. The page faults then take more time than fast layers: of three 3×3 convolutions of 128
    channels at 10 % density with ReLU, a fifth to a third of a training step. ``python -m ddst.benchmarks
    freed-memory`` measures it on your machine. Call it first thing in a program that trains; ``ddst train`` does.

    Returns:
        True: from now on freed blocks are kept and used again. This is tried out with a block of 64 MiB, which is not
        touched. False: nothing changes, as the C library is not glibc 2.33 or later, or another allocator (jemalloc,
        tcmalloc, mimalloc) is loaded in its place, which keeps memory in its own way.

    Cost: the process keeps the most memory it ever needed at once, and with glibc before 2.39 more: torch asks for
        aligned blocks, what is cut off in front of one goes elsewhere, and when the block is freed it is a little too
        small to serve the same size again (sourceware bug 30723). In a training step this can double the resident
        memory of activations. Where something small is kept at every step, such as a list of losses, a program can grow
        by a whole activation a step, *with this function and without it* (blocks above 32 MiB: with it only).
        ``THP_MEM_ALLOC_ENABLE=1`` in the environment, before torch is imported, mends that: torch then aligns blocks
        to pages, so that what is cut off comes back. ``ddst train`` sets it, where it is not set (``python -m ddst``
        does not: it would come too late).
        Blocks that other threads than the first one allocate come from heaps of at most 64 MiB, which glibc returns
        when they are empty, whatever is set; torch's backward pass on the CPU runs in the thread that calls it.

    Source: mallopt(3): ``M_MMAP_MAX = 0``, ``M_TRIM_THRESHOLD = 2³¹ − 1``.

    >>> keep_freed_memory() in (True, False)
    True
    """
    before = given_out()
    if before is None:
        return False
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    block = libc.malloc(_PROBE_BYTES)
    after = given_out()
    libc.free(block)
    # Of another allocator glibc's books know nothing; a mapped block would stand in the second number.
    return block is not None and after is not None and after[0] - before[0] >= _PROBE_BYTES
