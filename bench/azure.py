"""Reading a page blob: our source beside a bare parallel download with the vendor's SDK, from one emulator.

Both keep the same number of ranges of the same size in flight, round about, in one event loop. What Azure
itself gives a blob (500 requests and 60 MiB a second) is not modelled: the figure says what our code costs.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from azure.storage.blob.aio import BlobClient

from agents.demo_azure import in_azurite
from bench.disk import data_ranges
from protocol.payload import Extent
from replicator.azure.blob import InAccount, PageBlob
from replicator.sources.page_blob import REQUEST_BYTES, REQUESTS, PageBlobSource
from replicator.workers import Workers

PROGRAM = "azurite-blob"
WANTED = 0.95


@dataclass(frozen=True, slots=True)
class Reads:
    """Seconds of every round, and the ratio of the medians: above 1 ours is faster."""

    data_bytes: int
    ours_s: tuple[float, ...]
    bare_s: tuple[float, ...]
    ratio: float


def missing() -> str | None:
    """Why it cannot be measured here; None: it can."""
    return None if shutil.which(PROGRAM) else f"{PROGRAM} is not installed: make peers"


def measure(image: Path, rounds: int) -> dict[str, Any]:
    """Put an image into a page blob and read it in both ways."""
    return asdict(asyncio.run(_measure(image, rounds)))


async def _measure(image: Path, rounds: int) -> Reads:
    starts = [
        start
        for first, end in data_ranges(image)
        for start in range(
            first, min(end, first + (end - first) // REQUEST_BYTES * REQUEST_BYTES), REQUEST_BYTES
        )
    ]
    ours_s, bare_s = [], []
    with Workers() as workers:
        async with in_azurite(image, workers) as there:
            await there.follow()
            blob = PageBlob(InAccount(there.account, there.address), str(there.address))
            source = await PageBlobSource.open(blob, workers)
            client = BlobClient.from_connection_string(
                there.connection_string, there.address.container, there.address.blob
            )
            async with client:
                for _ in range(rounds):
                    ours_s.append(await _timed(starts, lambda at: _read(source, at)))
                    bare_s.append(await _timed(starts, lambda at: _download(client, at)))
            await source.close()
    ratio = statistics.median(bare_s) / statistics.median(ours_s)
    return Reads(len(starts) * REQUEST_BYTES, tuple(ours_s), tuple(bare_s), round(ratio, 3))


async def _timed(starts: Sequence[int], read: Callable[[int], Awaitable[None]]) -> float:
    """Seconds that all ranges take, as many at a time as our source allows."""
    gate = asyncio.Semaphore(REQUESTS)

    async def gated(at: int) -> None:
        async with gate:
            await read(at)

    began_s = time.perf_counter()
    await asyncio.gather(*(gated(at) for at in starts))
    return round(time.perf_counter() - began_s, 4)


async def _read(source: PageBlobSource, at: int) -> None:
    view = memoryview(bytearray(REQUEST_BYTES))
    await source.read_into([Extent(at, REQUEST_BYTES)], view, int)


async def _download(client: BlobClient, at: int) -> None:
    stream = await client.download_blob(at, REQUEST_BYTES)
    await stream.readall()
