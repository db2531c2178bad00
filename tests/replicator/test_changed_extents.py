"""What a list of changed extents says is believed only of the very epoch that the target holds; then nothing
else is read.
"""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from protocol.connection import Data
from protocol.messages import (
    NO_ID,
    Digests,
    DigestsWanted,
    DiskCoverage,
    Interval,
    Mode,
    Open,
    Seal,
    Sealed,
    Wanted,
)
from protocol.payload import Extent
from replicator.changes import Changes
from replicator.digest import BLOCK_BYTES, FINE_BYTES, digests_of
from replicator.errors import LinkError
from replicator.extents import Coverage
from replicator.sender import DiskToSend, Sender
from replicator.sender_state import GroupMemory
from replicator.workers import Workers
from tests.replicator.fake_target import SEED, FakeTarget, MemorySource, noise, to_send
from tests.replicator.pipeline import MIB, Peer, ends, target
from tests.replicator.pipeline import memory as remember

T = TypeVar("T")
SINCE, OTHER = b"s" * 16, b"o" * 16
SIZE = 24 * MIB + 512
OLD = noise(SIZE)


@pytest.fixture
def workers():
    with Workers(2) as made:
        yield made


class Watched(MemorySource):
    """Remembers what was read of it, and how often it was asked for its holes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.seen = Coverage()
        self.looked = 0

    async def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        self.looked += 1
        async for extent in super().extents(start):
            yield extent

    async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        for extent in extents:
            self.seen.add(extent.offset, extent.end)
        return await super().read_into(extents, view, then)


class Holding(FakeTarget):
    """Holds the old disk as the sealed epoch SINCE, clean."""

    def __init__(self, path: Path, old: bytes = OLD) -> None:
        super().__init__(path)
        self.old = bytearray(old)
        self.newest = SINCE

    def made(self, size: int) -> bytearray:
        return self.old

    async def opened(self, peer: Peer, wanted: Open) -> None:
        fits = wanted.parent == self.newest != NO_ID
        self.mode = Mode.INCREMENTAL if fits else Mode.RESYNC
        await super().opened(peer, wanted)


def changed_at(old: bytes, *places: int) -> tuple[bytes, Changes]:
    """The disk with a byte changed at each place, and the list of the blocks that hold them."""
    made, listed = bytearray(old), Coverage()
    for place in places:
        made[place] ^= 0xFF
        start = place - place % BLOCK_BYTES
        listed.add(start, min(start + BLOCK_BYTES, len(old)))
    return bytes(made), Changes(SINCE, {"disk": listed.intervals()})


def asked_of(fake: FakeTarget) -> int:
    return sum(end - start for question in fake.questions for start, end in question.intervals)


async def test_only_what_is_listed_is_read_and_asked_about(tmp_path: Path, workers: Workers) -> None:
    new, changes = changed_at(OLD, 0, 7 * MIB, 7 * MIB + 100_000, SIZE - 1)
    fake = Holding(tmp_path)
    async with fake.listening():
        sender = fake.sender(workers)
        source = Watched(new)
        outcome = await sender.send("group", [to_send(source)], changes)
        progress = sender._parts.progress
    assert bytes(fake.disks[0]) == new and not fake.broken
    assert outcome.mode is Mode.INCREMENTAL and fake.opens[0].parent == SINCE
    assert fake.opens[0].mode is Mode.INCREMENTAL
    assert source.seen.intervals() == changes.disks["disk"] and not source.looked
    assert asked_of(fake) == 3 * BLOCK_BYTES + 512
    assert {question.block for question in fake.questions} == {FINE_BYTES}
    assert 3 * FINE_BYTES + 512 <= progress.sent < 3 * FINE_BYTES + 512 + 1000
    assert progress.matched == SIZE - 3 * FINE_BYTES - 512
    assert progress.done == progress.size == SIZE


async def test_what_was_written_again_with_the_same_bytes_costs_none(
    tmp_path: Path, workers: Workers
) -> None:
    changes = Changes(SINCE, {"disk": (Interval(2 * MIB, 9 * MIB),)})
    fake = Holding(tmp_path)
    async with fake.listening():
        sender = fake.sender(workers)
        await sender.send("group", [to_send(MemorySource(OLD))], changes)
        assert bytes(fake.disks[0]) == OLD
        assert sender._parts.progress.sent < 2000


async def test_an_empty_list_says_that_nothing_has_changed(tmp_path: Path, workers: Workers) -> None:
    fake = Holding(tmp_path)
    async with fake.listening():
        source = Watched(noise(SIZE, 9))  # and is believed, against all evidence
        await fake.sender(workers).send("group", [to_send(source)], Changes(SINCE, {"disk": ()}))
    assert bytes(fake.disks[0]) == OLD
    assert not source.seen.intervals() and not source.looked and not fake.questions


@pytest.mark.parametrize("places", [3, 400, 4000])
async def test_whatever_has_changed_and_is_listed_arrives(
    tmp_path: Path, workers: Workers, seed: int, places: int
) -> None:
    rng = random.Random(seed)
    new, changes = changed_at(OLD, *(rng.randrange(SIZE) for _ in range(places)))
    async with Holding(tmp_path).listening() as fake:
        await fake.sender(workers, level=1, streams=4).send("group", [to_send(MemorySource(new))], changes)
        assert bytes(fake.disks[0]) == new and not fake.broken


async def test_the_disks_size_costs_a_window_every_4_gib(tmp_path: Path, workers: Workers) -> None:
    size = 1 << 44

    class Vast(Holding):
        def store(self, data: Data) -> list[Extent]:
            return []

        async def asked(self, peer: Peer, wanted: DigestsWanted) -> None:
            blocks = sum(-(-(end - start) // wanted.block) for start, end in wanted.intervals)
            peer.send(Digests(wanted.request, wanted.intervals, (), bytes(16 * blocks)))

    class Endless(Watched):
        async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
            for extent in extents:
                self.seen.add(extent.offset, extent.end)
            view[:] = noise(len(view))
            return then()

    listed = tuple(
        Interval(start, start + BLOCK_BYTES) for start in (0, 1 << 40, (1 << 43) + 7 * BLOCK_BYTES)
    )
    source = Endless(b"")
    source.size_bytes = size
    fake = Vast(tmp_path, b"")
    async with fake.listening():
        sender = fake.sender(workers)
        await sender.send("group", [to_send(source)], Changes(SINCE, {"disk": listed}))
        assert sender._parts.progress.done == size
    assert source.seen.intervals() == listed and not source.looked
    assert len(fake.frames) == size >> 32


# ------------------------------------------------------------------ when it is not believed


@pytest.mark.parametrize(
    ("newest", "clean", "why"),
    [
        (OTHER, True, f"since epoch {SINCE.hex()}, but the target's newest is {OTHER.hex()}"),
        (NO_ID, True, f"since epoch {SINCE.hex()}, but the target has sealed none"),
        (SINCE, False, "but the target's images are new or may hold something else"),
    ],
)
async def test_a_list_since_another_epoch_is_not_used_and_that_is_told_once(
    tmp_path: Path, workers: Workers, newest: bytes, clean: bool, why: str
) -> None:
    class Dirty(Holding):
        async def opened(self, peer: Peer, wanted: Open) -> None:
            await super().opened(peer, wanted if clean else wanted_from_nobody(wanted))
            if len(self.opens) == 1:
                peer.reset()

    def wanted_from_nobody(wanted: Open) -> Open:
        return Open(wanted.group, b"", wanted.epoch, NO_ID, wanted.mode, wanted.consistency, 0, wanted.disks)

    new, changes = changed_at(OLD, 0, 7 * MIB)
    changes = Changes(SINCE, {"disk": changes.disks["disk"][:1]})  # it does not list all that differs
    told: list[str] = []
    fake = Dirty(tmp_path)
    fake.newest = newest
    async with fake.listening():
        sender = fake.sender(workers)
        sender._tell = told.append
        disks = [to_send(MemorySource(new))]
        with ends(LinkError, "link.lost"):
            await sender.send("group", disks, changes)
        outcome = await sender.send("group", disks, changes)
        assert bytes(fake.disks[0]) == new
        assert outcome.mode is Mode.RESYNC
    assert len(told) == 1 and why in told[0]


async def test_a_new_image_takes_everything_whatever_is_listed(tmp_path: Path) -> None:
    told: list[str] = []
    async with target(tmp_path) as here:
        sender = here.sender(here.site.process_server(), level=0)
        sender._tell = told.append
        outcome = await sender.send("group", [to_send(MemorySource(OLD))], Changes(SINCE, {"disk": ()}))
        assert outcome.mode is Mode.FULL and here.flat("disk") == OLD
    assert len(told) == 1 and "has sealed none" in told[0]


# ------------------------------------------------------------------ the digest map afterwards


def map_of(memory: GroupMemory) -> bytes | None:
    maps = memory.open_maps(memory.load(), {"disk": SIZE}, SEED)
    if not maps:
        return None
    found = maps["disk"].digests(0, SIZE)
    maps["disk"].close()
    return found


async def test_the_map_of_the_epoch_before_is_carried_on(tmp_path: Path, workers: Workers) -> None:
    fake, memory = Holding(tmp_path), remember(tmp_path / "state")
    fake.newest = NO_ID
    async with fake.listening():
        sender = fake.sender(workers, memory=memory)
        first = await sender.send("group", [to_send(MemorySource(OLD))])
        assert map_of(memory) == digests_of(memoryview(OLD), SEED)
        fake.newest = first.epoch
        new, changes = changed_at(OLD, 3 * MIB, 20 * MIB)
        source = Watched(new)
        second = await sender.send("group", [to_send(source)], Changes(first.epoch, changes.disks))
        assert source.seen.intervals() == changes.disks["disk"]
        assert map_of(memory) == digests_of(memoryview(new), SEED)
        fake.newest = second.epoch
        later, _ = changed_at(new, 5 * MIB)
        asked = asked_of(fake)
        third = await sender.send("group", [to_send(MemorySource(later))])
        assert third.mode is Mode.INCREMENTAL and bytes(fake.disks[0]) == later
        assert asked_of(fake) - asked == BLOCK_BYTES  # the map knew all the rest


async def test_without_a_map_of_that_epoch_the_next_send_compares_once(
    tmp_path: Path, workers: Workers
) -> None:
    fake, memory = Holding(tmp_path), remember(tmp_path / "state")
    async with fake.listening():
        sender = fake.sender(workers, memory=memory)
        new, changes = changed_at(OLD, 3 * MIB)
        first = await sender.send("group", [to_send(MemorySource(new))], changes)
        assert first.mode is Mode.INCREMENTAL and map_of(memory) is None
        fake.newest = first.epoch
        listed = {"disk": (Interval(0, BLOCK_BYTES),)}
        again = await sender.send("group", [to_send(MemorySource(new))], Changes(first.epoch, listed))
        assert again.mode is Mode.INCREMENTAL and map_of(memory) is None  # a list needs no map
        fake.newest = again.epoch
        second = await sender.send("group", [to_send(MemorySource(new))])
        assert second.mode is Mode.RESYNC and map_of(memory) == digests_of(memoryview(new), SEED)
        fake.newest = second.epoch
        third = await sender.send("group", [to_send(MemorySource(new))])
        assert third.mode is Mode.INCREMENTAL


async def test_a_stale_list_does_not_make_a_good_map_useless(tmp_path: Path, workers: Workers) -> None:
    fake, memory = Holding(tmp_path), remember(tmp_path / "state")
    fake.newest = NO_ID
    async with fake.listening():
        sender = fake.sender(workers, memory=memory)
        first = await sender.send("group", [to_send(MemorySource(OLD))])
        fake.newest = first.epoch
        new, _ = changed_at(OLD, 3 * MIB)
        outcome = await sender.send("group", [to_send(MemorySource(new))], Changes(OTHER, {"disk": ()}))
        assert outcome.mode is Mode.INCREMENTAL and bytes(fake.disks[0]) == new


# ------------------------------------------------------------------ breaks, and what is wanted again


async def test_what_is_wanted_again_is_read_from_the_list_alone(tmp_path: Path, workers: Workers) -> None:
    class Wanting(Holding):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.left = [Interval(0, SIZE), Interval(7 * MIB, 8 * MIB), Interval(10 * MIB, 11 * MIB)]
            self.missing = Coverage()
            self.seal = NO_ID

        async def arrived(self, peer: Peer, data: Data) -> None:
            await super().arrived(peer, data)
            if self.seal != NO_ID:
                self.missing.remove(data.header.cover_start, data.header.cover_end)
                self.go_on()

        async def sealing(self, peer: Peer, seal: Seal) -> None:
            self.seal = seal.epoch
            self.go_on()

        def go_on(self) -> None:
            assert self.control is not None
            if self.missing.intervals():
                return
            if self.left:
                stretch = self.left.pop()
                self.missing.add(*stretch)
                self.control.send(Wanted(1, *stretch))
            else:
                self.control.send(Sealed(self.seal, NO_ID))

    new, changes = changed_at(OLD, 0, 7 * MIB)
    fake = Wanting(tmp_path)
    async with fake.listening():
        source = Watched(new)
        sender = fake.sender(workers)
        await sender.send("group", [to_send(source)], changes)
    assert bytes(fake.disks[0]) == new and not fake.broken
    assert source.seen.intervals() == changes.disks["disk"]
    assert asked_of(fake) == 2 * BLOCK_BYTES  # nothing could be asked any more once SEAL was out
    assert sender._parts.progress.resent < 3 * BLOCK_BYTES + 1000


@pytest.mark.parametrize("process", ["the same", "a new one"])
async def test_after_a_break_what_is_missing_is_read_from_the_list_alone(
    tmp_path: Path, workers: Workers, process: str
) -> None:
    class Breaking(Holding):
        held: tuple[Interval, ...] = ()

        def coverage(self, wanted: Open) -> tuple[DiskCoverage, ...]:
            return (DiskCoverage(1, self.held),)

        async def sealing(self, peer: Peer, seal: Seal) -> None:
            if not self.held:
                self.held = (Interval(8 * MIB, SIZE),)
                self.old = self.disks[0]
                peer.reset()
            else:
                await super().sealing(peer, seal)

    new, changes = changed_at(OLD, 0, 7 * MIB, 20 * MIB)
    fake, memory = Breaking(tmp_path), remember(tmp_path / "state")
    sources = [Watched(new), Watched(new)]

    def disks(number: int) -> list[DiskToSend]:
        return [to_send(sources[number])]

    async with fake.listening():
        sender: Sender = fake.sender(workers, memory=memory)
        with ends(LinkError, "link.lost"):
            await sender.send("group", disks(0), changes)
        if process == "a new one":
            sender.close()
            sender = fake.sender(workers, memory=memory)
        sources[0].seen = Coverage()
        outcome = await sender.send("group", disks(1), changes)
        assert outcome.epoch == fake.opens[0].epoch == fake.opens[1].epoch
        assert bytes(fake.disks[0]) == new
    read = sources[0] if process == "the same" else sources[1]
    assert read.seen.intervals() == changes.disks["disk"][:2]
