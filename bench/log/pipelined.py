"""What sealing is held against: one process that reads the same bytes, compresses them, and has them durable.

    python -m bench.log.pipelined SOURCE CHANGES TARGET

One thread reads, one compresses (zstd, level 1), one writes; a MiB at a time, a few under way. Nothing is
hashed, encrypted, sent, verified or indexed. Prints its seconds, from the first read to the end of the
fdatasync: what starting took is not in them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import BoundedSemaphore, Thread
from typing import TypeAlias

from zstandard import ZstdCompressor

CHUNK_BYTES = 1 << 20
UNDER_WAY = 8
LEVEL = 1

Extents: TypeAlias = Sequence[tuple[int, int]]
Chunks: TypeAlias = "SimpleQueue[bytes | memoryview | None]"


def copy(source: Path, extents: Extents, target: Path) -> float:
    """Bring the extents, (offset, length), of a file into a new one; gives the seconds that it took."""
    room = BoundedSemaphore(UNDER_WAY)
    raw: Chunks = SimpleQueue()
    packed: Chunks = SimpleQueue()
    with source.open("rb", buffering=0) as read, target.open("xb", buffering=0) as written:
        began_s = time.perf_counter()
        threads = [
            Thread(target=_read, args=(read.fileno(), extents, raw, room)),
            Thread(target=_compress, args=(raw, packed)),
            Thread(target=_each, args=(packed, _writer(written.fileno(), room))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fdatasync(written.fileno())
        return time.perf_counter() - began_s


def _read(fd: int, extents: Extents, raw: Chunks, room: BoundedSemaphore) -> None:
    chunk, filled = memoryview(bytearray(CHUNK_BYTES)), 0
    for offset, length in _cut(extents):
        if filled + length > CHUNK_BYTES:
            room.acquire()
            raw.put(chunk[:filled])
            chunk, filled = memoryview(bytearray(CHUNK_BYTES)), 0
        filled += os.preadv(fd, [chunk[filled : filled + length]], offset)
    room.acquire()
    raw.put(chunk[:filled])
    raw.put(None)


def _cut(extents: Extents) -> Iterator[tuple[int, int]]:
    for offset, length in extents:
        for start in range(offset, offset + length, CHUNK_BYTES):
            yield start, min(CHUNK_BYTES, offset + length - start)


def _compress(raw: Chunks, packed: Chunks) -> None:
    compressor = ZstdCompressor(level=LEVEL)
    _each(raw, lambda chunk: packed.put(compressor.compress(chunk)))
    packed.put(None)


def _writer(fd: int, room: BoundedSemaphore) -> Callable[[bytes | memoryview], None]:
    def write(chunk: bytes | memoryview) -> None:
        os.write(fd, chunk)
        room.release()

    return write


def _each(chunks: Chunks, step: Callable[[bytes | memoryview], None]) -> None:
    while (chunk := chunks.get()) is not None:
        step(chunk)


def main() -> None:
    """``python -m bench.log.pipelined``."""
    source, changes, target = map(Path, sys.argv[1:])
    (extents,) = json.loads(changes.read_bytes())["disks"].values()
    print(json.dumps({"seconds": copy(source, extents, target)}))


if __name__ == "__main__":
    main()
