"""The helpers above the I/O seam: whole reads and writes, small files, replacement."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.files import Files, read_fully, read_small_file, replace_file, write_fully
from tests.faulty_files import Call, FaultyFiles


@pytest.fixture
def dir_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    files = FaultyFiles()
    fd = files.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for kth in range(1, 5):
        files.shorten("pwrite", kth, 3)
    write_fully(files, fd, b"0123456789abcdef", 5)
    files.let_go()
    assert (tmp_path / "file").read_bytes() == b"\0" * 5 + b"0123456789abcdef"


def test_a_write_that_writes_nothing_is_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    files = FaultyFiles()
    fd = files.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    files.shorten("pwrite", 1, 0)
    with pytest.raises(OSError, match="nothing") as caught:
        write_fully(files, fd, b"x", 0)
    assert caught.value.errno == errno.EIO
    files.let_go()


def test_short_reads_are_gone_on_with_up_to_the_end_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    files = FaultyFiles()
    fd = files.open(tmp_path / "file", os.O_RDONLY)
    files.shorten("preadv", 1, 4)
    found = bytearray(16)
    assert read_fully(files, fd, memoryview(found), 2) == 8
    assert found == b"23456789" + bytes(8)
    files.let_go()


def test_a_small_file_is_read_whole_and_a_larger_one_refused(tmp_path: Path, dir_fd: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert read_small_file(Files(), dir_fd, "file", 100) == b"x" * 100
    with pytest.raises(OSError, match="larger") as caught:
        read_small_file(Files(), dir_fd, "file", 99)
    assert caught.value.errno == errno.EFBIG


def test_a_fifo_in_the_place_of_a_small_file_holds_nobody(tmp_path: Path, dir_fd: int) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(OSError, match="Illegal seek"):
        read_small_file(Files(), dir_fd, "file")


@pytest.mark.parametrize("escape", ["../outside", "/etc/hostname", "link", "folder/../../outside"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_CREAT])
def test_nothing_is_opened_outside_the_directory(tmp_path: Path, escape: str, flags: int) -> None:
    inside = tmp_path / "inside"
    (inside / "folder").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"secret")
    (inside / "link").symlink_to(tmp_path / "outside")
    fd = os.open(inside, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(OSError) as caught:
        Files().open_beneath(fd, escape, flags)
    os.close(fd)
    assert caught.value.errno in {errno.EXDEV, errno.ELOOP}
    assert (tmp_path / "outside").read_bytes() == b"secret"


def test_replace_file_syncs_content_before_the_rename_and_the_directory_after_it(
    tmp_path: Path, dir_fd: int
) -> None:
    files = FaultyFiles()
    replace_file(files, dir_fd, "state", b"content", 0o640)
    files.let_go()
    assert files.calls == [
        Call("open", ".state.new"),
        Call("pwrite", ".state.new", 0, 7),
        Call("fsync", ".state.new"),
        Call("close", ".state.new"),
        Call("rename", "state"),
        Call("fsync", tmp_path.name),
    ]
    assert (tmp_path / "state").read_bytes() == b"content"
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_replace_file_that_fails_at_any_step_leaves_old_or_new_and_can_be_repeated(
    tmp_path: Path, dir_fd: int, error: int
) -> None:
    steps = 6
    for kth in {*range(1, steps + 1)} - {4}:  # the fourth closes, which has nothing to tell
        (tmp_path / "state").write_bytes(b"old")
        files = FaultyFiles()
        files.fail("any", kth, error)
        with pytest.raises(OSError) as caught:
            replace_file(files, dir_fd, "state", b"new")
        assert caught.value.errno == error
        assert (tmp_path / "state").read_bytes() == (b"new" if kth == steps else b"old")
        replace_file(files, dir_fd, "state", b"again")
        files.let_go()
        assert (tmp_path / "state").read_bytes() == b"again"


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_close_that_fails_is_no_news_and_lets_the_descriptor_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    really_close = os.close

    def failing_close(fd: int) -> None:
        really_close(fd)
        raise OSError(error, os.strerror(error))

    fd = Files().open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", failing_close)
        Files().close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_descriptor_that_is_closed_twice_is_told_as_the_defect_that_it_is(tmp_path: Path) -> None:
    fd = Files().open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
    Files().close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Files().close(fd)


def test_descriptors_are_not_inherited_by_children(tmp_path: Path, dir_fd: int) -> None:
    opened = [
        Files().open(tmp_path / "a", os.O_WRONLY | os.O_CREAT),
        Files().open_beneath(dir_fd, "b", os.O_WRONLY | os.O_CREAT),
    ]
    assert not any(os.get_inheritable(fd) for fd in opened)
    for fd in opened:
        os.close(fd)
