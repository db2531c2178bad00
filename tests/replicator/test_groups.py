"""Groups in hand: what an OPEN waits for, and what whoever waits is told."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from protocol.messages import Consistency, Mode, Open, OpenDisk
from replicator import groups
from replicator.clock import Clock
from replicator.errors import ReplicatorError
from replicator.files import Files
from replicator.groups import GroupInHand, Groups
from replicator.holding import Holding
from replicator.images.directory import ImageDirectory
from replicator.log.log import Log
from replicator.plan import Action
from replicator.private_directory import PrivateDirectory
from replicator.workers import Workers
from tests.faults.oracle import KIB, SIZES, Oracle, Source
from tests.faults.story import GROUP, HASH_SEED, OWNER, SEGMENT_BYTES, Machine, Story, id_of
from tests.faults.test_file_systems import disk as volume
from tests.replicator.pipeline import turns


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log begins a new segment after a few frames: else nothing could be applied early."""
    for make in (Log.create, Log.open):
        monkeypatch.setitem(make.__func__.__kwdefaults__, "segment_bytes", SEGMENT_BYTES)  # type: ignore[attr-defined]


def nothing(self: Holding, *args: object) -> bool:
    """In the place of `apply_next`: it finds nothing to do."""
    return False


class Place:
    """Groups over two folders, and a source that knows what its disks held at each epoch."""

    def __init__(self, path: Path, workers: Workers, seed: int) -> None:
        (path / "disks").mkdir()
        self.source = Source(seed)
        self._path = path
        retention = PrivateDirectory(Files(), path / "retention")
        self._images = ImageDirectory(Files(), path / "disks", retention, thin=True)
        self.groups = Groups(self._images, retention, workers, HASH_SEED, Clock())
        self._machine = Machine(path, Files())
        self._story = Story(self._machine, Oracle(seed), self.source, random.Random(seed))

    async def open(self, epoch: int, parent: int | None = None) -> GroupInHand:
        """What OPEN does."""
        disks = tuple(OpenDisk(name, size, 1) for name, size in SIZES.items())
        ids = id_of(epoch), id_of(parent)
        return await self.groups.open(OWNER, Open(GROUP, b"", *ids, Mode.FULL, Consistency.CRASH, 0, disks))

    async def send(self, epoch: int, parent: int | None = None) -> GroupInHand:
        """What is missing of an epoch, not sealed."""
        group = await self.open(epoch, parent)
        for disk, extents, payload, frame in list(self._story.frames(group.holding, epoch, parent)):
            group.holding.store(disk, extents, payload)
            await group.commit([frame])
        return group

    async def seal(self, epoch: int, parent: int | None = None) -> GroupInHand:
        """A whole epoch, sealed; what waits to be applied is the applier's."""
        group = await self.send(epoch, parent)
        await group.seal(False)
        return group

    def images(self) -> dict[str, bytes]:
        """What the images hold."""
        return {name: (self._path / "disks" / f"{name}-flat.vmdk").read_bytes() for name in SIZES}

    def clean(self) -> bool:
        """Whether every image says that it is whole."""
        return self._images.settled(SIZES)

    def close(self) -> None:
        self._machine.close()
        self._images.close()


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers() as made:
        yield made


@pytest.fixture
async def place(tmp_path: Path, workers: Workers, seed: int) -> AsyncIterator[Place]:
    made = Place(tmp_path, workers, seed)
    yield made
    await made.groups.stop()
    made.close()


async def test_who_opens_a_sealed_epoch_while_a_later_one_is_half_in_the_images_gets_images_that_hold_it(
    place: Place,
) -> None:
    await place.seal(0)
    await (await place.seal(1, 0)).applied()
    later = await place.send(2, 1)
    while await asyncio.to_thread(later.holding.apply_next, True):
        pass
    assert place.images() != place.source.at(1), "nothing was applied early"
    later.leave()
    asked = await place.open(1)
    assert asked.holding.group.decision.action is Action.UP_TO_DATE
    assert place.images() == place.source.at(1)
    assert place.clean()
    asked.leave()
    await (await place.seal(2, 1)).applied()  # it was given up: it is sent again
    assert place.images() == place.source.at(2)


