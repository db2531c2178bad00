"""Page-aligned buffers, reused, so that O_DIRECT takes them and no page is faulted in twice.

A ``Buffer`` belongs to whoever took it until it is given back; nobody looks at it afterwards. The pool itself
sets no limit on what is taken: the credit window (receiver) and the count of frames under way (sender) do. It
is used from the event loop's thread alone. Here also: the zero test, since it works on addresses.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import defaultdict
from typing import NamedTuple

PAGE_BYTES = mmap.PAGESIZE
ZERO_BLOCK_BYTES = 64 * 1024  # a call a block costs 1 us; at 64 KiB the test runs at memory speed

_SMALLEST_BYTES = 64 * 1024
_REFERENCES_OF_NO_SLICE = 2  # the variable in give() and getrefcount's own argument
_zeros = mmap.mmap(-1, ZERO_BLOCK_BYTES)
_zeros_address = ctypes.addressof(ctypes.c_char.from_buffer(_zeros))
# Not CDLL, which lets go of the GIL: taking it back costs more than comparing 64 KiB.
_memcmp = ctypes.PyDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Buffer:
    """A piece of page-aligned memory.

    Attributes:
        view: the bytes asked for, writable.
        address: memory address of ``view[0]``.
    """

    __slots__ = ("_memory", "address", "view")

    def __init__(self, memory: mmap.mmap, start: int, size: int) -> None:
        self._memory: mmap.mmap | None = memory
        self.view = memoryview(memory)[start : start + size]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + start


class BufferPool:
    """Hands out buffers and keeps up to ``keep_bytes`` of returned ones for the next taker.

    Attributes:
        taken: buffers out now. made: pieces of memory that had to be made, ever: each costs a fault a page.
    """

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._kept_bytes = 0
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)
        self.taken = 0
        self.made = 0

    def take(self, size: int, lead: int = 0) -> Buffer:
        """A buffer of ``size`` bytes whose byte ``lead`` lies on a page boundary. Content undefined."""
        start = -lead % PAGE_BYTES
        need = max(_SMALLEST_BYTES, 1 << (start + size - 1).bit_length())
        free = self._free[need]
        if free:
            memory = free.pop()
            self._kept_bytes -= need
        else:
            self.made += 1
            memory = mmap.mmap(-1, need, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.taken += 1
        return Buffer(memory, start, size)

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back; its view is released: a late reader fails instead of seeing other data.

        Slices of the view cannot be released from here. Memory of which one is left is not handed out again.

        Raises:
            ValueError: it was given back before. BufferError: a call is using the view; it stays taken.
        """
        if buffer._memory is None:
            raise ValueError("this buffer was given back before")
        buffer.view.release()
        memory, buffer._memory = buffer._memory, None
        self.taken -= 1
        alone = sys.getrefcount(memory) == _REFERENCES_OF_NO_SLICE
        if alone and self._kept_bytes + len(memory) <= self._keep_bytes:
            self._kept_bytes += len(memory)
            self._free[len(memory)].append(memory)

    def let_go(self) -> None:
        """Keep no memory any more of what was given back."""
        self._free.clear()
        self._kept_bytes = 0


def address_of(view: memoryview) -> int | None:
    """Where it lies in memory; None for read-only memory, of which Python does not tell."""
    return None if view.readonly else ctypes.addressof(ctypes.c_char.from_buffer(view))


class Run(NamedTuple):
    """A stretch of a buffer: bytes [start, end), all zero or not all zero."""

    start: int
    end: int
    zero: bool


def zero_runs(buffer: Buffer, start: int, end: int) -> list[Run]:
    """Split bytes [start, end) of a buffer into runs that are zero and runs that are not.

    Looks at blocks of 64 KiB counted from ``start``: a shorter stretch of zeros inside a block that holds
    data stays data (compression takes care of it). On real data the comparison ends at a block's first bytes.
    """
    if not 0 <= start <= end <= len(buffer.view):
        raise ValueError(f"range [{start}, {end}) is outside the buffer")
    runs: list[Run] = []
    first, position, was_zero = start, start, False
    while position < end:
        length = min(ZERO_BLOCK_BYTES, end - position)
        zero = _memcmp(buffer.address + position, _zeros_address, length) == 0
        if zero != was_zero and position > first:
            runs.append(Run(first, position, was_zero))
            first = position
        was_zero = zero
        position += length
    if first < end:
        runs.append(Run(first, end, was_zero))
    return runs
