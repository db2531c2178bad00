"""A session's order of things: what is durable before it is told, what is told before anything is let go."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.messages import (
    Ack,
    Bye,
    Digests,
    DigestsWanted,
    DiskCoverage,
    Interval,
    Mode,
    Opened,
    Seal,
    Sealed,
)
from replicator.credit_pool import LARGEST_FRAME_BYTES
from replicator.digest import BLOCK_BYTES
from replicator.files import Files
from tests.replicator.pipeline import EPOCH, MIB, Peer, Target, target, turns, until, with_raw_hash

SIZE = 4 * MIB
DISK = {"disk": SIZE}


class Recording(Files):
    """Notes every write and sync by file name; the first sync waits until the test lets it go."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.waiting = threading.Event()
        self.steps: list[tuple[str, str]] = []

    def _note(self, what: str, fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name.endswith(("-flat.vmdk", ".coverage")):
            self.steps.append((what, name))

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._note("write", fd)
        return super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self.waiting.set()
        assert self.may_go.wait(20)
        super().fdatasync(fd)
        self._note("sync", fd)


def held(real: Callable[[], None], may_go: threading.Event) -> Callable[[], None]:
    """The call, once it may go."""

    def call() -> None:
        assert may_go.wait(20)
        real()

    return call


def block(number: int) -> bytes:
    return bytes([number % 251 + 1]) * MIB


def whole(opened) -> tuple[DiskCoverage, ...]:
    return tuple(DiskCoverage(disk.disk, (Interval(0, SIZE),)) for disk in opened.disks)


async def acknowledged(control: Peer, size: int) -> None:
    while size > 0:
        for disk in (await control.expect(Ack)).disks:
            size -= sum(end - start for start, end in disk.intervals)


async def left(here: Target) -> None:
    await until(lambda: not here.receiver._groups)


# ------------------------------------------------------------------ durable, noted, told


async def test_every_disk_is_synced_then_it_is_noted_then_it_is_told(tmp_path: Path) -> None:
    files = Recording()
    async with target(tmp_path, files=files, retention_files=files) as here:
        server = here.site.process_server()
        control = await here.greeted(server)
        opened = await control.open({"a": SIZE, "b": SIZE})
        data = await here.attached(server, opened)
        data.send_data(here.frame(opened, 0, block(0)))
        await until(files.waiting.is_set)
        data.send_data(here.frame(opened, MIB, block(1)), here.frame(opened, 0, block(2), disk=1))
        flat = ("a-flat.vmdk", "b-flat.vmdk")
        await until(lambda: len(here.receiver._sessions[opened.session]._verified) == 2)
        files.may_go.set()
        await acknowledged(control, MIB)
        told = len(files.steps)
        await acknowledged(control, 2 * MIB)
        steps = list(files.steps)
    noted = [at for at, (_, name) in enumerate(steps) if name.endswith(".coverage")]
    first, second = steps[: noted[1] + 1], steps[noted[1] + 1 :]
    assert told >= len(first)
    assert next(step for step in first if step[0] == "sync") == ("sync", "a-flat.vmdk")
    assert [what for what, name in first if name.endswith(".coverage")] == ["write", "sync"]
    assert [step for step in second if step[0] == "sync"][:-1] == [("sync", name) for name in flat]
    assert [name.rpartition(".")[2] for _, name in second] == ["vmdk", "vmdk", "coverage", "coverage"]


# ------------------------------------------------------------------ told, then let go


async def test_the_reason_of_a_failure_goes_out_before_the_images_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing may take long where a disk is failing, and the sender waits a second for the reason."""
    async with target(tmp_path) as here:
        control, data, opened = await here.session(here.site.process_server(), DISK)
        may_close = threading.Event()
        for disk in here.receiver._sessions[opened.session]._group.holding.group.disks:
            monkeypatch.setattr(disk.image, "close", held(disk.image.close, may_close))
        data.send_data(here.zeros(opened, SIZE, SIZE + 512))
        assert (await control.refused()).code == "protocol.coverage"
        assert here.groups._in_hand
        may_close.set()
        await left(here)


async def test_a_frame_that_is_refused_gives_its_memory_back(tmp_path: Path) -> None:
    async with target(tmp_path) as here:
        server = here.site.process_server()
        for number, start in enumerate((SIZE, MIB // 2)):
            control, data, opened = await here.session(server, {f"disk{number}": SIZE})
            data.send_data(here.frame(opened, 0, block(0)))
            await acknowledged(control, MIB)
            data.send_data(here.frame(opened, start, block(1)))
            assert (await control.refused()).code == "protocol.coverage"
            await left(here)
            assert here.receiver.parts.pool.taken == 0


@pytest.mark.parametrize(("start", "length"), [(512, 65536), (0, 512), (65536, 65536 + 512)])
async def test_a_damaged_frame_of_bounds_that_nobody_may_ask_for_is_refused(
    tmp_path: Path, start: int, length: int
) -> None:
    async with target(tmp_path) as here:
        control, data, opened = await here.session(here.site.process_server(), DISK)
        frame = here.frame(opened, start, block(0)[:length])
        seed = here.receiver.parts.seed
        data.send_data(with_raw_hash(frame, frame.header.raw_hash ^ 1, seed))
        assert (await control.refused()).code == "protocol.raw_hash"
        await left(here)


async def test_goodbye_at_any_time_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with target(tmp_path) as here:
        control, data, opened = await here.session(here.site.process_server(), DISK)
        data.send_data(here.frame(opened, 0, block(0)))
        await acknowledged(control, MIB)
        for peer in (data, control):
            peer.send(Bye())
            await peer.ended()
        await left(here)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text
    assert "link.lost" not in caplog.text


async def test_what_an_epoch_has_to_say_and_why_is_told_once_a_session(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "replicator.session")
    async with target(tmp_path) as here:
        control, data, _ = await here.session(here.site.process_server(), DISK)
        for peer in (data, control):
            peer.send(Bye())
            await peer.ended()
        await left(here)
    (told,) = (record for record in caplog.records if "the images are new and empty" in record.getMessage())
    assert "full" in told.getMessage()
    assert told.levelno == logging.INFO


async def test_streams_may_come_and_go_as_long_as_they_are_not_too_many_at_once(tmp_path: Path) -> None:
    async with target(tmp_path) as here:
        server = here.site.process_server()
        control = await here.greeted(server)
        opened = await control.open(DISK)
        for _ in range(20):
            data = await here.attached(server, opened)
            data.send(Bye())
            await data.ended()
        data = await here.attached(server, opened)
        data.send_data(here.zeros(opened, 0, SIZE))
        await acknowledged(control, SIZE)


# ------------------------------------------------------------------ after the seal


async def test_credit_that_grows_after_the_seal_is_nobodys_defect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with target(tmp_path, credit_bytes=12 * LARGEST_FRAME_BYTES) as here:
        server = here.site.process_server()
        others = [await here.greeted(server) for _ in range(2)]
        for number, other in enumerate(others):
            await other.open({f"other{number}": SIZE}, group=f"other{number}")
        control, data, opened = await here.session(server, DISK)
        data.send_data(here.zeros(opened, 0, SIZE))
        await acknowledged(control, SIZE)
        control.send(Seal(EPOCH, False, whole(opened)))
        await control.expect(Sealed)
        session = here.receiver._sessions[opened.session]
        before = session._share.window.granted
        others[1].send(Bye())
        await until(lambda: session._share.window.granted > before and not session._commit.is_set())
        await turns()
        assert not session.over
        control.send(Bye())
        await left_one(here)
    assert "handler failed" not in caplog.text


async def left_one(here: Target) -> None:
    await until(lambda: len(here.receiver._groups) == 1)


async def test_answers_that_are_still_due_when_the_epoch_is_sealed_are_let_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with target(tmp_path) as here:
        server = here.site.process_server()
        control, data, opened = await here.session(server, DISK, mode=Mode.RESYNC)
        data.send_data(here.zeros(opened, 0, SIZE))
        await acknowledged(control, SIZE)
        may_answer = threading.Event()
        image = here.receiver._sessions[opened.session]._group.holding.group.disks[0].image
        real = image.digests

        def slow(*args):
            assert may_answer.wait(20)
            return real(*args)

        monkeypatch.setattr(image, "digests", slow)
        control.send(DigestsWanted(1, opened.disks[0].disk, BLOCK_BYTES, (Interval(0, SIZE),)))
        control.send(Seal(EPOCH, False, whole(opened)))
        event = await control.receive()
        assert isinstance(event, Sealed), event
        may_answer.set()
        await turns(300)
        assert here.receiver._groups  # the session lives until the sender leaves
        control.send(Bye())
        assert not isinstance(await control.receive(), Digests)
        await left(here)
    assert "handler failed" not in caplog.text


# ------------------------------------------------------------------ replaced


async def test_a_session_that_is_closing_its_images_is_waited_for_when_it_is_replaced(tmp_path: Path) -> None:
    """A cancelled close that waits for a worker would never happen: its descriptors would stay open."""
    files = Recording()
    async with target(tmp_path, files=files, threads=1) as here:
        server = here.site.process_server()
        busy, busy_data, busy_opened = await here.session(server, DISK)
        control = await here.greeted(server)
        opened = await control.open({"again": SIZE}, group="again")
        session = here.receiver._sessions[opened.session]
        busy_data.send_data(here.frame(busy_opened, 0, block(0)))
        await until(files.waiting.is_set)  # the only worker
        control.send(Bye())
        await until(lambda: session.over)
        newer = await here.greeted(server)
        newer.ask({"again": SIZE}, group="again", epoch=EPOCH[::-1])
        await turns(200)
        files.may_go.set()
        event = await newer.receive()
        assert type(event).__name__ == "Opened", event
        assert session._group.holding.group.disks[0].image._fd == -1
        assert json.loads(here.sidecar("again"))["epoch"] == EPOCH[::-1].hex()
        await acknowledged(busy, MIB)


# ------------------------------------------------------------------ more of them than there is credit for


async def test_a_session_without_credit_waits_until_another_ends_and_is_not_refused(tmp_path: Path) -> None:
    async with target(tmp_path, credit_bytes=2 * LARGEST_FRAME_BYTES) as here:
        server = here.site.process_server()
        controls = [await here.greeted(server) for _ in range(4)]
        for control, name in zip(controls[:2], "ab", strict=True):
            await control.open({name: SIZE}, group=name)
        for control, name in zip(controls[2:], "cd", strict=True):
            control.ask({name: SIZE}, group=name)
        await turns(200)
        assert set(here.receiver._groups) == {"a", "b"}
        controls[2].reset()  # who does not wait any longer is in nobody's way
        controls[0].send(Bye())
        controls[1].send(Bye())
        opened = await controls[3].expect(Opened)
        assert opened.credit >= LARGEST_FRAME_BYTES
        await until(lambda: set(here.receiver._groups) == {"d"})


async def test_tasks_of_a_session_end_with_it(tmp_path: Path) -> None:
    async with target(tmp_path) as here:
        before = asyncio.all_tasks()
        control, data, _ = await here.session(here.site.process_server(), DISK)
        control.reset()
        await data.ended()
        await until(lambda: not here.acceptor._tasks and not here.groups._in_hand)
        assert not asyncio.all_tasks() - before
