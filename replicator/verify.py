"""Proves by digest that two disks hold the same bytes, however each of them is allocated.

The digest is SHA-256 over the disk's size and its chunks of 1 MiB that are not all zero, each with its
position. So holes, stored zeros and punched zeros are the same, and a sparse disk costs what its data costs.
"""

from __future__ import annotations

import hashlib
import struct

from protocol.constants import MIB
from protocol.payload import Extent
from replicator.buffers import BufferPool, zero_runs
from replicator.sources.base import Source
from replicator.workers import Workers

CHUNK_BYTES = MIB
_POSITION = struct.Struct("<Q")


async def content_digest(source: Source, workers: Workers) -> str:
    """SHA-256 of a disk's content, in hex.

    Raises:
        SourceError: it cannot be read.
    """
    digest = hashlib.sha256(_POSITION.pack(source.size_bytes))
    pool = BufferPool(CHUNK_BYTES)
    done = 0  # chunks before this one are in the digest
    async for extent in source.extents():
        if extent.zero:
            continue
        for offset in range(max(done, extent.offset - extent.offset % CHUNK_BYTES), extent.end, CHUNK_BYTES):
            buffer = pool.take(min(CHUNK_BYTES, source.size_bytes - offset))
            await source.read_into([Extent(offset, len(buffer.view))], buffer.view)
            if not all(run.zero for run in zero_runs(buffer, 0, len(buffer.view))):
                await workers.run(_update, digest, offset, buffer.view)
            pool.give(buffer)
            done = offset + CHUNK_BYTES
    return digest.hexdigest()


def _update(digest: hashlib._Hash, offset: int, chunk: memoryview) -> None:
    digest.update(_POSITION.pack(offset))
    digest.update(chunk)
