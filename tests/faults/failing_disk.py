"""A disk that fails as told: ext4 on a loop device on a file of nbdfuse, which nbdkit serves, or does not.

It freezes, is slow, answers EIO to any request, or loses what was written and not flushed. Wants root, and
`nbdkit`, `nbdfuse`, `losetup` and `mkfs.ext4`: mark the tests that use it with `peer`.
"""

import os
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.real_disks import loop_device, run

SIZE_BYTES: Final = 640 << 20  # sparse
READY_S: Final = 20.0
SLOW_MS: Final = 3
EIO: Final = ("--filter=error", "error=EIO")


class FailingDisk:
    """Mounted at `place`; `serve` takes the filters of nbdkit."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "mounted"
        self._image, self._fuse = folder / "image", folder / "fuse"
        self._told, self._pause = folder / "fails", folder / "pause"
        for made in (folder, self.place, self._fuse):
            made.mkdir()
        with self._image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        run("mkfs.ext4", "-qF", "-m", "0", self._image)

    @contextmanager
    def mounted(self, *filters: str) -> Iterator[None]:
        """Served with these filters of nbdkit and mounted. At the end nobody uses it any more."""
        with self._served(filters), loop_device(self._fuse / "disk") as device:
            run("mount", device, self.place)
            try:
                yield
            finally:
                run("umount", self.place)

    def random_errors(self) -> tuple[str, ...]:
        """Filters: while it fails, a fifth of all requests do."""
        return (*EIO, "error-rate=20%", f"error-file={self._told}")

    def volatile_cache(self) -> tuple[str, ...]:
        """Filters: what is written reaches the disk when it is flushed; while it fails, flushes fail, and
        what was to be flushed is gone once nobody serves the disk any more.
        """
        return (
            "--filter=cache",
            "cache=writeback",
            *EIO,
            "error-pwrite-rate=100%",
            f"error-pwrite-file={self._told}",
        )

    def slow_writes(self) -> tuple[str, ...]:
        """Filters: each write takes a while, and most wait for others."""
        return ("--filter=noparallel", "--filter=delay", "serialize=requests", f"delay-write={SLOW_MS}ms")

    def fail(self) -> None:
        """From now on."""
        self._told.touch()

    def heal(self) -> None:
        """It does not fail any more."""
        self._told.unlink()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing that is asked of it is answered."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self._pause))
            tell(control, b"p")
            try:
                yield
            finally:
                tell(control, b"r")

    @contextmanager
    def _served(self, filters: tuple[str, ...]) -> Iterator[None]:
        ready = self._fuse.with_name("ready")
        os.mkfifo(ready)
        names = [word for word in filters if word.startswith("--")]
        settings = [word for word in filters if not word.startswith("--")]
        pause = f"pause-control={self._pause}"
        nbdkit = ("nbdkit", "-s", "--exit-with-parent", "--filter=pause", *names)
        command = ("nbdfuse", "-P", ready, self._fuse / "disk", "--command", *nbdkit, "file", self._image)
        with ExitStack() as ending:
            environment = {**os.environ, "TMPDIR": str(self._fuse.parent)}  # where a cache lies
            served = subprocess.Popen(
                tuple(map(str, (*command, pause, *settings))), env=environment, stderr=subprocess.DEVNULL
            )
            ending.callback(served.wait, READY_S)
            ending.callback(ready.unlink)
            wait_for_word(ready, served)
            # Lazily: the loop device lets go of it a little later than it says.
            ending.callback(run, "umount", "--lazy", self._fuse)
            yield


def tell(control: socket.socket, command: bytes) -> None:
    """Have nbdkit's filter do so; it has when this returns."""
    control.sendall(command)
    assert control.recv(1) == command.upper()


def wait_for_word(fifo: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the process has written there, and so long as it lives."""
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    pidfd = os.pidfd_open(process.pid)
    try:
        found = select.select([reading, pidfd], [], [], READY_S)[0]
        assert found == [reading], f"{process.args!r} is not ready: {found}"
    finally:
        os.close(pidfd)
        os.close(reading)