async def test_who_opens_a_sealed_epoch_is_answered_when_it_is_applied_whatever_was_begun_since(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.seal(0)
    with monkeypatch.context() as patched:
        patched.setattr(Holding, "apply_next", nothing)
        await place.seal(1, 0)
        (await place.open(2, 1)).leave()
        asking = asyncio.create_task(place.open(1))
        await turns()
        assert not asking.done()
    await asking
    assert place.images() == place.source.at(1)
    assert place.clean()


async def test_who_gives_up_waiting_for_a_sealed_epoch_lets_go_of_the_group(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.seal(0)
    with monkeypatch.context() as patched:
        patched.setattr(Holding, "apply_next", nothing)
        (await place.seal(1, 0)).leave()
        asking = asyncio.create_task(place.open(1))
        while not place.groups._in_hand:
            await turns()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    while place.groups._in_hand:
        await turns()
    await place.open(1)
    assert place.images() == place.source.at(1)


async def test_a_defect_of_the_applier_is_told_once_to_who_waits_for_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await place.seal(0)
    calls = []

    def defective(self: Holding, *args: object) -> bool:
        calls.append(args)
        raise ZeroDivisionError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr(Holding, "apply_next", defective)
        group = await place.seal(1, 0)
        with pytest.raises(ZeroDivisionError):
            await group.applied()
        assert len(calls) == 1
        assert "ZeroDivisionError" in caplog.text
        group.leave()
    await (await place.open(1)).applied()  # opened anew, it is tried again
    assert place.images() == place.source.at(1)


async def test_an_epoch_that_follows_another_than_the_newest_is_told_with_both_histories(
    place: Place,
) -> None:
    await place.seal(0)
    await place.seal(1, 0)
    group = await place.open(2, 0)
    assert group.holding.group.epochs.mode is Mode.RESYNC
    diverged = group.holding.group.decision.diverged
    assert diverged is not None
    assert (diverged.sender, diverged.target) == ((id_of(0), id_of(2)), (id_of(0), id_of(1)))


async def test_images_that_somebody_else_wrote_to_are_the_reason_that_is_told(place: Place) -> None:
    await (await place.seal(0)).applied()
    await place.groups.stop()
    flat = place._path / "disks" / "one-flat.vmdk"
    with flat.open("r+b") as file:
        file.write(b"x" * 512)
    decision = (await place.open(1, 0)).holding.group.decision
    assert "were changed since" in decision.why
    assert decision.diverged is None


async def test_an_epoch_id_of_the_past_is_refused(place: Place) -> None:
    await place.seal(0)
    await (await place.seal(1, 0)).applied()
    with pytest.raises(ReplicatorError):
        await place.open(0)


@pytest.mark.peer("losetup", "mkfs.ext4")
async def test_a_volume_that_images_and_retention_share_and_that_is_full_is_waited_for(
    tmp_path: Path,
    workers: Workers,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is full at another step of applying each time, and goes on by itself once there is space."""
    monkeypatch.setattr(groups, "SPACE_RETRY_S", 0.01)
    with volume(tmp_path / "volume", "ext4") as mounted:
        place = Place(mounted.place, workers, seed)
        try:
            await place.seal(0)
            for epoch, left_bytes in enumerate(range(0, 200 * KIB, 12 * KIB), 1):
                await waited_for(place, epoch, mounted.place, left_bytes, monkeypatch, caplog)
                assert place.images() == place.source.at(epoch), left_bytes
        finally:
            await place.groups.stop()
            place.close()
    assert "cannot write the undo log" in caplog.text
    assert "cannot be applied now" not in caplog.text


async def waited_for(
    place: Place,
    epoch: int,
    path: Path,
    left_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An epoch is sealed and the volume filled, up to so many bytes; it is applied, if need be with the
    volume emptied once the applier has said that it waits."""
    with monkeypatch.context() as patched:
        patched.setattr(Holding, "apply_next", nothing)
        group = await place.seal(epoch, epoch - 1)
    ballast = filled(path, left_bytes)
    said = caplog.text.count("waiting for space")
    waiting = asyncio.create_task(group.applied())
    while caplog.text.count("waiting for space") < said + 3 and not waiting.done():
        await turns(1)
    ballast.unlink()
    await waiting


def filled(path: Path, left_bytes: int) -> Path:
    """A file that takes all of a volume, up to so many bytes."""
    ballast = path / "ballast"
    with ballast.open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(64 * KIB))
        os.ftruncate(file.fileno(), file.tell() - left_bytes)
        os.fsync(file.fileno())
    return ballast
