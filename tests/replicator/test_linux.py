"""The system calls of our own, on real file systems and a real block device."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator import linux
from tests.real_disks import loop_device, mounted

MIB = 1 << 20
BENEATH = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "up").symlink_to("..")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep").write_bytes(b"deep")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("name", ["file", "sub/deep", "sub/../file"])
def test_openat2_opens_what_lies_beneath(folder: int, name: str) -> None:
    fd = linux.openat2(folder, name, os.O_RDONLY, 0, BENEATH)
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("link", errno.ELOOP),
        ("up/etc", errno.ELOOP),
        ("..", errno.EXDEV),
        ("../x", errno.EXDEV),
        ("sub/../../x", errno.EXDEV),
        ("/etc/passwd", errno.EXDEV),
        ("missing", errno.ENOENT),
        ("file\0.txt", errno.EINVAL),
    ],
)
def test_openat2_refuses_links_ways_out_and_nonsense(folder: int, name: str, number: int) -> None:
    with pytest.raises(OSError) as caught:
        linux.openat2(folder, name, os.O_RDONLY, 0, BENEATH)
    assert caught.value.errno == number
    assert caught.value.filename == name


def test_openat2_gives_a_new_file_its_mode(folder: int) -> None:
    fd = linux.openat2(folder, "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640, BENEATH)
    assert os.fstat(fd).st_mode & 0o777 == 0o640
    os.close(fd)


# ------------------------------------------------------------------ fallocate

PUNCH = linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE
ZERO = linux.FALLOC_FL_ZERO_RANGE


def check_fallocate(path: Path) -> None:
    """Allocating adds space and no content, keeping the size keeps it, punching gives space back as zeros."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    linux.fallocate(fd, 0, 0, 4 * MIB)
    assert os.fstat(fd).st_size == 4 * MIB
    assert os.fstat(fd).st_blocks * 512 >= 4 * MIB
    linux.fallocate(fd, linux.FALLOC_FL_KEEP_SIZE, 4 * MIB, MIB)
    assert os.fstat(fd).st_size == 4 * MIB
    os.pwrite(fd, b"x" * 4 * MIB, 0)
    before = os.fstat(fd).st_blocks
    linux.fallocate(fd, PUNCH, MIB + 512, 2 * MIB)
    assert os.fstat(fd).st_blocks * 512 <= before * 512 - 2 * MIB + 8192
    content = os.pread(fd, 4 * MIB, 0)
    os.close(fd)
    assert content == b"x" * (MIB + 512) + bytes(2 * MIB) + b"x" * (MIB - 512)


def check_zero_range(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x" * MIB, 0)
    linux.fallocate(fd, ZERO, 1000, 100_000)
    content = os.pread(fd, MIB, 0)
    os.close(fd)
    assert content == b"x" * 1000 + bytes(100_000) + b"x" * (MIB - 101_000)


def test_fallocate_modes_on_the_file_system_of_temporary_files(tmp_path: Path) -> None:
    check_fallocate(tmp_path / "file")


@pytest.mark.peer("losetup", "mount", "umount", "mkfs.ext4", "mkfs.xfs")
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_fallocate_modes_on(kind: str, tmp_path: Path) -> None:
    with mounted(kind, tmp_path) as place:
        check_fallocate(place / "file")
        check_zero_range(place / "file")


def test_fallocate_on_tmpfs() -> None:
    path = Path("/dev/shm") / f"replicator-test-{os.getpid()}"
    try:
        check_fallocate(path)
    finally:
        path.unlink()


def test_fallocate_passes_the_error_on(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(OSError) as caught:
            linux.fallocate(file.fileno(), 0, 0, 0)
        assert caught.value.errno == errno.EINVAL


# ------------------------------------------------------------------ direct I/O


def check_direct(path: Path, alignment: linux.DirectAlignment) -> None:
    """What was told suffices: a direct write of the smallest piece at the smallest offset works."""
    import mmap

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    memory.write(b"d" * len(memory))
    piece = memoryview(memory)[alignment.memory % mmap.PAGESIZE :][: alignment.offset]
    assert os.pwrite(fd, piece, alignment.offset) == alignment.offset
    with pytest.raises(OSError, match="Invalid"):
        os.pwrite(fd, piece[: alignment.offset // 2], 0)
    os.close(fd)


@pytest.mark.peer("losetup", "mount", "umount", "mkfs.ext4", "mkfs.xfs")
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_is_told_of_direct_io_holds_on(kind: str, tmp_path: Path) -> None:
    with mounted(kind, tmp_path) as place:
        fd = os.open(place / "file", os.O_RDWR | os.O_CREAT)
        alignment = linux.direct_alignment(fd)
        os.close(fd)
        assert alignment is not None
        check_direct(place / "file", alignment)


def test_where_direct_io_asks_for_nothing_that_can_be_told_the_answer_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/proc/self/status")):
        fd = os.open(path, os.O_RDONLY)
        assert linux.direct_alignment(fd) is None
        os.close(fd)
    fd = os.memfd_create("tmpfs")
    alignment = linux.direct_alignment(fd)
    os.close(fd)
    assert alignment is None or alignment.offset & (alignment.offset - 1) == 0


def test_a_closed_descriptor_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        linux.direct_alignment(-1)


# ------------------------------------------------------------------ block devices


@pytest.mark.peer("losetup")
def test_block_device_calls_on_a_loop_device(tmp_path: Path) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(b"x" * (3 * MIB + 512))
    with loop_device(backing) as device:
        fd = os.open(device, os.O_RDWR)
        assert linux.block_device_size(fd) == 3 * MIB + 512
        assert linux.logical_sector_size(fd) == 512
        linux.block_device_zero(fd, MIB + 512, MIB)
        os.fsync(fd)
        assert os.pread(fd, 4 * MIB, 0) == b"x" * (MIB + 512) + bytes(MIB) + b"x" * MIB
        with pytest.raises(OSError, match="Invalid"):
            linux.block_device_zero(fd, 100, 512)
        os.close(fd)


@pytest.mark.peer("losetup")
def test_the_logical_sector_size_is_the_device_s_own(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with loop_device(tmp_path / "disk", sector_bytes=4096) as device:
        fd = os.open(device, os.O_RDONLY)
        assert linux.logical_sector_size(fd) == 4096
        os.close(fd)


@pytest.mark.parametrize("call", [linux.block_device_size, linux.logical_sector_size])
def test_a_file_is_no_block_device(call, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Inappropriate"):
        call(file.fileno())
