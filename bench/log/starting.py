"""How soon a master target answers that starts over sealed epochs which it has not applied.

The journal is written by the product's own functions, without the line: what is measured begins after that.
From the start of the process to the answer to an OPEN of that group, by a sender that comes as soon as the
master target listens. Nothing of the journal was read before.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import uvloop

from bench import ours
from bench.contenders import Ends, Job
from bench.log.figures import Figure, Unit
from bench.options import GIB, MIB, LogSizes
from bench.processes import Crowd
from protocol.messages import NO_ID, Consistency, Hello, Interval, Mode, Open, OpenDisk, Opened, Welcome
from protocol.payload import Extent, build
from protocol.state import Role
from replicator.authority import Authority
from replicator.buffers import BufferPool
from replicator.certificates import host_name
from replicator.clock import Clock
from replicator.files import Files
from replicator.holding import Holding
from replicator.identity import Identities, Identity
from replicator.images.directory import ImageDirectory
from replicator.log.gather import Frame
from replicator.log.place import GroupDirectory
from replicator.private_directory import PrivateDirectory
from replicator.transport.dial import Address, dial
from replicator.transport.tls import client_context

LIMIT_S = 300.0
WANTED_S = 10.0
RESERVE = 1.5  # of the journal's size must be free: it is being applied while we look
BATCH = 8  # frames of a MiB


def measure(sizes: LogSizes, seed: int, folder: Path, ends: Ends, say: Callable[[str], None]) -> list[Figure]:
    """The figure; with as long a journal as there is space for.

    Raises:
        BenchError, RunFailed: it does not work.
    """
    job = ours.new(folder, ends)
    free = shutil.disk_usage(folder).free
    journal_bytes = min(sizes.journal_bytes, int(free / RESERVE) // MIB * MIB)
    source = folder / "source.img"
    with source.open("wb") as file:
        file.truncate(journal_bytes)
    job = replace(job, source=source)
    with Crowd(folder, LIMIT_S) as crowd:
        ours.receive(job, crowd)
        crowd.begin()
        sealed = bytes.fromhex(ours.send(job, crowd)["epoch"])
    identity = _identity(job)
    say(f"writing a journal of {journal_bytes >> 20} MiB")
    epoch = _write_journal(job, identity, sealed, seed)
    os.sync()
    with Crowd(folder, LIMIT_S) as crowd:
        began_s = time.perf_counter()
        ours.receive(job, crowd, within_s=LIMIT_S)
        listening_s = time.perf_counter() - began_s
        uvloop.run(_opened(job, identity, epoch))
        seconds = time.perf_counter() - began_s
    title = f"start over {journal_bytes / GIB:.1f} GiB of journal: to OPENED"
    say(f"{title}: {seconds:.1f} s")
    return [Figure(title, seconds, Unit.SECONDS, WANTED_S, runs={"listening after, s": [listening_s]})]


def _identity(job: Job) -> Identity:
    """The sender's, which has joined."""
    state = PrivateDirectory(Files(), job.room / ours.STATE)
    found = Identities(state).find_by_address(str(_address(job)))
    assert found is not None
    return found


def _address(job: Job) -> Address:
    return Address(job.ends.address, job.ends.port)


def _write_journal(job: Job, identity: Identity, sealed: bytes, seed: int) -> bytes:
    """Seal an epoch that says all of the disk, as a session would, and leave it there; its id."""
    files, clock = Files(), Clock()
    target = job.room / ours.TARGET
    retention = PrivateDirectory(files, target / ".replicator")
    hash_seed = Authority.open(retention, clock).hash_seed
    wanted = _open(job, secrets.token_bytes(16), sealed)
    with ExitStack() as opened:
        images = opened.enter_context(ImageDirectory(files, target, retention, thin=True))
        images.lock()
        place = GroupDirectory(retention, ours.DISK)
        holding = Holding.open(place, images, identity.id, wanted, hash_seed, clock.now_ns())
        opened.callback(holding.close)
        for batch in _batches(holding, job.source.stat().st_size, hash_seed, seed):
            holding.commit(batch)
        holding.seal(False, clock.now_ns())
    return wanted.epoch


def _batches(holding: Holding, size: int, hash_seed: int, seed: int) -> Iterator[list[Frame]]:
    """Frames of all of a disk, in memory that is used again."""
    pool, number, epoch = BufferPool(0), holding.disks[0].number, holding.group.epochs.number
    bodies = [pool.take(MIB + 16, 16) for _ in range(BATCH)]
    content = memoryview(seed.to_bytes(8, "little") * (MIB // 8))
    for body in bodies:
        body.view[16:] = content
    for first in range(0, size, BATCH * MIB):
        batch: list[Frame] = []
        for body, start in zip(bodies, range(first, size, MIB), strict=False):
            extent = Extent(start, min(MIB, size - start))
            raw = body.view[16 : 16 + extent.length]
            frame = build(number, epoch, Interval(start, extent.end), [extent], raw, None, hash_seed)
            body.view[:16] = frame.table
            batch.append((frame.header, body.view[: frame.header.body_len]))
        yield batch


def _open(job: Job, epoch: bytes, parent: bytes) -> Open:
    size = job.source.stat().st_size
    disks = (OpenDisk(ours.DISK, size, time.time_ns()),)
    mode = Mode.INCREMENTAL if parent != NO_ID else Mode.RESYNC
    return Open(ours.DISK, b"", epoch, parent, mode, Consistency.CRASH, 0, disks)


async def _opened(job: Job, identity: Identity, parent: bytes) -> None:
    """Open the next epoch, and go."""
    tls = client_context(identity.credentials, identity.authority)
    async with asyncio.timeout(LIMIT_S):
        stream = await dial(
            _address(job), tls, Role.SENDER, server_name=host_name(identity.server), clock=Clock()
        )
        try:
            stream.send(Hello())
            await stream.expect(Welcome)
            stream.send(_open(job, secrets.token_bytes(16), parent))
            answer = await stream.expect(Opened)
        finally:
            stream.abort()
    assert (answer.sealed, answer.mode) == (parent, Mode.INCREMENTAL), "the journal does not count"
