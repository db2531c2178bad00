"""What the target wants again is sent again: in the same session, however late, and nothing else with it."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from protocol.connection import Data
from protocol.constants import HEADER_BYTES
from protocol.messages import NO_ID, Ack, DiskCoverage, Interval, Mode, Open, Opened, Seal, Sealed, Wanted
from protocol.payload import DataFrame, Extent
from replicator import sending
from replicator.digest import BLOCK_BYTES, digests_of
from replicator.errors import LinkError, PeerError
from replicator.extents import Coverage, Relation
from replicator.packing import Packed, pack
from replicator.workers import Workers
from tests.replicator.fake_target import SEED, SESSION, FakeTarget, MemorySource, noise, to_send
from tests.replicator.pipeline import MIB, Peer, ends, target, turns, until, with_raw_hash
from tests.replicator.pipeline import memory as remember

Want = tuple[int, int, int]


@pytest.fixture
def workers():
    with Workers(2) as made:
        yield made


def wire_bytes(*frames: Data) -> int:
    return sum(HEADER_BYTES + frame.header.body_len for frame in frames)


class Wanting(FakeTarget):
    """Keeps the books of every stretch, and wants things again as it is told.

    Attributes:
        at_arrival: for an arriving frame, what is wanted again instead of acknowledging it.
        at_seal: what is wanted, one after the other, before SEALED.
        wanted: what was wanted so far; `again`: frames that came for it.
    """

    def __init__(self, path: Path, credit: int = 64 * MIB) -> None:
        super().__init__(path, credit)
        self.at_arrival: Callable[[Data], bool] = lambda data: False
        self.at_seal: list[Want] = []
        self.claims: dict[int, Coverage] = {}
        self.whole: dict[int, int] = {}
        self.seal: Seal | None = None
        self.wanted: list[Want] = []
        self.again: list[Data] = []
        self.held: dict[int, tuple[Interval, ...]] = {}

    def coverage(self, wanted: Open) -> tuple[DiskCoverage, ...]:
        self.seal = None
        numbers = range(1, len(wanted.disks) + 1)
        self.claims = {number: Coverage(self.held.get(number, ())) for number in numbers}
        self.whole = {number: disk.size for number, disk in zip(numbers, wanted.disks, strict=True)}
        return tuple(DiskCoverage(number, self.held.get(number, ())) for number in numbers)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Self]:
        async with super().listening():
            yield self
            assert not self.broken

    def want(self, disk: int, start: int, end: int) -> None:
        assert self.control is not None
        self.claims[disk].remove(start, end)
        self.wanted.append((disk, start, end))
        self.control.send(Wanted(disk, start, end))

    async def arrived(self, peer: Peer, data: Data) -> None:
        header = data.header
        cover = Interval(header.cover_start, header.cover_end)
        claims = self.claims[header.disk]
        assert claims.relation(*cover) is Relation.NEW, f"{cover} was covered already"
        claims.add(*cover)
        if any(
            disk == header.disk and start <= cover.start and cover.end <= end
            for disk, start, end in self.wanted
        ):
            self.again.append(data)
        if self.at_arrival(data):
            self.want(header.disk, *cover)
            self.acknowledge(grant=wire_bytes(data))
            return
        self.store(data)
        self.acknowledge(data)
        if self.seal is not None:
            self.go_on()

    async def sealing(self, peer: Peer, seal: Seal) -> None:
        whole = (DiskCoverage(disk, (Interval(0, size),)) for disk, size in self.whole.items())
        assert seal.disks == tuple(whole), "SEAL came before everything was acknowledged"
        self.seal = seal
        self.go_on()

    def go_on(self) -> None:
        """Want the next stretch; with none left and everything here, the epoch is sealed."""
        assert self.control is not None and self.seal is not None
        if not all(self.claims[disk].is_whole(size) for disk, size in self.whole.items()):
            return
        if self.at_seal:
            self.want(*self.at_seal.pop(0))
        else:
            self.control.send(Sealed(self.seal.epoch, NO_ID))


def frames_to_want(rng: random.Random, times: int) -> Callable[[Data], bool]:
    """Each cover up to so many times, by chance."""
    left: dict[tuple[int, int], int] = {}

    def decide(data: Data) -> bool:
        place = data.header.disk, data.header.cover_start
        left.setdefault(place, rng.randrange(times + 1))
        left[place] -= 1
        return left[place] >= 0

    return decide


@pytest.mark.parametrize("streams", [1, 4])
async def test_what_is_damaged_is_sent_again_until_it_is_whole(
    tmp_path: Path, workers: Workers, seed: int, streams: int
) -> None:
    disks = [noise(9 * MIB + 512, 1), noise(MIB, 2) + bytes(3 * MIB) + noise(3 * MIB, 3)]
    fake = Wanting(tmp_path, credit=4 * MIB)
    fake.at_arrival = frames_to_want(random.Random(seed), 3)
    async with fake.listening():
        sender = fake.sender(workers, streams=streams)
        sources = [to_send(MemorySource(data), name) for data, name in zip(disks, "ab", strict=True)]
        outcome = await sender.send("group", sources)
        progress = sender._parts.progress
    assert [bytes(disk) for disk in fake.disks] == disks
    assert fake.wanted and len(fake.seals) == 1 and outcome.epoch == fake.seals[0].epoch
    assert progress.resent == wire_bytes(*fake.again) > 0
    assert progress.sent == wire_bytes(*fake.frames)
    assert progress.done == progress.size == sum(map(len, disks))
    assert progress.read == sum(map(len, disks))  # what is read for the second time is not read anew
    assert progress.zero == 3 * MIB
    assert sender._parts.pool.taken == 0


async def test_what_was_acknowledged_may_be_wanted_still(tmp_path: Path, workers: Workers) -> None:
    """It is no longer counted as done until it is there again."""
    fake = Wanting(tmp_path)
    seen: list[int] = []

    class Late(MemorySource):
        async def read_into(self, extents, view, then):
            if extents[0].offset >= 6 * MIB and not fake.wanted:
                await until(acknowledged)
                before = sender._parts.progress.done
                fake.want(1, MIB, 3 * MIB)
                await until(lambda: sender._parts.progress.done == before - 2 * MIB)
                seen.append(before)
            return await super().read_into(extents, view, then)

    def acknowledged() -> bool:
        assert sender._epoch is not None
        return sender._epoch.disks[0].durable.relation(MIB, 3 * MIB) is Relation.COVERED

    data = noise(8 * MIB)
    async with fake.listening():
        sender = fake.sender(workers)
        await sender.send("group", [to_send(Late(data))])
        assert bytes(fake.disks[0]) == data and seen
        assert sender._parts.progress.done == len(data)
        assert sorted(frame.header.cover_start for frame in fake.again[-2:]) == [MIB, 2 * MIB]


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.RESYNC])
async def test_a_seal_stays_in_force_while_something_is_wanted(
    tmp_path: Path, workers: Workers, mode: Mode
) -> None:
    """Several times, in parts of frames and over several of them, and of stretches that were never said."""
    data = noise(20 * MIB) + bytes(8 * MIB) + noise(512)
    fake = Wanting(tmp_path)
    fake.mode = mode
    fake.at_seal = [
        (1, 0, BLOCK_BYTES),
        (1, 0, len(data)),
        (1, 5 * MIB - BLOCK_BYTES, 7 * MIB),
        (1, 20 * MIB, 28 * MIB),
        (1, 28 * MIB, len(data)),
        (1, 28 * MIB, len(data)),
    ]
    expected = list(fake.at_seal)
    if mode is Mode.RESYNC:
        fake.made = lambda size: bytearray(data[: 4 * MIB]) + bytearray(size - 4 * MIB)  # type: ignore[method-assign]
    async with fake.listening():
        sender = fake.sender(workers)
        source = MemorySource(data, zeros=[Interval(21 * MIB, 27 * MIB)])
        await sender.send("group", [to_send(source)])
        assert bytes(fake.disks[0]) == data
        assert fake.wanted == expected and len(fake.seals) == 1
        assert sender._parts.progress.resent == wire_bytes(*fake.again)
        assert sender._parts.progress.done == len(data)
    covered = Coverage()
    for frame in fake.again:
        covered.add(frame.header.cover_start, frame.header.cover_end)
    assert covered.intervals() == (Interval(0, len(data)),)
    # Once SEAL is out nothing may be asked any more: what is sent again is all that is there.
    said = sum(frame.header.raw_len for frame in fake.again)
    assert said == 20 * MIB + 512 + BLOCK_BYTES + 2 * MIB + BLOCK_BYTES + 512 + 512


async def test_before_the_seal_a_wanted_stretch_is_compared_again(tmp_path: Path, workers: Workers) -> None:
    data = noise(16 * MIB)
    fake = Wanting(tmp_path)
    fake.mode = Mode.RESYNC
    old = bytearray(data)
    old[3 * MIB] ^= 1
    fake.made = lambda size: bytearray(old)  # type: ignore[method-assign]
    fake.at_arrival = lambda data: not fake.wanted
    async with fake.listening():
        sender = fake.sender(workers)
        await sender.send("group", [to_send(MemorySource(data))])
        assert bytes(fake.disks[0]) == data
        (again,) = fake.again
        assert again.header.raw_len == 4096 and len(fake.questions) == 4
        assert sender._parts.progress.matched == len(data) - 4096


async def test_only_what_is_wanted_of_a_vast_hole_costs_anything(tmp_path: Path, workers: Workers) -> None:
    size = 1 << 40

    class Vast(Wanting):
        def made(self, size: int) -> bytearray:
            return bytearray()

        def store(self, data: Data) -> list[Extent]:
            return []

    source = MemorySource(b"", zeros=[Interval(0, size)])
    source.size_bytes = size
    fake = Vast(tmp_path)
    fake.at_seal = [(1, 1 << 32, 1 << 39), (1, 0, size)]
    async with fake.listening():
        sender = fake.sender(workers)
        await sender.send("group", [to_send(source)])
        assert sender._parts.progress.resent < 50_000
        assert sender._parts.progress.done == size


async def test_what_the_target_held_from_before_may_be_wanted_and_is_sent_once(
    tmp_path: Path, workers: Workers
) -> None:
    """Even before the packers have come to that disk."""
    disks = [noise(12 * MIB, 1), noise(4 * MIB, 2)]

    class Holding(Wanting):
        def made(self, size: int) -> bytearray:
            return bytearray(disks[1]) if size == len(disks[1]) else super().made(size)

        async def attached(self, peer: Peer) -> None:
            await super().attached(peer)
            if not self.wanted:
                self.want(2, MIB, 2 * MIB)

    fake = Holding(tmp_path)
    fake.held = {2: (Interval(0, 4 * MIB),)}
    async with fake.listening():
        sources = [to_send(MemorySource(data), name) for data, name in zip(disks, "ab", strict=True)]
        await fake.sender(workers).send("group", sources)
    assert [bytes(disk) for disk in fake.disks] == disks
    second = [frame.header for frame in fake.frames if frame.header.disk == 2]
    assert [(header.cover_start, header.cover_end) for header in second] == [(MIB, 2 * MIB)]


@pytest.mark.parametrize("when", ["while sending", "while sealing"])
async def test_what_was_wanted_as_the_line_broke_is_missing_in_the_next_session(
    tmp_path: Path, workers: Workers, when: str
) -> None:
    data = noise(10 * MIB)

    class Breaking(Wanting):
        kept: bytearray | None = None

        def made(self, size: int) -> bytearray:
            return self.kept if self.kept is not None else super().made(size)

        def broken_off(self) -> None:
            for cover in list(self.claims[1].intervals()):
                self.held[1] = (*self.held.get(1, ()), cover)
            self.kept = self.disks[0]
            for peer in self.peers:
                peer.reset()

        async def arrived(self, peer: Peer, data: Data) -> None:
            if self.kept is None and self.wanted:
                return  # it gets lost
            await super().arrived(peer, data)
            if when == "while sending" and self.kept is None and len(self.frames) == 4:
                self.want(1, data.header.cover_start, data.header.cover_end)
                self.broken_off()

        async def sealing(self, peer: Peer, seal: Seal) -> None:
            if self.kept is None:
                self.want(1, 3 * MIB, 5 * MIB)
                self.broken_off()
            else:
                await super().sealing(peer, seal)

    fake = Breaking(tmp_path)
    async with fake.listening():
        sender = fake.sender(workers)
        disks = [to_send(MemorySource(data))]
        with ends(LinkError, "link.lost"):
            await sender.send("group", disks)
        first, fake.frames[:] = list(fake.frames), []
        await sender.send("group", disks)
        assert bytes(fake.disks[0]) == data
        assert fake.opens[0].epoch == fake.opens[1].epoch
    missing = sum(frame.header.cover_end - frame.header.cover_start for frame in fake.frames)
    if when == "while sealing":
        assert missing == 2 * MIB
    else:
        assert missing == len(data) - 3 * MIB and len(first) >= 4


NONSENSE: dict[str, Want] = {
    "of a disk that there is not": (2, 0, BLOCK_BYTES),
    "behind the disk's end": (1, 4 * MIB, 4 * MIB + BLOCK_BYTES),
    "over the disk's end": (1, 3 * MIB, 5 * MIB),
    "nothing": (1, MIB, MIB),
    "backwards": (1, 2 * MIB, MIB),
    "from inside a block": (1, 512, BLOCK_BYTES),
    "up to inside a block": (1, 0, 512),
}


@pytest.mark.parametrize("state", ["open", "sealing"])
@pytest.mark.parametrize("how", NONSENSE)
async def test_nonsense_is_a_broken_protocol(tmp_path: Path, workers: Workers, how: str, state: str) -> None:
    class Nonsense(FakeTarget):
        async def arrived(self, peer: Peer, data: Data) -> None:
            await super().arrived(peer, data)
            if state == "open" and self.control is not None and len(self.frames) == 3:
                self.control.send(Wanted(*NONSENSE[how]))

        async def sealing(self, peer: Peer, seal: Seal) -> None:
            peer.send(Wanted(*NONSENSE[how]))

    async with Nonsense(tmp_path).listening() as fake:
        sender = fake.sender(workers)
        with ends(PeerError, "peer.protocol"):
            await sender.send("group", [to_send(MemorySource(noise(4 * MIB)))])
        assert sender._parts.pool.taken == 0


async def test_what_was_never_sent_cannot_be_wanted_again(tmp_path: Path, workers: Workers) -> None:
    class Early(FakeTarget):
        async def opened(self, peer: Peer, wanted: Open) -> None:
            peer.send(Opened(SESSION, 1, 0, self.coverage(wanted), self.mode, self.newest))
            peer.send(Wanted(1, 0, BLOCK_BYTES))

    async with Early(tmp_path).listening() as fake:
        with ends(PeerError, "peer.protocol"):
            await fake.sender(workers).send("group", [to_send(MemorySource(noise(4 * MIB)))])


async def test_what_is_wanted_already_cannot_be_wanted_again(tmp_path: Path, workers: Workers) -> None:
    class Twice(Wanting):
        async def sealing(self, peer: Peer, seal: Seal) -> None:
            peer.send(Wanted(1, 0, MIB))
            peer.send(Wanted(1, 0, BLOCK_BYTES))

    async with Twice(tmp_path).listening() as fake:
        with ends(PeerError, "peer.protocol"):
            await fake.sender(workers).send("group", [to_send(MemorySource(noise(4 * MIB)))])


async def test_what_was_not_sent_cannot_be_acknowledged(tmp_path: Path, workers: Workers) -> None:
    class Generous(FakeTarget):
        async def arrived(self, peer: Peer, data: Data) -> None:
            self.sequence += 1
            every = DiskCoverage(1, (Interval(0, 64 * MIB),))
            assert self.control is not None
            self.control.send(Ack(self.sequence, self.credit, (every,)))

    async with Generous(tmp_path, credit=8 * MIB).listening() as fake:
        with ends(PeerError, "peer.protocol"):
            await fake.sender(workers).send("group", [to_send(MemorySource(noise(64 * MIB)))])
        assert not fake.seals


async def test_an_epoch_is_not_sealed_while_something_of_it_is_wanted(
    tmp_path: Path, workers: Workers
) -> None:
    class Hasty(FakeTarget):
        async def sealing(self, peer: Peer, seal: Seal) -> None:
            peer.send(Wanted(1, 0, 4 * MIB))
            peer.send(Sealed(seal.epoch, NO_ID))

    async with Hasty(tmp_path, credit=4 * MIB + 4096).listening() as fake:
        with ends(PeerError, "peer.protocol"):
            await fake.sender(workers).send("group", [to_send(MemorySource(noise(4 * MIB)))])


async def test_a_machine_that_damages_everything_is_given_up(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "WANTED_MAX", 20)
    fake = Wanting(tmp_path)
    fake.at_arrival = lambda data: True
    async with fake.listening():
        sender = fake.sender(workers)
        with ends(PeerError, "peer.damaged_frames"):
            await sender.send("group", [to_send(MemorySource(noise(4 * MIB)))])
        assert len(fake.wanted) >= 20 and not fake.seals
        assert sender._parts.pool.taken == 0


async def test_the_real_target_has_damaged_frames_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Memory that rots between reading and sending: the frame's own hash of its content does not hold."""
    rng = random.Random(seed)
    damaged: list[DataFrame] = []

    def rotting(*how: Any) -> Packed:
        packed = pack(*how)
        if not damaged or rng.random() < 0.3:
            damaged.append(packed.frame)
            frame = with_raw_hash(packed.frame, packed.frame.header.raw_hash ^ 1, how[5])
            return replace(packed, frame=frame)
        return packed

    monkeypatch.setattr("replicator.framing.pack", rotting)
    first = noise(20 * MIB) + bytes(4 * MIB)
    second = bytearray(first)
    for place in range(0, len(second), MIB):
        second[place] ^= 0xFF
    async with target(tmp_path) as here:
        sender = here.sender(here.site.process_server(), level=1, memory=here.memory())
        for mode, data in ((Mode.FULL, first), (Mode.INCREMENTAL, bytes(second))):
            outcome = await sender.send("group", [to_send(MemorySource(data))])
            await here.applied()
            assert outcome.mode is mode and here.flat("disk") == data
            assert damaged and sender._parts.progress.resent > 0
            assert sender._parts.pool.taken == 0
            damaged.clear()


