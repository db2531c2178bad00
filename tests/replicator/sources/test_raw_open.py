"""What a raw source refuses to open, each with its code; and that nothing is left open or changed."""

import asyncio
import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.payload import Extent
from replicator.files import Files
from replicator.sources.raw import RawSource
from tests.real_disks import loop_device
from tests.replicator.sources.conformance import extents_of, nothing, read, refused

NOBODY = 65534
MIB = 1 << 20


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# ------------------------------------------------------------------ opening


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, "source.missing"),
        (lambda path: path.symlink_to("nowhere"), "source.missing"),
        (lambda path: path.mkdir(), "source.unsuitable"),
        (os.mkfifo, "source.unsuitable"),
        (make_socket, "source.unsuitable"),
        (lambda path: path.symlink_to("/dev/null"), "source.unsuitable"),
        (lambda path: path.symlink_to("disk"), "source.unreadable"),  # a loop of links
        (lambda path: path.write_bytes(b""), "source.empty"),
        (lambda path: path.write_bytes(b"x" * 511), "source.misaligned"),
        (lambda path: path.write_bytes(b"x" * 1025), "source.misaligned"),
    ],
    ids=["none", "dangling", "directory", "fifo", "socket", "character", "links", "empty", "511", "1025"],
)
async def test_what_is_no_disk_is_refused_and_left_closed(tmp_path: Path, workers, make, code: str) -> None:
    make(tmp_path / "disk")
    before = open_descriptors()
    with refused(code, str(tmp_path / "disk")):
        await RawSource.open(Files(), workers, tmp_path / "disk")
    assert open_descriptors() == before


async def test_a_path_through_a_file_is_missing(path: Path, workers) -> None:
    with refused("source.missing"):
        await RawSource.open(Files(), workers, path / "below")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, "source.unreadable"),
        (errno.EIO, "source.unreadable"),
        (errno.ENXIO, "source.unsuitable"),
        (errno.ENOMEDIUM, "source.unsuitable"),
    ],
)
@pytest.mark.parametrize("call", ["open", "fstat"])
async def test_an_error_on_opening_has_its_code(path, workers, faulty, number, code, call) -> None:
    faulty.fail(call, 1, number)
    before = open_descriptors()
    with refused(code, str(path)):
        await RawSource.open(faulty, workers, path)
    assert open_descriptors() == before


@pytest.fixture
def as_nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The test runs with the file rights of an unprivileged user."""
    if os.geteuid() != 0:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    for folder in (base, *base.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(0o755)
    yield
    os.seteuid(0)


async def test_a_file_that_this_user_may_not_read_is_unreadable(path: Path, workers, as_nobody) -> None:
    path.chmod(0)
    os.seteuid(NOBODY if os.geteuid() == 0 else os.geteuid())
    with refused("source.unreadable", "Permission denied"):
        await RawSource.open(Files(), workers, path)


async def test_a_file_of_somebody_else_is_read_without_o_noatime(path: Path, workers, as_nobody) -> None:
    if os.geteuid() != 0:
        pytest.fail("needs root, to give up root's rights", pytrace=False)
    path.chmod(0o644)
    path.parent.chmod(0o755)
    os.seteuid(NOBODY)
    with pytest.raises(PermissionError):
        os.open(path, os.O_RDONLY | os.O_NOATIME)
    source = await RawSource.open(Files(), workers, path)
    assert await read(source, 0, 512) == b"x" * 512
    await source.close()


async def test_reading_leaves_no_trace_on_the_file(path: Path, workers) -> None:
    os.utime(path, ns=(10**18, 2 * 10**18))  # an access time that relatime would renew
    before = path.stat()
    source = await RawSource.open(Files(), workers, path)
    await extents_of(source)
    await read(source, 0, MIB)
    await source.close()
    after = path.stat()
    assert (after.st_atime_ns, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_atime_ns,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )


@pytest.mark.peer("losetup")
async def test_a_device_without_content_is_empty(tmp_path: Path, workers) -> None:
    (tmp_path / "nothing").touch()
    with loop_device(tmp_path / "nothing") as device, refused("source.empty", "backing file"):
        await RawSource.open(Files(), workers, device)


# ------------------------------------------------------------------ cancellation


class Gate(Files):
    """Files whose `open` or `preadv` waits at a gate."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.loop = asyncio.get_running_loop()
        self.begun = asyncio.Event()
        self.let = threading.Event()

    async def reached_by(self, task: asyncio.Task) -> None:
        """Wait until the gate is reached; a task that fails before fails the test."""
        reached = asyncio.create_task(self.begun.wait())
        await asyncio.wait({task, reached}, return_when=asyncio.FIRST_COMPLETED)
        if not reached.done():
            reached.cancel()
            await task

    def _wait(self, kind: str) -> None:
        if kind == self.kind:
            self.loop.call_soon_threadsafe(self.begun.set)
            assert self.let.wait(60)

    def open(self, path, flags, mode=0o600):
        self._wait("open")
        return super().open(path, flags, mode)

    def preadv(self, fd, buffers, offset):
        self._wait("preadv")
        return super().preadv(fd, buffers, offset)


async def turns(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_opening_that_is_cancelled_leaves_nothing_open(path: Path, workers) -> None:
    await workers.run(int)  # whatever a first thread opens
    before = open_descriptors()
    gate = Gate("open")
    opening = asyncio.create_task(RawSource.open(gate, workers, path))
    await gate.reached_by(opening)
    opening.cancel()
    await turns()
    gate.let.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert open_descriptors() == before


async def test_closing_waits_for_the_reads_under_way(path: Path, workers) -> None:
    gate = Gate("preadv")
    source = await RawSource.open(gate, workers, path)
    reading = asyncio.create_task(read(source, 0, 512))
    await gate.reached_by(reading)
    closing = asyncio.create_task(source.close())
    again = asyncio.create_task(source.close())
    await turns()
    again.cancel()
    await turns()
    assert not closing.done()
    gate.let.set()
    assert await reading == b"x" * 512
    await closing
    with pytest.raises(asyncio.CancelledError):
        await again


async def test_a_cancelled_read_ends_before_its_buffer_is_free(path: Path, workers) -> None:
    gate = Gate("preadv")
    source = await RawSource.open(gate, workers, path)
    buffer = bytearray(512)
    reading = asyncio.create_task(source.read_into([Extent(0, 512)], memoryview(buffer), nothing))
    await gate.reached_by(reading)
    for _ in range(3):
        reading.cancel()
        await turns()
        assert not reading.done()
    gate.let.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert buffer == b"x" * 512
    await source.close()
