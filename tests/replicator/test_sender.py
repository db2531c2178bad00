"""The sender against a target that goes by the book but for one thing, and against the real one."""

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from xxhash import xxh3_64_intdigest

from protocol.connection import Data
from protocol.constants import HEADER_BYTES
from protocol.errors import LocalProtocolError
from protocol.header import FrameType, Header, pack
from protocol.messages import (
    NO_ID,
    Ack,
    Bye,
    Consistency,
    Digests,
    DigestsWanted,
    DiskCoverage,
    Fail,
    Hello,
    Interval,
    Mode,
    Open,
    Opened,
    Retry,
    Seal,
    Sealed,
    Wanted,
)
from protocol.payload import Extent
from protocol.wire import encode
from replicator import sending
from replicator.buffers import ZERO_BLOCK_BYTES
from replicator.errors import LinkError, PeerError, SourceError, TrustError
from replicator.extents import Coverage
from replicator.files import Files
from replicator.images.coverage_journal import CoverageJournal
from replicator.images.directory import ImageDirectory, Lineage, OpenedGroup
from replicator.sender import Outcome, Sender
from replicator.session import Session
from replicator.transport import stream as streaming
from replicator.workers import Workers
from tests.replicator.fake_target import SEED, FakeTarget, MemorySource, noise, to_send
from tests.replicator.pipeline import (
    MIB,
    Peer,
    Target,
    descriptors,
    disk_of,
    ends,
    target,
    turns,
    until,
    until_equal,
)
from tests.replicator.pipeline import memory as remember

T = TypeVar("T")

FRAME_BYTES = HEADER_BYTES + 16 + MIB  # of incompressible data: header, one extent, a MiB
FINE_OVERHEAD = HEADER_BYTES + 4 * 16  # of a frame with a block or two


@pytest.fixture
def workers():
    with Workers(2) as made:
        yield made


async def given_back(sender: Sender, tasks_before: set) -> None:
    """Nothing of a send is left."""
    assert sender._parts.pool.taken == 0
    await until(lambda: not asyncio.all_tasks() - tasks_before)


# ------------------------------------------------------------------ the good way


