"""Real file systems, cut off in the middle of the story of a real process, mounted again: I1 to I4 hold."""

import fcntl
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from replicator.errors import ReplicatorError
from tests.faults.checks import recovers
from tests.faults.oracle import Oracle, Violation
from tests.house.tree import ROOT

SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
NO_LOG_FLUSH = struct.pack("I", 2)
SIZES = {"ext4": 64 << 20, "xfs": 320 << 20}  # below 300 MiB there is no XFS
MKFS = {"ext4": ("mkfs.ext4", "-qF"), "xfs": ("mkfs.xfs", "-qf")}
EVENTS = 85  # a story has some more: where in it the cut falls is drawn by seed


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Disk:
    """A loop device with a file system, mounted at `place` or not."""

    def __init__(self, folder: Path, device: str) -> None:
        self.place = folder / "mounted"
        self.place.mkdir()
        self._device = device
        self._mounted = False

    def mount(self) -> None:
        run("mount", self._device, self.place)
        self._mounted = True

    def unmount(self) -> None:
        if self._mounted:
            run("umount", self.place)
            self._mounted = False

    def cut_off(self) -> None:
        """Nothing gets through any more, and what was not synced never did."""
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, NO_LOG_FLUSH)
        finally:
            os.close(fd)


@contextmanager
def disk(folder: Path, kind: str) -> Iterator[Disk]:
    """A new file system; whatever happens, it is unmounted and its device is given back."""
    folder.mkdir()
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(SIZES[kind])
    run(*MKFS[kind], image)
    device = run("losetup", "--find", "--show", image)
    try:
        made = Disk(folder, device)
        try:
            made.mount()
            yield made
        finally:
            made.unmount()
    finally:
        run("losetup", "--detach", device)


def cut_off(folder: Path, kind: str, seed: int, *how: str, through: Sequence[str] = ()) -> str:
    """One story, cut off somewhere. What recovery was; raises ``Violation`` with what replays it.

    ``through``: the program that the story is run by.
    """
    rng = random.Random(seed)
    oracle, left = Oracle(seed), rng.randrange(1, EVENTS)
    with disk(folder, kind) as made:
        command = (*through, sys.executable, "-m", "tests.faults.child", str(made.place), str(seed), *how)
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout is not None
        try:
            for line in child.stdout:
                event, *args = json.loads(line)
                getattr(oracle, event)(*args)
                left -= 1
                if not left:
                    made.cut_off()  # the child does not wait: it is anywhere behind this event
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if left > 0:
            made.cut_off()
        made.unmount()
        made.mount()
        try:
            return recovers(made.place, oracle, rng)
        except (AssertionError, OSError, ReplicatorError) as error:
            where = f"{kind}, seed {seed:#x}, cut off after {oracle.answered} were sealed"
            raise Violation(f"{where}: {type(error).__name__}: {error}") from error


@pytest.mark.peer("losetup", "mkfs.ext4", "mkfs.xfs")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_a_file_system_does_when_it_is_cut_off_costs_nothing_promised(
    in_memory: Path, seed: int, count: Callable[[int, int], int], kind: str
) -> None:
    for number in range(count(5, 500)):
        what = cut_off(in_memory / f"{number}", kind, seed + number)
        (in_memory / f"{number}" / "image").unlink()
        print(f"{kind}, seed {seed + number:#x}: {what}")


@pytest.mark.peer("losetup", "mkfs.ext4", "eatmydata")
@pytest.mark.parametrize(
    ("how", "through"), [(("careless",), ()), ((), ("eatmydata",))], ids=["Files", "libeatmydata"]
)
def test_where_nothing_is_synced_it_is_caught(
    in_memory: Path, seed: int, how: Sequence[str], through: Sequence[str]
) -> None:
    with pytest.raises(Violation):
        for number in range(5):
            cut_off(in_memory / f"{number}", "ext4", seed + number, *how, through=through)
