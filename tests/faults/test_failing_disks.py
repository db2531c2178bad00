"""Disks that are slow, freeze, fail or lose what was not flushed, under a target that receives a group.

Real processes on real file systems; the sender runs in the test, which so knows what it was acknowledged.
"""

import asyncio
import errno
import os
import random
import select
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agents.process_server import send
from agents.send_config import DiskConfig, SendConfig, SendReport
from replicator.clock import Clock
from replicator.errors import ReplicatorError
from replicator.files import Files
from replicator.framing import Progress
from replicator.transport.dial import Address
from tests.agents.harness import MIB, Target, identical, receiving
from tests.agents.proxy import Proxy, proxy
from tests.faults.failing_disk import FailingDisk
from tests.faults.oracle import Violation

pytestmark = [
    pytest.mark.peer("qemu-img", "nbdkit", "nbdfuse", "losetup", "mkfs.ext4"),
    pytest.mark.timeout(0),
]

SMALL = {"system": 40 * MIB, "data": 8 * MIB}
LARGE = {"system": 88 * MIB, "data": 8 * MIB}  # more than is granted at once
HEADERS_BYTES = 32 * 1024  # of all frames
WINDOW_BYTES = 48 * MIB
PEAK_MAX_BYTES = 192 * MIB
TOLD = (os.strerror(errno.EIO), os.strerror(errno.EROFS))


class Sent(NamedTuple):
    """What came of a send: `acked` bytes are durable by the target's word."""

    acked: int
    report: SendReport | None
    error: ReplicatorError | None
    told: Sequence[str]


class Group:
    """The disks that are replicated, and who sends them."""

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self.total_bytes = sum(sizes.values())
        self._folder = folder
        self._sizes = sizes
        self.token = ""
        self.rewrite()

    def rewrite(self) -> None:
        """All of them hold something new."""
        for name, size in self._sizes.items():
            (self._folder / f"{name}.img").write_bytes(os.urandom(size))

    def arrived(self, directory: Path) -> bool:
        """Whether the images there are the disks, byte for byte."""
        return all(
            identical(self._folder / f"{name}.img", directory / f"{name}.vmdk") for name in self._sizes
        )

    async def sent(self, address: str, progress: Progress, *, patient: bool = False) -> Sent:
        """Send them; without patience, to the first error."""
        disks = tuple(DiskConfig(name, str(self._folder / f"{name}.img")) for name in self._sizes)
        config = SendConfig(
            group="web",
            disks=disks,
            to=Address.parse(address),
            token=self.token,
            state=self._folder / "state",
            streams=2,
            level=0,
            quiesced=True,
            give_up_after_s=None if patient else 0.0,
        )
        told: list[str] = []
        try:
            report = await send(config, progress, Clock(), Files(), told.append)
        except ReplicatorError as error:
            return Sent(progress.done, None, error, told)
        return Sent(progress.done, report, None, told)

    def send(self, target: Target) -> Sent:
        """Send them to a target, to the end."""
        self.token = target.token
        return asyncio.run(self.sent(target.address, Progress()))

    def send_while(
        self, target: Target, after: int, fault: Callable[[Proxy, Progress], object], **how: Any
    ) -> Sent:
        """Send them; once so many bytes have passed, and no more, something happens meanwhile."""
        self.token = target.token

        async def both(line: Proxy) -> Sent:
            progress = Progress()
            sending = asyncio.create_task(self.sent(line.address, progress, **how))
            await asyncio.to_thread(line.wait_passed, after, sending.done)
            line.heal()
            await asyncio.to_thread(fault, line, progress)
            return await sending

        with proxy(target.port) as line:
            line.hold_after(after)
            return asyncio.run(both(line))


def places(failing: FailingDisk, folder: Path, under: str) -> tuple[Path, Path]:
    """Datastore and retention directory, one of them on the disk that fails."""
    found = {name: folder / name for name in ("datastore", "retention")}
    found[under] = failing.place / under
    for path in found.values():
        path.mkdir(parents=True, exist_ok=True)
    return found["datastore"], found["retention"]


