"""How fast redo is applied, with and without history, beside taking it in and beside plain writes.

Within one process, by the product's own functions. Taking in is what a session does with a frame: verify it
in a thread, put it into the log with others, fdatasync; nothing comes over a line, so that what applying is
held against is as fast as it can be. All work on the same image, which lies whole on the disk and not in the
page cache.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import uvloop

from bench.log.figures import Figure, Unit
from bench.log.frames import DISK, EPOCH, SEED, Kind, frames, kinds
from bench.options import LogSizes
from bench.results import MB
from protocol.constants import MIB
from protocol.header import Flags, Header
from protocol.payload import Extent, new_decompressor, unpack
from replicator.buffers import BufferPool
from replicator.files import Files
from replicator.images.flat_vmdk import FlatVmdk, flat_name
from replicator.log import log as logs
from replicator.log.apply import apply_segment
from replicator.log.log import Log
from replicator.log.records import Kind as LogKind
from replicator.log.workspace import Workspace
from replicator.session import COMMIT_BYTES
from replicator.workers import Workers

NAME = "base"
TAKEN, APPLIED, APPLIED_BARE, WRITTEN = "received, s", "applied, s", "applied without undo, s", "written, s"
WANTED, WANTED_BARE = 0.7, 1.0


@dataclass(frozen=True, slots=True)
class Site:
    """Where it is done: the image, its folder, threads, and memory to apply with."""

    folder: Path
    dir_fd: int
    files: Files
    image: FlatVmdk
    workers: Workers
    workspace: Workspace


def measure(sizes: LogSizes, seed: int, folder: Path, say: Callable[[str], None]) -> list[Figure]:
    """The figures, two for each kind of changes."""
    folder.mkdir()
    return uvloop.run(_measure(sizes, seed, folder, say))


async def _measure(sizes: LogSizes, seed: int, folder: Path, say: Callable[[str], None]) -> list[Figure]:
    files = Files()
    dir_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    found: list[Figure] = []
    try:
        image = FlatVmdk.create(files, dir_fd, NAME, sizes.base_bytes)
        try:
            with Workers() as workers:
                site = Site(folder, dir_fd, files, image, workers, Workspace(begin=workers.begin))
                await workers.run(_fill, image)
                for kind in kinds(sizes.applied_bytes, sizes.blocks_bytes, sizes.base_bytes, seed):
                    found += await _rounds(site, kind, sizes, say)
        finally:
            image.close()
    finally:
        os.close(dir_fd)
    return found


def _fill(image: FlatVmdk) -> None:
    """Data everywhere, so that what is replaced has to be read."""
    content = memoryview(os.urandom(MIB))
    for offset in range(0, image.size_bytes, MIB):
        image.write([Extent(offset, MIB)], content)
    image.sync()


async def _rounds(site: Site, kind: Kind, sizes: LogSizes, say: Callable[[str], None]) -> list[Figure]:
    runs: dict[str, list[float]] = {TAKEN: [], APPLIED: [], APPLIED_BARE: [], WRITTEN: []}
    began_s = time.monotonic()
    made = frames(kind, BufferPool(0))
    for number in range(sizes.rounds):
        if number and (time.monotonic() - began_s) * (number + 1) / number > sizes.budget_s / 3:
            break
        for history in (True, False) if number % 2 else (False, True):
            _forget(site)
            redo = Log.create(site.files, site.dir_fd, LogKind.REDO, EPOCH, SEED)
            try:
                runs[TAKEN].append(await taken(made, redo, site.workers))
                await site.workers.run(redo.finish)
                runs[APPLIED if history else APPLIED_BARE].append(await _applied(site, redo, history=history))
            finally:
                redo.close()
            if not number and not history:
                await site.workers.run(_check, site, kind)
        _forget(site)
        runs[WRITTEN].append(await site.workers.run(_written, site.folder / flat_name(NAME), kind))
    rates = {name: kind.size_bytes / median(seconds) for name, seconds in runs.items()}
    told = ", ".join(f"{name.removesuffix(', s')} {rate / MB:,.0f} MB/s" for name, rate in rates.items())
    say(f"{kind.title}: {told}")
    return list(_figures(kind.title, rates, runs))


def _figures(title: str, rates: Mapping[str, float], runs: Mapping[str, list[float]]) -> Iterator[Figure]:
    for what, name, wanted in (
        ("apply without undo", APPLIED_BARE, WANTED_BARE),
        ("apply with undo", APPLIED, WANTED),
    ):
        ratio = rates[name] / rates[TAKEN]
        yield Figure(f"{what}, by receive: {title}", ratio, Unit.RATIO, wanted, at_most=False, runs=runs)
        ratio = rates[name] / rates[WRITTEN]
        yield Figure(f"{what}, by plain writes: {title}", ratio, Unit.RATIO, runs=runs)


def _forget(site: Site) -> None:
    """Everything is written out, and nothing of the image is in the page cache."""
    os.sync()
    with (site.folder / flat_name(NAME)).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def taken(made: Iterable[tuple[Header, memoryview]], redo: Log, workers: Workers) -> float:
    """Seconds to verify frames and have them durable in a log, as ``Session`` does it."""
    rest, pool = iter(made), BufferPool(16 * MIB)
    verified: list[tuple[Header, memoryview]] = []
    verifying = asyncio.Event()
    full = asyncio.Condition()

    async def verify() -> None:
        decompressor = new_decompressor()
        for header, body in rest:
            raw = pool.take(header.raw_len) if header.flags & Flags.ZSTD else None
            await workers.run(unpack, header, body, raw.view if raw else None, decompressor, SEED)
            if raw is not None:
                pool.give(raw)
            async with full:
                verified.append((header, body))
                full.notify()

    async def commit() -> None:
        while True:
            async with full:
                await full.wait_for(lambda: _bytes(verified) >= COMMIT_BYTES or verifying.is_set())
                batch = verified[:]
                verified.clear()
            if not batch:
                return
            await workers.run(redo.write, batch)

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(commit())
        await asyncio.gather(*(verify() for _ in range(workers.threads)))
        async with full:
            verifying.set()
            full.notify()
    return time.perf_counter() - began_s


def _bytes(batch: Iterable[tuple[Header, memoryview]]) -> int:
    return sum(header.body_len for header, _ in batch)


async def _applied(site: Site, redo: Log, *, history: bool) -> float:
    """Seconds to apply a log, segment by segment, as ``Groups`` does it."""
    kind = LogKind.UNDO
    undo = Log.create(site.files, site.dir_fd, kind, EPOCH, SEED) if history else None
    try:
        began_s = time.perf_counter()
        for segment in redo.segments():
            bases = {DISK: site.image}
            await site.workers.run(apply_segment, redo, segment, bases, undo, SEED, site.workspace)
        if undo is not None:
            await site.workers.run(undo.finish)
        return time.perf_counter() - began_s
    finally:
        if undo is not None:
            undo.close()
            logs.remove(site.files, site.dir_fd, kind, EPOCH)


def _written(path: Path, kind: Kind) -> float:
    """Seconds to write the same extents in their order, and have them durable, with nothing around it."""
    fd = os.open(path, os.O_RDWR)
    try:
        began_s = time.perf_counter()
        for change in kind.changes:
            position = 0
            for offset, length, _ in change.extents:
                os.pwrite(fd, change.raw[position : position + length], offset)
                position += length
        os.fdatasync(fd)
        return time.perf_counter() - began_s
    finally:
        os.close(fd)


def _check(site: Site, kind: Kind) -> None:
    """What was applied is there."""
    with (site.folder / flat_name(NAME)).open("rb") as file:
        for change in kind.changes:
            position = 0
            for offset, length, _ in change.extents:
                expected = change.raw[position : position + length]
                assert os.pread(file.fileno(), length, offset) == expected, f"other bytes at {offset}"
                position += length
