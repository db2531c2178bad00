"""The receiver against senders driven by hand: what it refuses, acknowledges and gives back."""

import asyncio
import errno
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_digest

from protocol.connection import End
from protocol.constants import HEADER_BYTES
from protocol.messages import (
    NO_ID,
    Ack,
    Attach,
    Bye,
    Digests,
    DigestsWanted,
    DiskCoverage,
    Fail,
    Interval,
    Mode,
    Opened,
    Retry,
    Seal,
    Sealed,
    Wanted,
)
from protocol.payload import DataFrame, Extent, build
from protocol.state import State
from replicator import session as receiving
from replicator.buffers import Buffer, BufferPool
from replicator.credit_pool import LARGEST_FRAME_BYTES
from replicator.errors import LinkError
from replicator.extents import Coverage, Relation
from replicator.files import Files
from replicator.images.coverage_journal import CoverageJournal
from replicator.receiver import CREDIT_BYTES
from replicator.session import WANTED_MAX, Session
from tests.replicator.pipeline import (
    EPOCH,
    MIB,
    Peer,
    ProcessServer,
    Reset,
    Target,
    descriptors,
    disk_of,
    ends,
    target,
    turns,
    until,
    with_raw_hash,
)

SIZE = 4 * MIB
DISK = {"disk": SIZE}


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Target]:
    async with target(tmp_path) as made:
        yield made


@pytest.fixture
def server(here: Target) -> ProcessServer:
    return here.site.process_server()


def block(number: int) -> bytes:
    return bytes([number % 251 + 1]) * MIB


def covered(ack: Ack) -> list[Interval]:
    return [interval for disk in ack.disks for interval in disk.intervals]


async def acknowledged(control: Peer, size: int) -> Ack:
    """Take ACKs until they cover this many bytes; the last of them."""
    done = 0
    while True:
        ack = await control.expect(Ack)
        done += sum(end - start for start, end in covered(ack))
        if done >= size:
            assert done == size
            return ack


async def sealed(control: Peer, opened: Opened, epoch: bytes = EPOCH) -> Sealed:
    control.send(Seal(epoch, False, (DiskCoverage(opened.disks[0].disk, (Interval(0, SIZE),)),)))
    return await control.expect(Sealed)