@pytest.mark.parametrize("streams", [1, 16])
@pytest.mark.parametrize("level", [0, 1])
async def test_what_arrives_is_what_was_read(
    tmp_path: Path, workers: Workers, streams: int, level: int
) -> None:
    data = noise(3 * MIB) + b"text " * (MIB // 5) + bytes(4 * MIB) + noise(MIB // 2)
    data = data[: len(data) // 512 * 512]
    source = MemorySource(data, zeros=[Interval(5 * MIB, 6 * MIB)])
    async with FakeTarget(tmp_path).listening() as fake:
        sender = fake.sender(workers, level=level, streams=streams)
        outcome = await sender.send("group", [to_send(source)])
        assert bytes(fake.disks[0]) == data
        assert len(fake.data) == streams and not fake.broken
        assert outcome.epoch == fake.opens[0].epoch == fake.seals[0].epoch
        assert not outcome.changed and outcome.recovery_point == NO_ID
        assert sender._parts.pool.taken == 0
        await until(lambda: not fake.tasks)  # every stream was closed


@pytest.mark.parametrize("level", [0, 1])
async def test_memory_of_frames_that_are_sent_is_used_again(
    tmp_path: Path, workers: Workers, level: int
) -> None:
    fake = FakeTarget(tmp_path)
    async with fake.listening():
        sender = fake.sender(workers, level=level)
        await sender.send("group", [to_send(MemorySource(noise(96 * MIB)))])
        assert len(fake.frames) == 96
        assert sender._parts.pool.made <= 32  # packers, queue and streams: each holds one at a time


async def test_open_and_seal_say_what_is_sent(tmp_path: Path, workers: Workers) -> None:
    disks = [to_send(MemorySource(noise(size)), name) for name, size in (("os", MIB), ("data", 512))]
    async with FakeTarget(tmp_path).listening() as fake:
        await fake.sender(workers).send("web", disks)
        (opened,), (sealed,) = fake.opens, fake.seals
    assert (opened.group, opened.mode, opened.parent) == ("web", Mode.RESYNC, NO_ID)  # the target decides
    assert opened.consistency is Consistency.FUZZY
    assert [(disk.name, disk.size) for disk in opened.disks] == [("os", MIB), ("data", 512)]
    assert sealed.disks == (
        DiskCoverage(1, (Interval(0, MIB),)),
        DiskCoverage(2, (Interval(0, 512),)),
    )


@pytest.mark.parametrize(
    ("moments", "consistency"),
    [
        ((0,), Consistency.FUZZY),
        ((7, 0, 7), Consistency.FUZZY),
        ((7,), Consistency.CRASH),
        ((7, 7, 7), Consistency.CRASH),
        ((7, 8, 7), Consistency.PER_DISK),
    ],
)
async def test_open_says_of_which_moment_the_disks_are_and_what_that_is_worth(
    tmp_path: Path, workers: Workers, moments: tuple[int, ...], consistency: Consistency
) -> None:
    async with FakeTarget(tmp_path).listening() as fake:
        disks = [
            replace(to_send(MemorySource(noise(512)), str(number)), snapshot_ns=moment)
            for number, moment in enumerate(moments)
        ]
        outcome = await fake.sender(workers).send("group", disks)
        assert fake.opens[0].consistency is consistency is outcome.consistency
        assert tuple(disk.snapshot_time_ns for disk in fake.opens[0].disks) == moments


@pytest.mark.parametrize("is_changed", [False, True])
async def test_the_recovery_point_is_the_one_that_sealed_names(
    tmp_path: Path, workers: Workers, is_changed: bool
) -> None:
    class Pointed(FakeTarget):
        async def sealing(self, peer: Peer, seal: Seal) -> None:
            peer.send(Sealed(seal.epoch, NO_ID if seal.fuzzy else seal.epoch))

    async with Pointed(tmp_path).listening() as fake:
        source = MemorySource(noise(512), is_changed=is_changed)
        disk = replace(to_send(source), snapshot_ns=7)
        outcome = await fake.sender(workers).send("group", [disk])
        assert fake.opens[0].consistency is Consistency.CRASH
        assert outcome.recovery_point == (NO_ID if is_changed else outcome.epoch)
        assert outcome.consistency is (Consistency.FUZZY if is_changed else Consistency.CRASH)


async def test_every_send_is_an_epoch_of_its_own(tmp_path: Path, workers: Workers) -> None:
    async with FakeTarget(tmp_path).listening() as fake:
        sender = fake.sender(workers)
        for _ in range(2):
            await sender.send("group", [to_send(MemorySource(noise(512)))])
        assert fake.opens[0].epoch != fake.opens[1].epoch


async def test_several_disks_of_a_group_do_not_mix(tmp_path: Path, workers: Workers) -> None:
    disks = [noise(3 * MIB + 512 * number, number) for number in range(5)]
    async with FakeTarget(tmp_path).listening() as fake:
        sender = fake.sender(workers, streams=3)
        await sender.send("group", [to_send(MemorySource(data), str(n)) for n, data in enumerate(disks)])
        assert [bytes(disk) for disk in fake.disks] == disks
        assert sender._parts.progress.done == sender._parts.progress.size == sum(map(len, disks))


async def test_the_target_may_have_fewer_streams_than_wanted(tmp_path: Path, workers: Workers) -> None:
    async with FakeTarget(tmp_path, streams_max=3).listening() as fake:
        await fake.sender(workers, streams=16).send("group", [to_send(MemorySource(noise(MIB)))])
        assert len(fake.data) == 3


async def test_progress_only_grows_and_ends_at_the_size(tmp_path: Path, workers: Workers) -> None:
    seen: list[int] = []

    class Slow(FakeTarget):
        async def arrived(self, peer: Peer, data: Data) -> None:
            await super().arrived(peer, data)
            await asyncio.sleep(0)
            seen.append(sender._parts.progress.done)

    size = 12 * MIB + 512
    source = MemorySource(noise(5 * MIB) + bytes(size - 5 * MIB), zeros=[Interval(8 * MIB, 10 * MIB)])
    async with Slow(tmp_path, credit=4 * MIB).listening() as fake:
        sender = fake.sender(workers)
        await sender.send("group", [to_send(source)])
        progress = sender._parts.progress
    assert seen == sorted(seen) and len(set(seen)) > 3
    assert (progress.done, progress.size) == (size, size)
    assert progress.read == size - 2 * MIB  # what the source knows to be zero is not read
    assert progress.zero == size - 5 * MIB
    assert progress.sent == sum(HEADER_BYTES + data.header.body_len for data in fake.frames)


async def test_zero_blocks_inside_data_cost_nothing(tmp_path: Path, workers: Workers) -> None:
    block = ZERO_BLOCK_BYTES
    data = b"".join(noise(block, number) + bytes(3 * block) for number in range(64))
    async with FakeTarget(tmp_path).listening() as fake:
        sender = fake.sender(workers)
        await sender.send("group", [to_send(MemorySource(data))])
        assert bytes(fake.disks[0]) == data
        assert sum(frame.header.raw_len for frame in fake.frames) == 64 * block
        assert sender._parts.progress.zero == 64 * 3 * block
        assert sender._parts.progress.sent < 64 * block + 20_000


async def test_an_empty_disk_of_a_tebibyte_costs_a_few_bytes(tmp_path: Path, workers: Workers) -> None:
    source = MemorySource(b"", zeros=[Interval(0, 1 << 40)])
    source.size_bytes = 1 << 40

    class Vast(FakeTarget):
        def made(self, size: int) -> bytearray:
            return bytearray()

        def store(self, data: Data) -> list[Extent]:
            return []

    async with Vast(tmp_path).listening() as fake:
        sender = fake.sender(workers)
        await sender.send("group", [to_send(source)])
        assert sender._parts.progress.sent < 30_000  # a frame for every 4 GiB
        assert sender._parts.progress.done == 1 << 40


@pytest.mark.parametrize("is_changed", [True, False])
async def test_a_source_that_changed_is_sealed_as_fuzzy(
    tmp_path: Path, workers: Workers, is_changed: bool
) -> None:
    disks = [
        to_send(MemorySource(noise(512)), "a"),
        to_send(MemorySource(noise(512), is_changed=is_changed), "b"),
    ]
    async with FakeTarget(tmp_path).listening() as fake:
        outcome = await fake.sender(workers).send("group", disks)
        assert outcome.changed is fake.seals[0].fuzzy is is_changed


@pytest.mark.parametrize("level", [0, 3])
async def test_the_real_target_makes_the_same_disk_of_it(tmp_path: Path, seed: int, level: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "source.img"
    size = 20 * MIB + 512
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(60):
            file.seek(chance.randrange(size // 512) * 512)
            file.write(chance.choice([noise, lambda n, s: bytes(n)])(chance.randrange(1, 400) * 512, 1))
        file.truncate(size)
    before = descriptors()
    async with target(tmp_path) as here:
        disk = await disk_of(path, here.workers, "disk")
        sender = here.sender(here.site.process_server(), level=level, streams=3)
        tasks = asyncio.all_tasks()
        await sender.send("group", [disk])
        await disk.source.close()
        await here.applied()
        assert here.flat("disk") == path.read_bytes()
        assert (here.path / "disk.vmdk").exists()
        assert sender._parts.pool.taken == 0
        await until(lambda: not here.acceptor._tasks and not asyncio.all_tasks() - tasks)
    await until(lambda: descriptors() <= before)


# ------------------------------------------------------------------ credit


class Stingy(FakeTarget):
    """Gives no credit back by itself."""

    async def arrived(self, peer: Peer, data: Data) -> None:
        self.store(data)


async def test_credit_is_used_to_the_byte_and_never_exceeded(tmp_path: Path, workers: Workers) -> None:
    fake = Stingy(tmp_path, credit=3 * FRAME_BYTES + FRAME_BYTES - 1)
    async with fake.listening():
        task = asyncio.ensure_future(
            fake.sender(workers, streams=4).send("group", [to_send(MemorySource(noise(10 * MIB)))])
        )
        await until(lambda: len(fake.frames) == 3)
        await turns(300)
        assert len(fake.frames) == 3  # one byte is missing for the fourth
        fake.acknowledge(grant=1)
        await until(lambda: len(fake.frames) == 4)
        assert fake.window.received == fake.window.granted
        for number in range(5, 11):
            await turns(100)
            assert len(fake.frames) == number - 1
            fake.acknowledge(grant=FRAME_BYTES)
            await until_equal(lambda: len(fake.frames), number)
            assert fake.window.received == fake.window.granted
        fake.acknowledge(*fake.frames)
        await task
        assert not fake.broken


async def test_a_grant_that_comes_late_takes_nothing_away(tmp_path: Path, workers: Workers) -> None:
    class Gated(MemorySource):
        """Gives its first MiB, and the rest when it may."""

        async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
            if extents[0].offset:
                await may_read.wait()
            return await super().read_into(extents, view, then)

    may_read = asyncio.Event()
    fake = Stingy(tmp_path, credit=FRAME_BYTES)
    async with fake.listening():
        task = asyncio.ensure_future(fake.sender(workers).send("group", [to_send(Gated(noise(3 * MIB)))]))
        await until(lambda: len(fake.frames) == 1)
        fake.acknowledge(grant=2 * FRAME_BYTES)
        control_of(fake).send(Ack(2, FRAME_BYTES, ()))
        await turns(300)
        may_read.set()
        await until(lambda: len(fake.frames) == 3)
        fake.acknowledge(*fake.frames)
        await task
        assert not fake.broken


async def test_a_window_of_one_frame_over_many_streams_comes_to_its_end(
    tmp_path: Path, workers: Workers
) -> None:
    data = noise(12 * MIB)
    async with FakeTarget(tmp_path, credit=FRAME_BYTES).listening() as fake:
        await fake.sender(workers, streams=8).send("group", [to_send(MemorySource(data))])
        assert bytes(fake.disks[0]) == data and not fake.broken


async def test_memory_is_bounded_while_the_target_takes_nothing(tmp_path: Path, workers: Workers) -> None:
    fake = Stingy(tmp_path, credit=0)
    async with fake.listening():
        sender = fake.sender(workers, streams=4)
        source = MemorySource(noise(64 * MIB))
        task = asyncio.ensure_future(sender.send("group", [to_send(source)]))
        await until(lambda: len(fake.data) == 4 and sender._parts.pool.taken >= sending.QUEUE_FRAMES)
        await turns(2000)
        assert (
            sender._parts.pool.taken <= sending.QUEUE_FRAMES + 4 + sending.PACKERS_A_THREAD * workers.threads
        )
        assert sender._parts.progress.read <= sender._parts.pool.taken * MIB
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sender._parts.pool.taken == 0


# ------------------------------------------------------------------ going on after a break


class Breaking(Files):
    """Lets so many syncs of images through; then they wait until the test lets them go."""

    def __init__(self, good: int) -> None:
        self.left = good
        self.reached = threading.Event()
        self.may_go = threading.Event()

    def fdatasync(self, fd: int) -> None:
        self.left -= 1
        if self.left < 0:
            self.reached.set()
            assert self.may_go.wait(20)
        super().fdatasync(fd)


async def broken_off(here: Target, files: Breaking, task: "asyncio.Future[Outcome]") -> Coverage:
    """Cut the session at the sync that waits; what the journal then holds."""
    await until(files.reached.is_set)
    for session in list(here.receiver._sessions.values()):
        session._control.abort()
    files.may_go.set()
    with ends(LinkError, "link.lost"):
        await task
    await until(lambda: not here.receiver._groups)
    with here.images._retention.held() as held:
        journal = CoverageJournal.open(held, 1)
        journal.close()
    assert journal.disks
    return journal.disks[1]


@pytest.mark.parametrize("process", ["the same", "a new one"])
async def test_after_a_break_only_what_was_not_durable_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: str
) -> None:
    frames: list[Interval] = []
    openings: list[tuple[Open, OpenedGroup]] = []
    take, open_group = Session._take, ImageDirectory.open_group

    def taken(session: Session, data: Data) -> None:
        frames.append(Interval(data.header.cover_start, data.header.cover_end))
        take(session, data)

    def opened(directory: ImageDirectory, owner: str, wanted: Open, lineage: Lineage) -> OpenedGroup:
        openings.append((wanted, open_group(directory, owner, wanted, lineage)))
        return openings[-1][1]

    monkeypatch.setattr(Session, "_take", taken)
    monkeypatch.setattr(ImageDirectory, "open_group", opened)
    size, files = 24 * MIB + 512, Breaking(3)
    source = MemorySource(noise(size))
    # So little credit that some of it is durable at the third sync, and never all of it.
    async with target(tmp_path, files=files, credit_bytes=9 * MIB) as here:
        server, memory = here.site.process_server(), here.memory()
        sender = here.sender(server, level=0, memory=memory)
        journal = await broken_off(
            here, files, asyncio.ensure_future(sender.send("group", [to_send(source)]))
        )
        before = sender._parts.progress.sent
        first, frames[:] = list(frames), []
        if process == "a new one":
            sender.close()
            sender, before = here.sender(server, level=0, memory=memory), 0
        outcome = await sender.send("group", [to_send(source)])
        progress = sender._parts.progress

        (one, _), (two, resumed) = openings
        assert one.epoch == two.epoch == outcome.epoch and not outcome.stale
        assert resumed.disks[0].durable.intervals() == journal.intervals()
        assert Coverage(frames).intervals() == tuple(journal.gaps(0, size))
        assert sum(end - start for start, end in frames) == size - journal.covered_bytes
        assert progress.sent - before < size - journal.covered_bytes + 100 * len(frames)
        again = [frame for frame in frames if frame in first]
        if process == "the same":  # what went out and was not acknowledged went out twice
            assert progress.resent >= sum(end - start for start, end in again)
            assert bool(progress.resent) is bool(Coverage(first).covered_bytes - journal.covered_bytes)
        await here.applied()
        assert progress.done == size and here.flat("disk") == source.data


@pytest.mark.parametrize(("then", "stale"), [("as it was", False), ("otherwise", True), ("", True)])
async def test_a_later_run_says_whether_the_source_is_still_the_one_that_the_epoch_began_with(
    tmp_path: Path, workers: Workers, then: str, stale: bool
) -> None:
    memory = remember(tmp_path / "state")
    source = MemorySource(noise(MIB))
    async with Refusing(tmp_path, "seal").listening() as fake:
        with ends(PeerError, "group.not_yours"):
            await fake.sender(workers, memory=memory).send("group", [to_send(source)])
        source.seen_as, fake._step = then, "none"
        outcome = await fake.sender(workers, memory=memory).send("group", [to_send(source)])
    assert outcome.stale is stale
    assert fake.opens[0].epoch == fake.opens[1].epoch == outcome.epoch


# ------------------------------------------------------------------ the difference


def changed_at(data: bytes, *places: int) -> bytes:
    made = bytearray(data)
    for place in places:
        made[place] ^= 0xFF
    return bytes(made)


@pytest.mark.parametrize("remembers", [True, False])
async def test_of_an_image_that_is_there_only_the_difference_travels(tmp_path: Path, remembers: bool) -> None:
    data = noise(20 * MIB) + bytes(4 * MIB) + noise(MIB, 1)
    async with target(tmp_path) as here:
        server, memory = here.site.process_server(), here.memory()
        sender = here.sender(server, level=0, memory=memory)
        assert (await sender.send("group", [to_send(MemorySource(data))])).mode is Mode.FULL
        later = changed_at(data, 0, 9 * MIB + 77, 21 * MIB, len(data) - 1)
        sender = here.sender(server, level=0, memory=memory if remembers else None)
        outcome = await sender.send("group", [to_send(MemorySource(later))])
        progress = sender._parts.progress
        assert outcome.mode is (Mode.INCREMENTAL if remembers else Mode.RESYNC)
        await here.applied()
        assert here.flat("disk") == later
        assert progress.sent < 4 * 4096 + 8 * FINE_OVERHEAD and progress.done == len(data)
        assert progress.matched >= len(data) - 4 * 65536


async def test_an_image_that_somebody_else_changed_is_compared_and_healed(tmp_path: Path) -> None:
    data = noise(12 * MIB)
    async with target(tmp_path) as here:
        server, memory = here.site.process_server(), here.memory()
        await here.sender(server, level=0, memory=memory).send("group", [to_send(MemorySource(data))])
        with (here.path / "disk-flat.vmdk").open("r+b") as file:
            file.seek(5 * MIB + 4096)
            file.write(b"not ours")
        sender = here.sender(server, level=0, memory=memory)  # its map would find nothing to send
        outcome = await sender.send("group", [to_send(MemorySource(data))])
        await here.applied()
        assert outcome.mode is Mode.RESYNC and here.flat("disk") == data
        assert 4096 <= sender._parts.progress.sent < 4096 + 4 * FINE_OVERHEAD


class Asked(FakeTarget):
    """Wants a resync, and answers questions as it is told."""

    def __init__(self, path: Path, lie: Callable[[Digests], Digests]) -> None:
        super().__init__(path)
        self.mode = Mode.RESYNC
        self._lie = lie

    async def asked(self, peer: Peer, wanted: DigestsWanted) -> None:
        peer.send(self._lie(self.answer(wanted)))


def shifted(answer: Digests, by: int) -> tuple[Interval, ...]:
    return tuple(Interval(start + by, end + by) for start, end in answer.intervals)


LIES: dict[str, Callable[[Digests], Digests]] = {
    "more digests": lambda answer: replace(answer, digests=answer.digests + bytes(16)),
    "fewer digests": lambda answer: replace(answer, digests=answer.digests[:-16]),
    "a part of a digest": lambda answer: replace(answer, digests=answer.digests[:-1]),
    "a hole and its digests too": lambda answer: replace(answer, holes=(Interval(0, 65536),)),
    "a hole that is no block": lambda answer: replace(
        answer, holes=(Interval(0, 512),), digests=answer.digests[16:]
    ),
    "a hole outside": lambda answer: replace(
        answer, holes=(Interval(64 * MIB, 64 * MIB + 65536),), digests=answer.digests[16:]
    ),
    "another request": lambda answer: replace(answer, request=answer.request + 1),
    "other intervals": lambda answer: replace(answer, intervals=shifted(answer, 65536)),
    "no intervals": lambda answer: replace(answer, intervals=(), digests=b""),
}


@pytest.mark.parametrize("how", LIES)
async def test_digests_that_do_not_fit_the_question_end_the_send(
    tmp_path: Path, workers: Workers, how: str
) -> None:
    tasks = asyncio.all_tasks()
    async with Asked(tmp_path, LIES[how]).listening() as fake:
        sender = fake.sender(workers)
        with ends(PeerError, "peer.protocol"):
            await sender.send("group", [to_send(MemorySource(noise(4 * MIB)))])
        assert not fake.seals and not fake.frames
    await given_back(sender, tasks)


async def test_digests_that_nobody_asked_for_end_the_send(tmp_path: Path, workers: Workers) -> None:
    class Talkative(Stingy):
        async def opened(self, peer: Peer, wanted: Open) -> None:
            await super().opened(peer, wanted)
            peer.send(Digests(1, (Interval(0, 65536),), (), bytes(16)))

    async with Talkative(tmp_path).listening() as fake:
        with ends(PeerError, "peer.protocol"):
            await fake.sender(workers).send("group", [to_send(MemorySource(noise(4 * MIB)))])


async def test_holes_out_of_order_end_the_send(tmp_path: Path, workers: Workers) -> None:
    """The wire's own decoder refuses them, so they are written past it."""

    class Disorder(FakeTarget):
        async def asked(self, peer: Peer, wanted: DigestsWanted) -> None:
            answer = self.answer(wanted)
            holes = (Interval(0, 65536), Interval(2 * 65536, 3 * 65536))
            body = encode(replace(answer, holes=holes, digests=answer.digests[32:]))
            first, second = (start.to_bytes(8, "little") + end.to_bytes(8, "little") for start, end in holes)
            wrong = body.replace(first + second, second + first)
            assert wrong != body
            header = Header(FrameType.DIGESTS, len(wrong), body_hash=xxh3_64_intdigest(wrong, SEED))
            peer.write(pack(header, SEED) + wrong)

    async with Disorder(tmp_path).listening() as fake:
        fake.mode = Mode.RESYNC
        with ends(PeerError, "peer.protocol"):
            await fake.sender(workers).send("group", [to_send(MemorySource(noise(4 * MIB)))])


# ------------------------------------------------------------------ how it ends badly


class Ending(FakeTarget):
    """Does something bad when the third frame has arrived."""

    def __init__(self, path: Path, bad: Callable[["Ending", Peer], None]) -> None:
        super().__init__(path)
        self._bad = bad

    async def arrived(self, peer: Peer, data: Data) -> None:
        self.store(data)
        if len(self.frames) == 3:
            self._bad(self, peer)


FULL = Fail("target.full", Retry.LATER, "the datastore is full", "too much on it", "make room")
REFUSED = Fail("group.not_yours", Retry.STOP, "not yours", "why", "what to do")


def control_of(fake: FakeTarget) -> Peer:
    assert fake.control is not None
    return fake.control


def verdict_and_reset(fake: Ending, peer: Peer) -> None:
    """As a target does that runs out of space: the reason over control, the data streams cut."""
    control_of(fake).send(FULL)
    for stream in fake.data:
        stream.reset()


def reset_before_verdict(fake: Ending, peer: Peer) -> None:
    for stream in fake.data:
        stream.reset()
    asyncio.get_running_loop().call_later(0.05, lambda: control_of(fake).send(FULL))


def goodbye_everywhere(fake: Ending, peer: Peer) -> None:
    """As a target does that is being stopped."""
    for stream in fake.data:
        stream.send(Bye())
    control_of(fake).send(Bye())


BAD_ENDS = {
    "control says why": (lambda fake, peer: control_of(fake).send(REFUSED), PeerError, "group.not_yours"),
    "control says why and data is reset": (verdict_and_reset, LinkError, "target.full"),
    "data is reset and control says why": (reset_before_verdict, LinkError, "target.full"),
    "the data stream says why": (lambda fake, peer: peer.send(REFUSED), PeerError, "group.not_yours"),
    "control is reset": (lambda fake, peer: control_of(fake).reset(), LinkError, "link.lost"),
    "control is closed": (lambda fake, peer: control_of(fake).close(), LinkError, "link.lost"),
    "everything says goodbye": (goodbye_everywhere, LinkError, "link.lost"),
    "control is no longer trusted": (
        lambda fake, peer: control_of(fake).send(Fail("identity.revoked", Retry.STOP, "revoked")),
        TrustError,
        "identity.revoked",
    ),
    "control breaks the protocol": (
        lambda fake, peer: control_of(fake).write(bytes(72)),
        PeerError,
        "peer.protocol",
    ),
    "control asks for what was not offered": (
        lambda fake, peer: control_of(fake).send(Wanted(1, 0, 512)),
        PeerError,
        "peer.protocol",
    ),
    "a disk is acknowledged that there is not": (
        lambda fake, peer: control_of(fake).send(Ack(1, 1, (DiskCoverage(7, (Interval(0, 512),)),))),
        PeerError,
        "peer.protocol",
    ),
    "more is acknowledged than the disk has": (
        lambda fake, peer: control_of(fake).send(Ack(1, 1, (DiskCoverage(1, (Interval(0, 1 << 40),)),))),
        PeerError,
        "peer.protocol",
    ),
}


@pytest.mark.parametrize("how", BAD_ENDS)
async def test_what_ends_a_send_is_told_in_the_words_of_who_knows_best(
    tmp_path: Path, workers: Workers, how: str
) -> None:
    bad, kind, code = BAD_ENDS[how]
    tasks = asyncio.all_tasks()
    async with Ending(tmp_path, bad).listening() as fake:
        sender = fake.sender(workers, streams=3)
        source = MemorySource(noise(32 * MIB))
        with ends(kind, code):
            await sender.send("group", [to_send(source)])
        assert source.reading == 0
        assert sender._parts.pool.taken == 0
        assert sender._parts.progress.done < sender._parts.progress.size
        assert not fake.seals
    await given_back(sender, tasks)


async def test_a_data_stream_that_is_lost_ends_the_send_when_nobody_says_why(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "VERDICT_S", 0.02)
    async with Ending(tmp_path, lambda fake, peer: peer.reset()).listening() as fake:
        sender = fake.sender(workers)
        with ends(LinkError, "link.lost"):
            await sender.send("group", [to_send(MemorySource(noise(32 * MIB)))])
        assert sender._parts.pool.taken == 0


async def test_a_data_stream_that_is_lost_is_noticed_while_nothing_is_sent(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without credit nothing would ever be written to it."""
    monkeypatch.setattr(sending, "VERDICT_S", 0.02)
    async with Stingy(tmp_path, credit=0).listening() as fake:
        sender = fake.sender(workers)
        task = asyncio.ensure_future(sender.send("group", [to_send(MemorySource(noise(4 * MIB)))]))
        await until(lambda: len(fake.data) == 2 and sender._parts.pool.taken > 2)
        fake.data[0].reset()
        with ends(LinkError, "link.lost"):
            await task
        assert sender._parts.pool.taken == 0


async def test_a_source_that_fails_ends_everything_at_once_with_its_own_error(
    tmp_path: Path, workers: Workers
) -> None:
    tasks = asyncio.all_tasks()
    async with FakeTarget(tmp_path).listening() as fake:
        sender = fake.sender(workers, streams=3)
        bad = MemorySource(noise(32 * MIB), fails_at=6 * MIB)
        with ends(SourceError, "source.read_failed"):
            await sender.send("group", [to_send(MemorySource(noise(MIB)), "a"), to_send(bad, "b")])
        assert not fake.seals and sender._parts.pool.taken == 0 and bad.reading == 0
        await until(lambda: not fake.tasks)  # every stream was closed, control too
    await given_back(sender, tasks)


async def test_giving_up_does_not_wait_for_a_line_that_stalls(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CLOSE_S", 1000.0)
    async with Stingy(tmp_path, credit=64 * MIB).listening() as fake:
        task = asyncio.ensure_future(
            fake.sender(workers).send("group", [to_send(MemorySource(noise(32 * MIB)))])
        )
        await until(lambda: len(fake.frames) == 2)
        for peer in fake.peers:
            peer.stop_reading()
        task.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_a_target_that_does_not_let_us_in_is_hung_up_on(tmp_path: Path, workers: Workers) -> None:
    class Closed(FakeTarget):
        async def _serve(self, peer: Peer) -> None:
            await peer.expect(Hello)
            peer.send(Fail("identity.revoked", Retry.STOP, "revoked"))
            await peer.ended()

    async with Closed(tmp_path).listening() as fake:
        with ends(TrustError, "identity.revoked"):
            await fake.sender(workers).send("group", [to_send(MemorySource(noise(512)))])
        await until(lambda: not fake.tasks)


async def test_a_source_whose_map_fails_ends_everything_too(tmp_path: Path, workers: Workers) -> None:
    class NoMap(MemorySource):
        async def extents(self, start: int = 0):
            yield Extent(0, 2 * MIB)
            raise SourceError("source.shrank", "it shrank", cause="somebody", fix="again")

    async with FakeTarget(tmp_path).listening() as fake:
        sender = fake.sender(workers)
        with ends(SourceError, "source.shrank"):
            await sender.send("group", [to_send(NoMap(noise(4 * MIB)))])
        assert not fake.seals and sender._parts.pool.taken == 0


async def test_a_source_that_was_resized_is_not_sealed(tmp_path: Path, workers: Workers) -> None:
    class Grew(MemorySource):
        async def changed(self) -> bool:
            raise SourceError("source.grew", "it grew", cause="somebody", fix="again")

    async with FakeTarget(tmp_path).listening() as fake:
        with ends(SourceError, "source.grew"):
            await fake.sender(workers).send("group", [to_send(Grew(noise(MIB)))])
        assert not fake.seals


async def test_a_send_that_is_cancelled_gives_everything_back(tmp_path: Path, workers: Workers) -> None:
    tasks = asyncio.all_tasks()
    async with Stingy(tmp_path, credit=4 * MIB).listening() as fake:
        sender = fake.sender(workers)
        source = MemorySource(noise(32 * MIB))
        task = asyncio.ensure_future(sender.send("group", [to_send(source)]))
        await until(lambda: len(fake.frames) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sender._parts.pool.taken == 0 and source.reading == 0
    await given_back(sender, tasks)


HELD = {  # what no target can hold of a disk of a MiB
    "half a block is held": Interval(0, 512),
    "half a block is held at the start": Interval(512, 65536),
    "more than the disk is held": Interval(0, 2 * MIB),
}


class Refusing(FakeTarget):
    """Refuses at a named step."""

    def __init__(self, path: Path, step: str) -> None:
        super().__init__(path)
        self._step = step

    async def opened(self, peer: Peer, wanted: Open) -> None:
        if self._step == "open":
            peer.send(REFUSED)
        elif self._step == "one disk for two":
            peer.send(Opened(bytes(range(16)), 1, self.credit, self.coverage(wanted)[:1] * 2))
        elif self._step == "too few disks":
            peer.send(Opened(bytes(range(16)), 1, self.credit, self.coverage(wanted)[:1]))
        elif self._step in HELD:
            held = DiskCoverage(1, (HELD[self._step],))
            peer.send(Opened(bytes(range(16)), 1, self.credit, (held, self.coverage(wanted)[1])))
        else:
            await super().opened(peer, wanted)

    async def attached(self, peer: Peer) -> None:
        if self._step == "attach":
            peer.send(REFUSED)
        elif self._step == "attach, control knows why":
            peer.send(Fail("session.unknown", Retry.LATER, "there is no such session"))
            asyncio.get_running_loop().call_later(0.05, self._tell)
        else:
            await super().attached(peer)

    def _tell(self) -> None:
        with suppress(LocalProtocolError):  # told already
            control_of(self).send(REFUSED)

    async def sealing(self, peer: Peer, seal: Seal) -> None:
        if self._step == "seal":
            peer.send(REFUSED)
        elif self._step == "another epoch":
            peer.send(Sealed(bytes(16), NO_ID))
        elif self._step == "reset instead of SEALED":
            peer.reset()
        else:
            await super().sealing(peer, seal)


@pytest.mark.parametrize(
    ("step", "kind", "code"),
    [
        ("open", PeerError, "group.not_yours"),
        ("too few disks", PeerError, "peer.protocol"),
        ("one disk for two", PeerError, "peer.protocol"),
        *((step, PeerError, "peer.protocol") for step in HELD),
        ("attach", PeerError, "group.not_yours"),
        ("attach, control knows why", PeerError, "group.not_yours"),
        ("seal", PeerError, "group.not_yours"),
        ("another epoch", PeerError, "peer.protocol"),
        ("reset instead of SEALED", LinkError, "link.lost"),
    ],
)
async def test_a_refusal_at_any_step_ends_the_send(
    tmp_path: Path, workers: Workers, step: str, kind: type, code: str
) -> None:
    tasks = asyncio.all_tasks()
    async with Refusing(tmp_path, step).listening() as fake:
        sender = fake.sender(workers, streams=3)
        disks = [to_send(MemorySource(noise(MIB)), name) for name in "ab"]
        with ends(kind, code):
            await sender.send("group", disks)
    await given_back(sender, tasks)


async def test_a_message_on_a_data_stream_that_has_none_is_a_broken_protocol(
    tmp_path: Path, workers: Workers
) -> None:
    def attached_again(fake: Ending, peer: Peer) -> None:
        again = Header(FrameType.ATTACHED, 0, body_hash=xxh3_64_intdigest(b"", SEED))
        peer.write(pack(again, SEED))

    async with Ending(tmp_path, attached_again).listening() as fake:
        with ends(PeerError, "peer.protocol"):
            await fake.sender(workers).send("group", [to_send(MemorySource(noise(8 * MIB)))])


async def test_a_group_without_disks_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    async with target(tmp_path) as here:
        with ends(PeerError, "group.empty"):
            await here.sender(here.site.process_server()).send("group", [])


async def test_a_master_target_that_stops_is_a_reason_to_try_again(tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(noise(48 * MIB))
    async with target(tmp_path) as here:
        disk = await disk_of(source, here.workers, "disk")
        sender = here.sender(here.site.process_server(), level=0, streams=4)
        task = asyncio.ensure_future(sender.send("group", [disk]))
        await until(lambda: sender._parts.progress.done > 0)
        await here.acceptor.stop()
        with ends(LinkError, "link.lost"):
            await task
        assert sender._parts.pool.taken == 0
        assert (
            here.receiver.parts.pool.taken <= 4
        )  # frames that were cut off; their memory is Python's business
        await disk.source.close()
        assert not (here.path / "disk.vmdk").exists()
