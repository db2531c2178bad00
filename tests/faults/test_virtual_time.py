"""The whole way from source to image in virtual time: the real sender, session, groups and log.

Over a line that stalls and breaks at any byte, to a machine whose power fails at any call. What holds: I1,
I2, I6, and of I7 the tasks. Not here: TLS, and what lies in the history (`test_power_cuts.py`).
"""

import asyncio
import random
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from replicator import credit_pool
from replicator.adapt import FixedLevel
from replicator.errors import ReplicatorError
from replicator.extents import Cutter
from replicator.framing import Progress
from replicator.log.segment import SegmentFile
from replicator.retrying import keep_trying
from replicator.sender import DiskToSend, Outcome, Sender
from tests.faults.oracle import KIB, Violation, difference
from tests.faults.virtual_line import Line
from tests.faults.virtual_machine import CREDIT_BYTES, Machine
from tests.faults.virtual_time import VirtualClock, VirtualLoop, VirtualWorkers
from tests.replicator.fake_target import MemorySource
from tests.replicator.pipeline import memory

SIZES = {"one": 400 * KIB + 512, "two": 120 * KIB}
FRAME_BYTES = 64 * KIB
LARGEST_FRAME_BYTES = 160 * KIB
WINDOW_BYTES = CREDIT_BYTES // 2
RESENT_MAX_BYTES = 2 * WINDOW_BYTES  # a break: a frame counts whole, if only a part of it was sent before
EPOCHS = 3
FAULTS_MAX = 4  # an epoch
FAULTS_S = 120.0  # then they are over
CAUGHT_IN = 400  # lives
CALM_S = 1.0
ENDS_S = 200.0  # and so long after the longest of them everything is sealed and applied


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small disk has many, and needs more credit than there is."""
    monkeypatch.setattr(credit_pool, "LARGEST_FRAME_BYTES", LARGEST_FRAME_BYTES)
    defaults = Cutter.__init__.__defaults__
    assert defaults is not None
    monkeypatch.setattr(Cutter.__init__, "__defaults__", (FRAME_BYTES, *defaults[1:]))


class Kept(Progress):
    """I1: what was acknowledged of an epoch is not asked for again, whatever happened."""

    _most = 0

    @property
    def done(self) -> int:
        return self._most

    @done.setter
    def done(self, size: int) -> None:
        if size < self._most:
            raise Violation(f"I1: {size} bytes are there, {self._most} were acknowledged")
        self._most = size


class World:
    """A sender, a line and a machine, and what is done to them; one seed is one life of it all."""

    def __init__(self, path: Path, seed: int, sock: socket.socket) -> None:
        self.rng = random.Random(seed)
        self.loop = asyncio.get_running_loop()
        self.line = Line(self.rng, sock)
        self.happened: Counter[str] = Counter()
        self._path = path
        self._contents = {name: self.rng.randbytes(size) for name, size in SIZES.items()}
        self._sending: asyncio.Task[Outcome] | None = None
        self._over_s = 0.0

    @property
    def machine(self) -> Machine:
        assert self.line.machine is not None, "it was never started"
        return self.line.machine

    async def live(self) -> None:
        """Epoch after epoch, to the images. Raises ``Violation``."""
        tending = self.loop.create_task(self._tend())
        for epoch in range(EPOCHS):
            self._rewrite(epoch)
            faults = [self.loop.create_task(self._fault()) for _ in range(self.rng.randint(0, FAULTS_MAX))]
            await self._sealed(epoch)
            await asyncio.gather(*faults)
            await self._sealed(epoch)
            late_s = self.loop.time() - self._over_s
            if late_s > ENDS_S:
                raise Violation(f"I6: {late_s:.0f} s after the last fault")
            self._images_hold(epoch)
        self.line.cut()
        await asyncio.sleep(CALM_S)
        if self.line.violations or self.machine.defects:
            raise Violation(f"{self.line.violations} {self.machine.defects}")
        if left := asyncio.all_tasks() - {tending, asyncio.current_task()}:
            raise Violation(f"I7: tasks are left: {left}")
        tending.cancel()
        await self._switch_off(self.machine)

    async def _tend(self) -> None:
        """Start the machine, and again whenever its power was cut; that may be while it starts."""
        while True:
            self.line.machine = machine = Machine(self._path, self.rng)
            if self.rng.random() < 0.3:
                machine.files.cut_before(self.rng.randint(1, 60))
            await machine.start()
            self.happened["cut in a start"] += not machine.on
            await machine.workers.off.wait()
            await self._switch_off(machine)
            await asyncio.sleep(self.rng.uniform(0.1, 30.0))
            self._over_s = self.loop.time()

    async def _switch_off(self, machine: Machine) -> None:
        self.line.die()
        await machine.stop()
        machine.files.power_cut()

    async def _sealed(self, epoch: int) -> Outcome:
        """The sender tries until the images hold the epoch, however often it is killed."""
        while True:
            progress, breaks = Kept(), list[str]()
            self._sending = self.loop.create_task(self._send(epoch, progress, breaks))
            await asyncio.wait([self._sending])
            if not self._sending.cancelled():
                outcome = self._sending.result()
                if progress.resent > len(breaks) * RESENT_MAX_BYTES:
                    raise Violation(f"{progress.resent} bytes were sent again in {len(breaks)} breaks")
                self.happened["breaks"] += len(breaks)
                return outcome

    async def _send(self, epoch: int, progress: Progress, breaks: list[str]) -> Outcome:
        disks = []
        for name, content in self._contents.items():
            source = MemorySource(content)
            source.seen_as = f"as at epoch {epoch}"
            disks.append(DiskToSend(name, source, 1 + epoch))
        workers, clock = VirtualWorkers(self.rng), VirtualClock()
        remembered = memory(self._path / "state")
        sender = Sender(
            self.line.dial, cast(Any, workers), FixedLevel(0), remembered, 3, progress, breaks.append
        )
        try:
            attempt = partial(sender.send, "group", disks, settle=True)
            outcome = await keep_trying(attempt, lambda: True, breaks.append, clock, None)
            if not outcome.settled:
                settled = partial(sender.settled, "group", disks, outcome.epoch)
                await keep_trying(settled, lambda: True, breaks.append, clock, None)
            return outcome
        finally:
            sender.close()

    def _rewrite(self, epoch: int) -> None:
        for name, content in self._contents.items() if epoch else ():
            changed = bytearray(content)
            for _ in range(self.rng.randint(1, 6)):
                length = 512 * self.rng.randint(1, 200)
                start = 512 * self.rng.randrange((len(content) - length) // 512)
                zero = self.rng.random() < 0.2
                changed[start : start + length] = bytes(length) if zero else self.rng.randbytes(length)
            self._contents[name] = bytes(changed)

    def _images_hold(self, epoch: int) -> None:
        for name, content in self._contents.items():
            image = self._path / "disks" / f"{name}-flat.vmdk"
            wrong = difference(image.read_bytes(), content)
            if wrong:
                raise Violation(f"I2: image {name} at epoch {epoch}: {wrong}")

    async def _fault(self) -> None:
        """One thing that goes wrong, at some time, and is over at some later one."""
        soon = self.rng.random() < 0.8  # most of it is over then, if nothing goes wrong
        await asyncio.sleep(self.rng.uniform(0, 1.0 if soon else FAULTS_S))
        fault = self.rng.choice((self._cut, self._silence, self._kill, self._power_cut))
        self.happened[fault.__name__] += 1
        await fault()
        self._over_s = max(self._over_s, self.loop.time())

    async def _cut(self) -> None:
        self.line.cut_after(self.rng.randrange(1, sum(SIZES.values()) // 2))

    async def _silence(self) -> None:
        silence_s = self.rng.choice((0.3, 3.0, 14.0, 40.0)) * self.rng.random()
        self.line.silent_until_s = max(self.line.silent_until_s, self.loop.time() + silence_s)
        await asyncio.sleep(silence_s)

    async def _kill(self) -> None:
        if self._sending is not None:
            self._sending.cancel()

    async def _power_cut(self) -> None:
        """At a call soon; at the latest after a while."""
        machine = self.machine
        if machine.on:
            machine.files.cut_before(self.rng.randint(1, 60))
            await asyncio.sleep(5.0)
            machine.workers.off.set()


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    """One of which the system says that all has arrived."""
    one, other = socket.socketpair()
    with one, other:
        yield one


def live(path: Path, seed: int, sock: socket.socket) -> Counter[str]:
    """One life; what happened in it. Raises ``Violation`` with what replays it."""
    path.mkdir()
    random.seed(seed)  # the waits between tries are drawn from it
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)

    async def whole() -> World:
        world = World(path, seed, sock)
        await world.live()
        return world

    try:
        return loop.run_until_complete(whole()).happened
    except (AssertionError, ReplicatorError, RuntimeError) as error:
        raise Violation(f"life {seed:#x}, at {loop.time():.3f} s: {type(error).__name__}: {error}") from error
    finally:
        loop.end()
        asyncio.set_event_loop(None)
        loop.close()
        shutil.rmtree(path)


@pytest.mark.timeout(0)
def test_whatever_line_and_machines_do_every_epoch_arrives(
    in_memory: Path, seed: int, sock: socket.socket, count: Callable[[int, int], int]
) -> None:
    happened: Counter[str] = Counter()
    for number in range(count(24, 20_000)):
        happened += live(in_memory / f"{number}", seed + number, sock)
    assert all(happened[f"_{fault}"] for fault in ("cut", "silence", "kill", "power_cut")), happened
    print(f"{dict(happened)}")


def test_a_build_that_acknowledges_before_it_syncs_is_caught(
    in_memory: Path, seed: int, sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SegmentFile, "sync_data", lambda self: None)
    with pytest.raises(Violation):
        for number in range(CAUGHT_IN):
            live(in_memory / f"{number}", seed + number, sock)
