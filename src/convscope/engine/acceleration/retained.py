"""Memory that is asked for again at every step stays with the process until the work is done."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt (malloc.h): how much may lie free at the heap's end, from which size on a block is
# mapped by itself, and how many such blocks there may be.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
# glibc's default, and what it comes to by itself in a process that frees large blocks: 32 MiB, and twice as much.
MAPPED, LARGE = 65536, 32 << 20


@contextmanager
def retained() -> Iterator[None]:
    """While active, the C library keeps what is freed for what is asked for next.

    By itself glibc has each block of more than 32 MiB mapped anew, and the system clears it page by page. Where large
    activations come and go at every step of a climb, that is a seventh of all the time. Afterwards all is handed back.
    Where the C library is another, nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, MAPPED)
        libc.mallopt(MMAP_THRESHOLD, LARGE)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGE)
        libc.malloc_trim(0)