class HeldFiles(Files):
    """fdatasync waits until the test lets it go, and then fails if it is told to."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.waiting = threading.Event()
        self.error: int | None = None
        self.synced = 0

    def fdatasync(self, fd: int) -> None:
        self.waiting.set()
        assert self.may_go.wait(20)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        super().fdatasync(fd)
        self.synced += 1


# ------------------------------------------------------------------ the good way


async def test_frames_in_any_order_become_a_disk(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, DISK)
    other = await here.attached(server, opened)
    for number, (stream, level) in enumerate([(data, 0), (other, 3), (data, 3), (other, 0)]):
        start = (3 - number) * MIB
        stream.send_data(here.frame(opened, start, block(number), level=level))
    await acknowledged(control, SIZE)
    assert (await sealed(control, opened)).epoch == EPOCH
    await here.applied()
    assert here.flat("disk") == b"".join(block(number) for number in (3, 2, 1, 0))
    assert json.loads(here.sidecar("disk"))["state"] == "clean"


async def test_zeros_replace_what_an_earlier_epoch_wrote(here: Target, server: ProcessServer) -> None:
    for epoch, frames in ((EPOCH, "data"), (EPOCH[::-1], "zeros")):
        control = await here.greeted(server)
        opened = await control.open(DISK, epoch=epoch)
        data = await here.attached(server, opened)
        if frames == "data":
            data.send_data(*(here.frame(opened, number * MIB, block(number)) for number in range(4)))
        else:
            data.send_data(here.zeros(opened, 0, SIZE))
        await acknowledged(control, SIZE)
        await sealed(control, opened, epoch)
        control.send(Bye())
    await here.applied()
    assert here.flat("disk") == bytes(SIZE)


async def test_credit_grows_by_what_became_durable(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, DISK)
    frame = here.frame(opened, 0, block(0))
    data.send_data(frame)
    ack = await acknowledged(control, MIB)
    assert (ack.sequence, ack.credit) == (1, opened.credit + frame.wire_bytes)


async def test_everything_is_given_back_at_the_end(here: Target, server: ProcessServer) -> None:
    async def one(epoch: bytes) -> None:
        control, data, opened = await here.session(server, DISK, epoch)
        data.send_data(*(here.frame(opened, number * MIB, block(number), level=1) for number in range(4)))
        await acknowledged(control, SIZE)
        await sealed(control, opened, epoch)
        for peer in (data, control):
            peer.send(Bye())
            peer.close()
            await peer.ended()

    await one(EPOCH)
    await until(lambda: not here.receiver._groups)
    before, tasks = descriptors(), len(asyncio.all_tasks())
    for number in range(3):
        await one(bytes([number + 1]) * 16)
    await until(lambda: not here.receiver._groups)
    await until(lambda: descriptors() <= before)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    assert here.receiver.parts.pool.taken == 0
    assert here.receiver.parts.credit._free == here.receiver.parts.credit._total
    assert not here.receiver._sessions and not here.receiver._groups and not here.receiver._opening


@pytest.mark.parametrize("epoch", [NO_ID, EPOCH])
async def test_an_epoch_that_cannot_be_begun_is_refused(
    here: Target, server: ProcessServer, epoch: bytes
) -> None:
    for again in (EPOCH, EPOCH[::-1]):
        control, data, opened = await here.session(server, DISK, again)
        data.send_data(here.zeros(opened, 0, SIZE))
        await acknowledged(control, SIZE)
        await sealed(control, opened, again)
        control.send(Bye())
    peer = await here.greeted(server)
    peer.ask(DISK, epoch=epoch)
    assert (await peer.refused()).code == "epoch.unusable"


# ------------------------------------------------------------------ I1: durable, then acknowledged


async def test_nothing_is_acknowledged_before_its_sync_has_ended(tmp_path: Path) -> None:
    files = HeldFiles()
    async with target(tmp_path, files=files) as here:
        control, data, opened = await here.session(here.site.process_server(), DISK)
        data.send_data(here.frame(opened, 0, block(0)))
        await until(files.waiting.is_set)
        data.send_data(here.frame(opened, MIB, block(1)))  # written while the first sync is under way
        await here.applied()
        await until(lambda: here.flat("disk")[MIB:] == block(1) + bytes(2 * MIB))
        await turns(500)
        assert not control.reader._buffer, "something came on the control stream"  # type: ignore[attr-defined]
        files.may_go.set()
        first = await control.expect(Ack)
        assert covered(first) == [(0, MIB)]  # not what was written after the sync had begun
        assert covered(await control.expect(Ack)) == [(MIB, 2 * MIB)]
        assert files.synced == 2


async def test_a_sync_that_fails_ends_the_session_without_an_ack(tmp_path: Path) -> None:
    files = HeldFiles()
    files.error = errno.EIO
    files.may_go.set()
    async with target(tmp_path, files=files) as here:
        control, data, opened = await here.session(here.site.process_server(), DISK)
        data.send_data(here.frame(opened, 0, block(0)))
        fail = await control.expect(Fail)  # and nothing before it
        assert fail.code == "target.sync_failed" and fail.cause and fail.fix
        assert isinstance(await data.ended(), Reset | End)
        assert json.loads(here.sidecar("disk"))["state"] == "dirty"


class JournalFails(Files):
    """fdatasync of the coverage journal fails."""

    def fdatasync(self, fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".coverage"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fdatasync(fd)


async def test_what_could_not_be_noted_as_durable_is_never_acknowledged(tmp_path: Path) -> None:
    async with target(tmp_path, retention_files=JournalFails()) as here:
        control, data, opened = await here.session(here.site.process_server(), DISK)
        data.send_data(here.frame(opened, 0, block(0)))
        fail = await control.expect(Fail)  # and no ACK before it
        assert fail.code == "target.journal_failed" and fail.cause and fail.fix
        await until(lambda: not here.receiver._groups)
        await here.applied()
        assert here.flat("disk")[:MIB] == block(0)  # the image itself holds it


async def test_an_ack_is_in_the_journal_before_it_is_sent(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, DISK)
    data.send_data(here.frame(opened, MIB, block(1)))
    await acknowledged(control, MIB)
    with here.images._retention.held() as held:
        journal = CoverageJournal.open(held, opened.epoch_number)
        journal.close()
    assert journal.disks[1].intervals() == ((MIB, 2 * MIB),)


async def test_a_seal_waits_for_nothing_it_is_refused_before_all_is_durable(tmp_path: Path) -> None:
    files = HeldFiles()
    async with target(tmp_path, files=files) as here:
        control, data, opened = await here.session(here.site.process_server(), DISK)
        data.send_data(*(here.frame(opened, number * MIB, block(number)) for number in range(4)))
        await until(files.waiting.is_set)
        control.send(Seal(EPOCH, False, (DiskCoverage(opened.disks[0].disk, (Interval(0, SIZE),)),)))
        await turns()
        files.may_go.set()
        fail = await control.refused()
        assert fail.code == "seal.incomplete"
        await until(lambda: not here.receiver._groups)
        assert not (here.path / "disk.vmdk").exists()


@pytest.mark.parametrize("hole", [0, 1, 3])
async def test_a_seal_with_something_missing_is_refused(
    here: Target, server: ProcessServer, hole: int
) -> None:
    control, data, opened = await here.session(server, DISK)
    for number in set(range(4)) - {hole}:
        data.send_data(here.frame(opened, number * MIB, block(number)))
    await acknowledged(control, 3 * MIB)
    control.send(Seal(EPOCH, False, (DiskCoverage(opened.disks[0].disk, (Interval(0, SIZE),)),)))
    fail = await control.refused()
    assert fail.code == "seal.incomplete" and f"[{hole * MIB}, {(hole + 1) * MIB})" in fail.message
    assert not (here.path / "disk.vmdk").exists()
    assert json.loads(here.sidecar("disk"))["state"] == "dirty"


async def test_a_seal_of_another_epoch_is_refused(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, DISK)
    data.send_data(here.zeros(opened, 0, SIZE))
    await acknowledged(control, SIZE)
    control.send(Seal(bytes(16), False, (DiskCoverage(opened.disks[0].disk, (Interval(0, SIZE),)),)))
    assert (await control.refused()).code == "seal.incomplete"
    assert not (here.path / "disk.vmdk").exists()


async def test_a_group_is_whole_only_when_every_disk_is(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, {"a": SIZE, "b": SIZE})
    data.send_data(here.zeros(opened, 0, SIZE))
    await acknowledged(control, SIZE)
    control.send(Seal(EPOCH, False, ()))
    fail = await control.refused()
    assert fail.code == "seal.incomplete" and f"disk {opened.disks[1].disk} " in fail.message
    assert not list(here.path.glob("[ab].vmdk"))


# ------------------------------------------------------------------ frames


async def test_a_frame_that_comes_twice_is_dropped_and_its_credit_comes_back(
    here: Target, server: ProcessServer
) -> None:
    control, data, opened = await here.session(server, DISK)
    frame = here.frame(opened, 0, block(0))
    data.send_data(frame)
    await acknowledged(control, MIB)
    before = (here.path / "disk-flat.vmdk").stat().st_mtime_ns
    data.send_data(here.frame(opened, 0, block(9)))  # the same place: whatever it says, it was said
    ack = await control.expect(Ack)
    assert covered(ack) == [] and ack.credit == opened.credit + 2 * frame.wire_bytes
    assert ack.sequence == 1  # credit alone is no news of the disk
    assert (here.path / "disk-flat.vmdk").stat().st_mtime_ns == before
    await here.applied()
    assert here.flat("disk")[:MIB] == block(0)


async def test_a_duplicate_of_what_is_not_yet_written_is_dropped_too(tmp_path: Path) -> None:
    files = HeldFiles()
    async with target(tmp_path, files=files) as here:
        control, data, opened = await here.session(here.site.process_server(), DISK)
        frame = here.frame(opened, 0, block(0))
        data.send_data(frame, frame, frame)
        await until(files.waiting.is_set)
        files.may_go.set()
        granted, bytes_acked = 0, 0
        while granted < opened.credit + 3 * frame.wire_bytes:
            ack = await control.expect(Ack)
            granted = ack.credit
            bytes_acked += sum(end - start for start, end in covered(ack))
        assert (granted, bytes_acked) == (opened.credit + 3 * frame.wire_bytes, MIB)


async def test_endless_duplicates_use_no_memory(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, DISK)
    frame = here.frame(opened, 0, block(0))
    for _ in range(200):  # four times the credit
        data.send_data(frame)
        if isinstance(await control.receive(), Fail):
            pytest.fail("credit ran out")
    assert here.receiver.parts.pool.taken <= 1
    assert here.receiver.parts.credit._free + next(iter(here.receiver._sessions.values()))._share.held == (
        here.receiver.parts.credit._total
    )


def wrong(here: Target, opened: Opened, how: str) -> DataFrame:
    disk, epoch, start, end = opened.disks[0].disk, opened.epoch_number, 0, 4096
    match how:
        case "another disk":
            disk += 1
        case "another epoch":
            epoch += 1
        case "across the end":
            start, end = SIZE - 4096, SIZE + 4096
        case "past the end":
            start, end = SIZE, SIZE + 4096
        case "far past the end":
            start, end = 1 << 50, (1 << 50) + 4096
    extents = [Extent(start, end - start, True)]
    return build(disk, epoch, Interval(start, end), extents, memoryview(b""), None, here.receiver.parts.seed)


@pytest.mark.parametrize(
    "how", ["another disk", "another epoch", "across the end", "past the end", "far past the end"]
)
async def test_a_frame_for_a_place_that_is_not_open_ends_the_session(
    here: Target, server: ProcessServer, how: str
) -> None:
    control, data, opened = await here.session(server, DISK)
    data.send_data(wrong(here, opened, how))
    fail = await control.refused()
    assert fail.code == "protocol.coverage" and fail.retry is Retry.STOP
    await until(lambda: not here.receiver._groups)
    assert (here.path / "disk-flat.vmdk").stat().st_size == SIZE


@pytest.mark.parametrize(("start", "end"), [(0, 2 * MIB), (MIB // 2, MIB + 512), (MIB + 512, 3 * MIB)])
async def test_a_frame_that_covers_partly_what_was_covered_ends_the_session(
    here: Target, server: ProcessServer, start: int, end: int
) -> None:
    control, data, opened = await here.session(server, DISK)
    data.send_data(here.frame(opened, MIB, block(1)))
    await acknowledged(control, MIB)
    data.send_data(here.zeros(opened, start, end))
    assert (await control.refused()).code == "protocol.coverage"
    await until(lambda: not here.receiver._groups)
    await here.applied()
    assert here.flat("disk") == bytes(MIB) + block(1) + bytes(2 * MIB)


@pytest.mark.parametrize("level", [0, 3])
async def test_content_that_does_not_match_its_hash_is_never_written_or_acknowledged(
    here: Target, server: ProcessServer, level: int
) -> None:
    control, data, opened = await here.session(server, DISK)
    frame = here.frame(opened, MIB, block(1), level=level)
    bad = with_raw_hash(frame, frame.header.raw_hash ^ 1, here.receiver.parts.seed)
    wanted = Wanted(opened.disks[0].disk, MIB, 2 * MIB)
    for _ in range(WANTED_MAX):
        data.send_data(bad)
        while isinstance(event := await control.receive(), Ack):
            assert not event.disks  # news of credit alone
        assert event == wanted
    assert here.flat("disk") == bytes(SIZE)
    data.send_data(frame)
    await acknowledged(control, MIB)
    assert here.flat("disk")[MIB : 2 * MIB] == block(1)


async def test_a_session_whose_content_never_verifies_ends(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, DISK)
    frame = here.frame(opened, MIB, block(1))
    bad = with_raw_hash(frame, frame.header.raw_hash ^ 1, here.receiver.parts.seed)
    data.send_data(bad)
    while not isinstance(event := await control.receive(), Fail):
        assert isinstance(event, Wanted | Ack) and not getattr(event, "disks", ())
        if isinstance(event, Wanted):
            data.send_data(bad)
    assert event.code == "protocol.raw_hash" and f"disk {opened.disks[0].disk}" in event.message
    assert event.retry is Retry.STOP
    assert here.flat("disk") == bytes(SIZE)


async def test_a_frame_over_the_credit_is_refused_by_name(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, {"disk": 64 * MIB})
    window = next(iter(here.receiver._sessions.values()))._share.window
    window.received = window.granted - MIB  # as if that much were under way
    data.send_data(here.frame(opened, 0, block(0)))  # a MiB and a header
    assert (await data.refused()).code == "protocol.credit"
    fail = await control.refused()
    assert fail.code == "peer.protocol" and "protocol.credit" in fail.message
    assert here.receiver.parts.pool.taken == 0


async def test_a_frame_of_exactly_the_credit_is_taken(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, {"disk": 64 * MIB})
    frame = here.frame(opened, 0, block(0))
    window = next(iter(here.receiver._sessions.values()))._share.window
    window.received = window.granted - frame.wire_bytes
    data.send_data(frame)
    await acknowledged(control, MIB)


# ------------------------------------------------------------------ who may


async def test_nobody_sends_without_a_certificate(here: Target) -> None:
    peer = await here.call(here.site.stranger())
    fail = await peer.refused()
    assert fail.code == "identity.required"
    assert not here.receiver._sessions


async def test_a_session_is_its_identitys_alone(here: Target, server: ProcessServer) -> None:
    control, data, opened = await here.session(server, DISK)
    thief = await here.greeted(here.site.process_server())
    thief.send(Attach(opened.session))
    assert (await thief.refused()).code == "session.unknown"
    data.send_data(here.zeros(opened, 0, SIZE))  # and the session goes on
    await acknowledged(control, SIZE)
    await sealed(control, opened)


async def test_a_session_that_is_not_there_is_refused_in_the_same_words(
    here: Target, server: ProcessServer
) -> None:
    _, _, opened = await here.session(server, DISK)
    answers = []
    for asker, session in ((here.site.process_server(), opened.session), (server, bytes(16))):
        peer = await here.greeted(asker)
        peer.send(Attach(session))
        answers.append(await peer.refused())
    assert answers[0] == answers[1]  # nothing is learnt about others' sessions
    assert answers[0].retry is Retry.LATER


async def test_another_identity_gets_neither_a_busy_group_nor_an_idle_one(
    here: Target, server: ProcessServer
) -> None:
    control, data, opened = await here.session(server, DISK)
    other = here.site.process_server()
    peer = await here.greeted(other)
    peer.ask(DISK)
    assert (await peer.refused()).code == "group.busy"
    data.send_data(here.zeros(opened, 0, SIZE))
    await acknowledged(control, SIZE)
    await sealed(control, opened)
    control.send(Bye())
    await until(lambda: not here.receiver._groups)
    peer = await here.greeted(other)
    peer.ask(DISK)
    assert (await peer.refused()).code == "group.not_yours"
    assert json.loads(here.sidecar("disk"))["owner"] == server.id
    assert here.receiver.parts.credit._free == CREDIT_BYTES  # who is refused keeps nothing of it


async def test_a_new_open_by_the_same_identity_ends_the_older_session_and_tells_it(
    here: Target, server: ProcessServer
) -> None:
    control, data, opened = await here.session(server, DISK)
    again = await here.greeted(server)
    newer = await again.open(DISK, epoch=EPOCH[::-1])
    assert newer.session != opened.session and newer.epoch_number > opened.epoch_number
    fail = await control.refused()
    assert (fail.code, fail.retry) == ("session.replaced", Retry.STOP)
    assert isinstance(await data.ended(), Reset | End)
    late = await here.greeted(server)
    late.send(Attach(opened.session))
    assert (await late.refused()).code == "session.unknown"
    data = await here.attached(server, newer)
    data.send_data(here.zeros(newer, 0, SIZE))
    await acknowledged(again, SIZE)
    await sealed(again, newer, EPOCH[::-1])
    assert len(here.receiver._sessions) == 1


async def test_of_many_opens_at_once_one_session_is_left(here: Target, server: ProcessServer) -> None:
    """Two sessions of one group would write the same images."""
    peers = [await here.greeted(server) for _ in range(5)]
    for number, peer in enumerate(peers):
        peer.ask(DISK, epoch=bytes([number + 1]) * 16)
    answers = [await peer.expect(Opened) for peer in peers]
    await until(lambda: len(here.receiver._sessions) == 1)
    (left,) = here.receiver._sessions
    replaced = 0
    for peer, answer in zip(peers, answers, strict=True):
        if answer.session != left:
            replaced += (await peer.refused()).code == "session.replaced"
    assert replaced == 4
    session = here.receiver._groups["group"]
    assert session.id == left
    assert json.loads(here.sidecar("disk"))["epoch"] == session._group.holding.group.epoch.hex()


async def test_an_open_replaces_a_session_whose_sender_hangs_without_waiting_for_it(
    here: Target, server: ProcessServer
) -> None:
    control, _, _ = await here.session(server, DISK)
    control.stop_reading()  # it will not answer the end of TLS
    again = await here.greeted(server)
    async with asyncio.timeout(1):
        await again.open(DISK)


async def test_a_sender_that_leaves_while_its_group_is_opened_leaves_nothing_behind(
    here: Target, server: ProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_open = threading.Event()
    real = here.images.open_group

    def slow(*args):
        assert may_open.wait(20)
        return real(*args)

    monkeypatch.setattr(here.images, "open_group", slow)
    before = descriptors()
    peer = await here.greeted(server)
    peer.ask(DISK)
    await turns()
    peer.reset()
    await turns()
    may_open.set()
    await until(lambda: here.acceptor.counts.accepted == 1 and not here.acceptor._tasks)
    assert here.receiver.parts.credit._free == here.receiver.parts.credit._total
    assert not here.receiver._sessions and not here.receiver._groups
    await until(lambda: descriptors() <= before)


# ------------------------------------------------------------------ going on, and what is there


@pytest.mark.parametrize("mode", Mode)
async def test_an_empty_image_takes_everything_whatever_the_sender_offers(
    here: Target, server: ProcessServer, mode: Mode
) -> None:
    peer = await here.greeted(server)
    opened = await peer.open(DISK, mode=mode, parent=EPOCH[::-1])
    assert (opened.mode, opened.sealed) == (Mode.FULL, bytes(16))


async def filled(here: Target, server: ProcessServer, epoch: bytes = EPOCH) -> None:
    """A sealed epoch of four different MiB."""
    control, data, opened = await here.session(server, DISK, epoch)
    data.send_data(*(here.frame(opened, number * MIB, block(number)) for number in range(4)))
    await acknowledged(control, SIZE)
    await sealed(control, opened, epoch)
    control.send(Bye())
    await until(lambda: not here.receiver._groups)


async def test_a_session_that_broke_is_told_exactly_what_was_acknowledged(
    here: Target, server: ProcessServer
) -> None:
    control, data, opened = await here.session(server, DISK)
    data.send_data(here.frame(opened, 0, block(0)), here.frame(opened, 2 * MIB, block(2)))
    await acknowledged(control, 2 * MIB)
    control.reset()
    await until(lambda: not here.receiver._groups)
    control, data, again = await here.session(server, DISK)
    assert again.disks == (DiskCoverage(1, (Interval(0, MIB), Interval(2 * MIB, 3 * MIB))),)
    assert (again.epoch_number, again.mode) == (opened.epoch_number, Mode.FULL)
    data.send_data(here.frame(again, MIB, block(1)), here.frame(again, 3 * MIB, block(3)))
    await acknowledged(control, 2 * MIB)
    await sealed(control, again)
    await here.applied()
    assert here.flat("disk") == b"".join(block(number) for number in range(4))


async def test_an_epoch_that_is_sealed_already_is_whole_and_sealing_it_again_changes_nothing(
    here: Target, server: ProcessServer
) -> None:
    await filled(here, server)
    before = here.sidecar("disk"), here.images._retention.names(), (here.path / "disk.vmdk").read_bytes()
    control = await here.greeted(server)
    opened = await control.open(DISK)
    assert opened.disks == (DiskCoverage(1, (Interval(0, SIZE),)),) and opened.sealed == EPOCH
    assert (await sealed(control, opened)).epoch == EPOCH
    control.send(Bye())
    await until(lambda: not here.receiver._groups)
    after = here.sidecar("disk"), here.images._retention.names(), (here.path / "disk.vmdk").read_bytes()
    assert before == after


async def test_the_difference_alone_is_taken_only_from_who_compares_with_what_is_there(
    here: Target, server: ProcessServer
) -> None:
    await filled(here, server)
    modes = []
    for number, parent in enumerate((EPOCH, EPOCH[::-1], EPOCH)):
        control = await here.greeted(server)
        opened = await control.open(
            DISK, epoch=bytes([number]) + EPOCH[1:][::-1], mode=Mode.INCREMENTAL, parent=parent
        )
        modes.append((opened.mode, opened.sealed))
        control.send(Bye())
        await until(lambda: not here.receiver._groups)
        assert json.loads(here.sidecar("disk"))["state"] == "clean"  # what is not sealed changes nothing
    assert modes == [(Mode.INCREMENTAL, EPOCH), (Mode.RESYNC, EPOCH), (Mode.INCREMENTAL, EPOCH)]


async def test_digests_tell_what_is_there_in_parts_that_follow_on_each_other(
    here: Target, server: ProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "DIGESTS_A_PART", 7)
    control, data, opened = await here.session(server, DISK)
    data.send_data(here.frame(opened, MIB, block(1)))
    await acknowledged(control, MIB)
    wanted = (Interval(0, 3 * MIB), Interval(SIZE - 65536, SIZE))
    control.send(DigestsWanted(5, 1, 65536, wanted))
    told: dict[int, bytes] = {}
    reached = 0
    parts = 0
    while reached < SIZE:
        part = await control.expect(Digests)
        assert part.request == 5 and part.intervals and part.intervals[0].start >= reached
        reached, parts = part.intervals[-1].end, parts + 1
        hole = Coverage(part.holes)
        at = 0
        for start, end in part.intervals:
            for offset in range(start, end, 65536):
                if hole.relation(offset, offset + 65536) is Relation.COVERED:
                    told[offset] = xxh3_128_digest(bytes(65536), here.receiver.parts.seed)
                else:
                    told[offset] = part.digests[at : at + 16]
                    at += 16
        assert at == len(part.digests) <= 7 * 16
    await here.applied()
    content = here.flat("disk")
    assert parts > 2
    assert told == {
        offset: xxh3_128_digest(content[offset : offset + 65536], here.receiver.parts.seed)
        for start, end in wanted
        for offset in range(start, end, 65536)
    }


BAD_QUESTIONS = {
    "unaligned start": (1, 65536, Interval(4096, 65536)),
    "unaligned end": (1, 65536, Interval(0, 65536 + 4096)),
    "past the end": (1, 65536, Interval(0, SIZE + 65536)),
    "far past the end": (1, 65536, Interval(1 << 50, (1 << 50) + 65536)),
    "blocks of a sector": (1, 512, Interval(0, 65536)),
    "blocks of nothing": (1, 0, Interval(0, 65536)),
    "another disk": (2, 65536, Interval(0, 65536)),
}


@pytest.mark.parametrize("how", BAD_QUESTIONS)
async def test_a_question_that_nobody_could_answer_ends_the_session_and_says_so(
    here: Target, server: ProcessServer, how: str
) -> None:
    disk, size, interval = BAD_QUESTIONS[how]
    control, _, _ = await here.session(server, DISK)
    control.send(DigestsWanted(1, disk, size, (interval,)))
    fail = await control.refused()
    assert (fail.code, fail.retry) == ("peer.protocol", Retry.STOP) and f"disk {disk}" in fail.message
    await until(lambda: not here.receiver._groups)
    assert here.receiver.parts.credit._free == here.receiver.parts.credit._total


async def test_more_questions_at_once_than_a_sender_has_end_the_session(
    here: Target, server: ProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, _, opened = await here.session(server, DISK)
    session = here.receiver._sessions[opened.session]
    may_answer = threading.Event()
    image = session._group.holding.group.disks[0].image
    real = image.digests

    def held(*args: Any) -> Any:
        assert may_answer.wait(20)
        return real(*args)

    monkeypatch.setattr(image, "digests", held)
    control.send(DigestsWanted(0, 1, 65536, (Interval(0, 65536),)))
    await until(lambda: session._asked.empty() and control.connection.state is State.OPEN)
    for number in range(receiving.REQUESTS_MAX + 2):
        control.send(DigestsWanted(number, 1, 65536, (Interval(0, 65536),)))
    await until(lambda: session.over or session._asked.full())
    may_answer.set()
    assert (await control.refused()).code == "peer.protocol"


async def test_more_data_streams_than_allowed_are_refused_and_the_session_goes_on(
    here: Target, server: ProcessServer
) -> None:
    control, data, opened = await here.session(server, DISK)
    for _ in range(15):
        await here.attached(server, opened)
    one_more = await here.greeted(server)
    one_more.send(Attach(opened.session))
    assert (await one_more.refused()).code == "session.too_many_streams"
    data.send_data(here.zeros(opened, 0, SIZE))
    await acknowledged(control, SIZE)


# ------------------------------------------------------------------ how sessions end


async def test_a_lost_data_stream_ends_the_session(here: Target, server: ProcessServer) -> None:
    control, data, _ = await here.session(server, DISK)
    data.reset()
    fail = await control.refused()
    assert (fail.code, fail.retry) == ("link.lost", Retry.LATER)
    await until(lambda: not here.receiver._sessions)


async def test_a_data_stream_that_says_goodbye_leaves_the_session_alone(
    here: Target, server: ProcessServer
) -> None:
    control, data, opened = await here.session(server, DISK)
    other = await here.attached(server, opened)
    other.send(Bye())
    await other.ended()
    data.send_data(here.zeros(opened, 0, SIZE))
    await acknowledged(control, SIZE)
    await sealed(control, opened)


@pytest.mark.parametrize("how", ["goodbye", "reset"])
async def test_data_that_goes_on_after_the_session_has_ended_changes_nothing(
    here: Target, server: ProcessServer, how: str
) -> None:
    """The credit pool is everybody's: frames of a dead session must not be charged, kept or given back."""
    control, data, opened = await here.session(server, {"disk": 64 * MIB})
    data.send_data(here.frame(opened, 0, block(0)))
    await acknowledged(control, MIB)
    if how == "goodbye":
        control.send(Bye())
    else:
        control.reset()
    for number in range(8):
        data.send_data(here.frame(opened, number % 4 * MIB, block(number)))
        await asyncio.sleep(0)
    assert isinstance(await data.ended(), Reset | End)
    await until(lambda: not here.acceptor._tasks)
    assert here.receiver.parts.credit._free == here.receiver.parts.credit._total
    assert here.receiver.parts.pool.taken <= 1  # a frame that was cut off