# ------------------------------------------------------------------ a source that does not stay


async def test_a_source_that_moved_after_the_seal_is_sealed_anew_as_fuzzy(
    tmp_path: Path, workers: Workers
) -> None:
    """The first SEAL promised that nothing had changed: what is read after the change must not go with it."""
    source = MemorySource(noise(4 * MIB))

    class Moving(Wanting):
        kept: bytearray | None = None

        def made(self, size: int) -> bytearray:
            return self.kept if self.kept is not None else super().made(size)

        async def sealing(self, peer: Peer, seal: Seal) -> None:
            if self.kept is None:
                source.data = noise(4 * MIB, 7)
                source.is_changed = True
                self.want(1, MIB, 2 * MIB)
                self.held[1] = self.claims[1].intervals()
                self.kept = self.disks[0]
            else:
                self.at_seal = [(1, 0, MIB)]  # a fuzzy SEAL promises nothing that this could break
                await super().sealing(peer, seal)

    fake, memory = Moving(tmp_path), remember(tmp_path / "state")
    async with fake.listening():
        sender = fake.sender(workers, memory=memory)
        outcome = await sender.send("group", [to_send(source)])
        assert [seal.fuzzy for seal in fake.seals] == [False, True]
        assert outcome.changed and fake.opens[0].epoch == fake.opens[1].epoch == outcome.epoch
        assert len(fake.frames) == 6  # of the first session's answer to WANTED nothing went out
        assert sender._parts.pool.taken == 0
        maps = memory.open_maps(memory.load(), {"disk": 4 * MIB}, SEED)
        # The map says what the target holds, not what either reading alone has seen.
        assert maps["disk"].digests(0, 4 * MIB) == digests_of(memoryview(fake.disks[0]), SEED)
        maps["disk"].close()


