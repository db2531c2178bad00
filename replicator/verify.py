"""Proves by digest that two disks hold the same bytes, however each of them is allocated.

The digest is SHA-256 over the disk's size and its chunks of 1 MiB that are not all zero, each with its
position. So holes, stored zeros and punched zeros are the same, and a sparse disk costs what its data costs.
"""

from __future__ import annotations

import hashlib
import struct
from functools import partial

from protocol.constants import MIB
from protocol.payload import Extent
from replicator.buffers import Buffer, BufferPool, zero_runs
from replicator.sources.base import Source

CHUNK_BYTES = MIB
_POSITION = struct.Struct("<Q")


async def content_digest(source: Source) -> str:
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
            chunk = Extent(offset, len(buffer.view))
            await source.read_into([chunk], buffer.view, partial(_update, digest, offset, buffer))
            pool.give(buffer)
            done = offset + CHUNK_BYTES
    return digest.hexdigest()


def _update(digest: hashlib._Hash, offset: int, chunk: Buffer) -> None:
    if not all(run.zero for run in zero_runs(chunk, 0, len(chunk.view))):
        digest.update(_POSITION.pack(offset))
        digest.update(chunk.view)