def nothing_is_lost(group: Group, found: Sent, directory: Path, retention: Path) -> None:
    """Started again, the target has what it acknowledged; the epoch ends, and the next one too."""
    with receiving(directory, "--retention", retention) as target:
        done = group.send(target)
        assert done.error is None and done.report is not None, done
        again, acked = done.report.sent_bytes, found.acked
        if again > group.total_bytes - acked + HEADERS_BYTES:
            raise Violation(
                f"I1: {again} of {group.total_bytes} bytes were sent again, {acked} were acknowledged"
            )
        if found.report is not None and done.report.mode != "incremental":
            raise Violation("I2: what was sealed is not known any more")
        if not group.arrived(directory):
            raise Violation("I2: an image does not hold what was sealed")
        group.rewrite()
        assert group.send(target).error is None
        assert group.arrived(directory)


def cut(folder: Path, under: str, epochs: int, rng: random.Random, filters: str, **how: Any) -> Sent:
    """A send into which the failing disk comes; afterwards it works again. `how` the target is started.

    Raises:
        Violation: what was acknowledged is not there.
    """
    failing, group = FailingDisk(folder / "disk"), Group(folder, SMALL)
    with failing.mounted(*getattr(failing, filters)()):
        directory, retention = places(failing, folder, under)
        with receiving(directory, "--retention", retention, **how) as target:
            for _ in range(epochs):
                assert group.send(target).error is None
                group.rewrite()
            found = group.send_while(
                target, rng.randrange(MIB, group.total_bytes - 4 * MIB), lambda *_: failing.fail()
            )
    failing.heal()
    with failing.mounted():
        nothing_is_lost(group, found, directory, retention)
    return found


UNDER = pytest.mark.parametrize(
    ("under", "epochs"),
    [("retention", 1), ("datastore", 0), ("datastore", 1)],
    ids=["retention volume", "datastore, first copy", "datastore, behind the log"],
)


@UNDER
@pytest.mark.parametrize("filters", ["random_errors", "volatile_cache"], ids=["EIO", "flush"])
def test_a_disk_that_fails_is_told_and_what_was_acknowledged_is_there_when_it_works_again(
    in_memory: Path, seed: int, count: Callable[[int, int], int], under: str, epochs: int, filters: str
) -> None:
    """Where only flushes fail, what they were to save is gone: so no acknowledgement follows one."""
    rng = random.Random(seed)
    for number in range(count(1, 50)):
        (folder := in_memory / f"{number}").mkdir()
        found = cut(folder, under, epochs, rng, filters)
        shutil.rmtree(folder)
        print(f"{found.acked} bytes of {sum(SMALL.values())} were acknowledged; {found.error!r}")
        assert found.error is not None and any(words in found.error.message for words in TOLD), found
        assert found.error.code and found.error.cause and found.error.fix


@pytest.mark.peer("eatmydata")
def test_a_target_that_syncs_nothing_is_caught(in_memory: Path, seed: int) -> None:
    with pytest.raises(Violation):
        cut(in_memory, "retention", 1, random.Random(seed), "volatile_cache", through=("eatmydata",))


@pytest.mark.parametrize(("under", "epochs"), [("retention", 1), ("datastore", 1)])
def test_a_slow_disk_that_freezes_holds_a_group_up_and_breaks_nothing(
    in_memory: Path, count: Callable[[float, float], float], under: str, epochs: int
) -> None:
    failing, group = FailingDisk(in_memory / "disk"), Group(in_memory, LARGE)

    def freeze(line: Proxy, progress: Progress) -> None:
        with failing.frozen():
            ends = select.select([target.process._pidfd], [], [], count(1.5, 25.0))[0]
            assert not ends, "the target has ended"
            before = progress.done
            assert line.passed - before <= WINDOW_BYTES + HEADERS_BYTES
        target.process.until(lambda: progress.done > before or progress.done == progress.size)

    def freeze_twice(line: Proxy, progress: Progress) -> None:
        freeze(line, progress)
        freeze(line, progress)

    with failing.mounted(*failing.slow_writes()):
        directory, retention = places(failing, in_memory, under)
        with receiving(directory, "--retention", retention) as target:
            for _ in range(epochs):
                assert group.send(target).error is None
                group.rewrite()
            found = group.send_while(target, 8 * MIB, freeze_twice, patient=True)
            assert (found.error, found.told, found.acked) == (None, [], group.total_bytes)
            assert found.report is not None and found.report.resent_bytes == 0
            assert group.arrived(directory)
            peak = target.process.peak_bytes()
    print(
        f"{found.report.seconds} s for {group.total_bytes // MIB} MiB, at most {peak / MIB:.1f} MiB of memory"
    )
    assert peak <= PEAK_MAX_BYTES