async def test_no_stream_joins_a_session_that_is_ending(
    here: Target, server: ProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, data, opened = await here.session(server, DISK)
    session = here.receiver._sessions[opened.session]
    may_close = threading.Event()
    late = await here.greeted(server)
    for disk in session._group.holding.group.disks:
        monkeypatch.setattr(disk.image, "close", slow_close_of(disk.image.close, may_close))
    control.send(Bye())
    await data.ended()
    late.send(Attach(opened.session))
    assert (await late.refused()).code == "session.unknown"
    may_close.set()


def slow_close_of(real: Callable[[], None], may_close: threading.Event) -> Callable[[], None]:
    def close() -> None:
        assert may_close.wait(20)
        real()

    return close


async def test_frames_that_wait_when_the_session_ends_are_given_back(tmp_path: Path) -> None:
    files = HeldFiles()
    async with target(tmp_path, files=files, threads=1) as here:  # the only worker is held by the sync
        control, data, opened = await here.session(here.site.process_server(), {"disk": 64 * MIB})
        data.send_data(here.frame(opened, 0, block(0)))
        await until(files.waiting.is_set)
        data.send_data(*(here.frame(opened, number * MIB, block(number)) for number in range(1, 9)))
        await until(lambda: here.receiver.parts.pool.taken == 8)
        control.send(Bye())
        await turns()
        files.may_go.set()
        await until(lambda: not here.receiver._groups)
        assert here.receiver.parts.pool.taken == 0
        assert here.receiver.parts.credit._free == here.receiver.parts.credit._total


async def test_an_ack_that_cannot_be_told_hurts_nobody_else(tmp_path: Path) -> None:
    """One session's release makes another's credit grow, which may be sealed or gone by then."""
    async with target(tmp_path, credit_bytes=12 * LARGEST_FRAME_BYTES) as here:
        server = here.site.process_server()
        control, data, opened = await here.session(server, DISK)
        leaving = await here.greeted(server)
        await leaving.open({"leaving": SIZE}, group="leaving")
        done = await here.greeted(server)
        done_opened = await done.open({"done": SIZE}, group="done")
        done_data = await here.attached(server, done_opened)
        done_data.send_data(here.zeros(done_opened, 0, SIZE))
        await acknowledged(done, SIZE)
        await sealed(done, done_opened)
        share = here.receiver._sessions[done_opened.session]._share
        before = share.window.granted
        leaving.send(Bye())  # what it held goes to the others, of which one is sealed
        await until(lambda: len(here.receiver._sessions) == 2)
        assert share.window.granted > before
        await turns()
        data.send_data(*(here.frame(opened, number * MIB, block(number)) for number in range(4)))
        await acknowledged(control, SIZE)
        await sealed(control, opened)


async def test_a_sender_that_reads_no_acks_is_told_no_more_of_them(
    here: Target, server: ProcessServer
) -> None:
    control, data, opened = await here.session(server, {"disk": 64 * MIB})
    session: Session = here.receiver._sessions[opened.session]
    session._control.pause_writing()  # its buffers are full
    data.send_data(*(here.frame(opened, number * MIB, block(number)) for number in range(10)))
    await until(lambda: here.receiver.parts.pool.taken == 0 and not session._queue.qsize())
    await turns(300)
    assert not control.reader._buffer  # type: ignore[attr-defined]
    session._control.resume_writing()
    await acknowledged(control, 10 * MIB)


# ------------------------------------------------------------------ limits


class Full(Files):
    """Has space for so many MiB."""

    def __init__(self, mib: int) -> None:
        self.left = mib * MIB

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if len(data) >= MIB // 2:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, data, offset)


async def test_a_datastore_that_fills_up_is_told_to_the_sender_with_what_to_do(tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(os.urandom(24 * MIB))
    async with target(tmp_path, files=Full(10)) as here:
        sender = here.sender(here.site.process_server(), level=0)
        disk = await disk_of(source, here.workers, "disk")
        with ends(LinkError, "target.full") as caught:  # worth another try, once there is space
            await sender.send("group", [disk])
        assert "full" in caught.value.cause and "free some space" in caught.value.fix
        assert sender._parts.progress.done < sender._parts.progress.size
        assert sender._parts.pool.taken == 0
        await disk.source.close()
        await until(lambda: not here.receiver._groups)
        assert here.receiver.parts.pool.taken <= 2  # a frame of each stream may have been cut off
        assert json.loads(here.sidecar("disk"))["state"] == "dirty"


async def test_memory_stays_inside_the_pool_whatever_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three senders at once, a slow disk, and credit for a few frames: the sum of all buffers is bounded."""
    here: Target
    taken = peak = 0
    sizes: dict[int, int] = {}
    take, give = BufferPool.take, BufferPool.give

    def counted_take(pool: BufferPool, size: int, lead: int = 0):
        nonlocal taken, peak
        buffer = take(pool, size, lead)
        if pool is here.receiver.parts.pool:
            sizes[id(buffer)] = size
            taken += size
            peak = max(peak, taken)
        return buffer

    def counted_give(pool: BufferPool, buffer) -> None:
        nonlocal taken
        if pool is here.receiver.parts.pool:
            taken -= sizes.pop(id(buffer))
        give(pool, buffer)

    monkeypatch.setattr(BufferPool, "take", counted_take)
    monkeypatch.setattr(BufferPool, "give", counted_give)
    credit = 8 * LARGEST_FRAME_BYTES
    async with target(tmp_path, credit_bytes=credit) as made:
        here, server = made, made.site.process_server()
        disks = []
        for name in "abc":
            (tmp_path / name).write_bytes(os.urandom(16 * MIB))
            disks.append(await disk_of(tmp_path / name, here.workers, name))
        async with asyncio.TaskGroup() as tasks:
            for disk in disks:
                tasks.create_task(here.sender(server, level=0).send(disk.name, [disk]))
        for disk in disks:
            await disk.source.close()
            await here.applied()
            assert here.flat(disk.name) == (tmp_path / disk.name).read_bytes()
        assert 0 < peak <= credit
        await until(lambda: not here.receiver._groups)
        assert (taken, here.receiver.parts.pool.taken) == (0, 0)


async def test_a_frame_of_few_bytes_takes_no_aligned_buffer(
    here: Target, server: ProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is paid for by its bytes: an aligned buffer for each would be a thousand times what was granted."""
    control, data, opened = await here.session(server, {"disk": 1 << 40})

    def no_buffer(size: int, lead: int = 0) -> Buffer:
        raise AssertionError(f"an aligned buffer for {size} bytes")

    monkeypatch.setattr(here.receiver.parts.pool, "take", no_buffer)
    for number in range(1000):
        data.send_data(here.zeros(opened, number * 512, (number + 1) * 512))
    await acknowledged(control, 1000 * 512)


async def test_more_intervals_than_an_ack_holds_are_told_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "ACK_INTERVALS", 100)
    files = HeldFiles()
    async with target(tmp_path, files=files) as here:
        control, data, opened = await here.session(here.site.process_server(), {"disk": 1 << 40})
        count = 1050
        for number in range(count):  # every other sector: nothing touches
            data.send_data(here.zeros(opened, number * 1024, number * 1024 + 512))
        session = here.receiver._sessions[opened.session]
        await until(lambda: len(session._verified) + len(session._queue._queue) > 1000)  # type: ignore[attr-defined]
        await until(session._queue.empty)
        files.may_go.set()
        acks: list[Ack] = []
        while sum(len(covered(ack)) for ack in acks) < count:
            acks.append(await control.expect(Ack))
        assert 11 <= len(acks) <= 13 and max(len(covered(ack)) for ack in acks) == 100
        assert sorted(interval for ack in acks for interval in covered(ack)) == [
            (number * 1024, number * 1024 + 512) for number in range(count)
        ]
        assert [ack.sequence for ack in acks] == list(range(1, len(acks) + 1))
        assert acks[-1].credit == opened.credit + count * (HEADER_BYTES + 16)