async def test_what_is_wanted_while_the_sources_are_looked_at_is_waited_for(
    tmp_path: Path, workers: Workers
) -> None:
    """SEAL goes out when all is whole, not when it was a moment ago."""
    fake = Wanting(tmp_path)

    class Looked(MemorySource):
        async def changed(self) -> bool:
            if not fake.wanted:
                fake.want(1, 0, MIB)
                await until(lambda: sender._parts.progress.done < 4 * MIB)
            return self.is_changed

    async with fake.listening():
        sender = fake.sender(workers)
        source = Looked(noise(4 * MIB))
        await sender.send("group", [to_send(source)])
        assert len(fake.frames) == 5 and len(fake.seals) == 1


async def test_what_is_sealed_is_done_acknowledged_or_not(tmp_path: Path, workers: Workers) -> None:
    class Terse(Wanting):
        def acknowledge(self, *frames: Data, grant: int | None = None) -> None:
            if not self.seals:
                super().acknowledge(*frames, grant=grant)

    fake = Terse(tmp_path)
    fake.at_seal = [(1, MIB, 3 * MIB)]
    async with fake.listening():
        sender = fake.sender(workers)
        await sender.send("group", [to_send(MemorySource(noise(4 * MIB)))])
        assert sender._parts.progress.done == 4 * MIB


async def test_giving_up_while_sealing_leaves_nothing_behind(tmp_path: Path, workers: Workers) -> None:
    class Silent(Wanting):
        async def sealing(self, peer: Peer, seal: Seal) -> None:
            self.want(1, 0, 4 * MIB)

        async def arrived(self, peer: Peer, data: Data) -> None:
            if not self.wanted:
                await super().arrived(peer, data)

    tasks = asyncio.all_tasks()
    async with Silent(tmp_path, credit=4 * MIB + 1024).listening() as fake:
        sender = fake.sender(workers)
        task = asyncio.ensure_future(sender.send("group", [to_send(MemorySource(noise(4 * MIB)))]))
        await until(lambda: bool(fake.wanted) and sender._parts.pool.taken > 0)
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sender._parts.pool.taken == 0
    await until(lambda: not asyncio.all_tasks() - tasks)
