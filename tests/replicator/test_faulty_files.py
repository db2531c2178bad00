"""The I/O seam's double does what tests rely on: it records, fails on order, and its power cuts do harm."""

import errno
import itertools
import os
from pathlib import Path

import pytest

from replicator import linux
from replicator.files import Files, replace_file, write_fully
from tests.faulty_files import Call, FaultyFiles, PowerCut

OLD = b"old " * 700
NEW = b"new " * 900


def directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def written(files: Files, path: Path, content: bytes) -> int:
    fd = files.open(path, os.O_RDWR | os.O_CREAT)
    write_fully(files, fd, content, 0)
    return fd


def hasty_replace(files: Files, dir_fd: int, name: str, content: bytes) -> None:
    """`replace_file` without its fsync of the content: what the double has to catch."""
    fd = files.open_beneath(dir_fd, ".hasty", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write_fully(files, fd, content, 0)
    files.close(fd)
    files.rename(dir_fd, ".hasty", name)
    files.fsync(dir_fd)


def after_power_cut(folder: Path, seed: int, kth: int | None, replace) -> tuple[bytes, bool]:
    """Content of `name` after a power cut before the `kth` call, or after the last; and which it was."""
    folder.mkdir()
    (folder / "name").write_bytes(OLD)
    dir_fd = directory(folder)
    files = FaultyFiles(seed)
    if kth is not None:
        files.cut_before(kth)
    cut = False
    try:
        replace(files, dir_fd, "name", NEW)
    except PowerCut:
        cut = True
    files.power_cut()
    os.close(dir_fd)
    return (folder / "name").read_bytes(), cut


def test_replace_file_leaves_old_or_new_content_wherever_the_power_is_cut(tmp_path: Path, count) -> None:
    seen = set()
    for seed in range(count(300, 5000)):
        for kth in itertools.count(1):
            content, cut = after_power_cut(tmp_path / f"{seed}-{kth}", seed, kth, replace_file)
            assert content in {OLD, NEW}, f"seed {seed}, before call {kth}: {len(content)} bytes of neither"
            seen.add((content == NEW, cut))
            if not cut:
                assert content == NEW, f"seed {seed}: lost although replace_file had returned"
                break
    assert seen == {(False, True), (True, True), (True, False)}, "cuts must show both contents"


def test_a_replacement_without_fsync_is_caught(tmp_path: Path) -> None:
    found = [after_power_cut(tmp_path / f"{seed}", seed, None, hasty_replace)[0] for seed in range(20)]
    torn = [content for content in found if content not in {OLD, NEW}]
    assert len(torn) > 10


def test_unsynced_sectors_survive_singly(tmp_path: Path, seed: int) -> None:
    (tmp_path / "file").write_bytes(b"a" * 512 * 64)
    files = FaultyFiles(seed)
    fd = files.open(tmp_path / "file", os.O_RDWR)
    write_fully(files, fd, b"b" * 512 * 64, 0)
    files.power_cut()
    content = (tmp_path / "file").read_bytes()
    sectors = {content[at : at + 512] for at in range(0, len(content), 512)}
    assert sectors == {b"a" * 512, b"b" * 512}


@pytest.mark.parametrize("sync", ["fsync", "fdatasync"])
def test_synced_content_survives(tmp_path: Path, seed: int, sync: str) -> None:
    files = FaultyFiles(seed)
    dir_fd = directory(tmp_path)
    fd = written(files, tmp_path / "file", NEW)
    getattr(files, sync)(fd)
    files.fsync(dir_fd)
    files.power_cut()
    os.close(dir_fd)
    assert (tmp_path / "file").read_bytes() == NEW


def test_a_sector_may_come_back_as_it_was_between_two_writes(tmp_path: Path) -> None:
    found = set()
    for seed in range(40):
        files = FaultyFiles(seed)
        path = tmp_path / f"{seed}"
        path.write_bytes(b"0" * 512)
        fd = files.open(path, os.O_RDWR)
        files.pwrite(fd, b"1" * 512, 0)
        files.pwrite(fd, b"2" * 512, 0)
        files.power_cut()
        found.add(path.read_bytes()[:1])
    assert found == {b"0", b"1", b"2"}


def test_what_a_failed_fsync_covered_is_not_saved_by_the_next_one(tmp_path: Path) -> None:
    lost = 0
    for seed in range(20):
        path = tmp_path / f"{seed}"
        path.write_bytes(b"0" * 512 * 8)
        files = FaultyFiles(seed)
        fd = files.open(path, os.O_RDWR)
        files.pwrite(fd, b"1" * 512 * 8, 0)
        files.fail("fdatasync", 1, errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            files.fdatasync(fd)
        files.fdatasync(fd)
        files.power_cut()
        lost += path.read_bytes() != b"1" * 512 * 8
    assert lost > 15


def test_a_creation_is_durable_only_after_the_fsync_of_its_directory(tmp_path: Path) -> None:
    there = set()
    for seed in range(20):
        files = FaultyFiles(seed)
        fd = written(files, tmp_path / f"{seed}", NEW)
        files.fsync(fd)
        files.power_cut()
        there.add((tmp_path / f"{seed}").exists())
    assert there == {True, False}


def test_an_unsynced_removal_may_come_back_with_its_content(tmp_path: Path) -> None:
    there = set()
    dir_fd = directory(tmp_path)
    for seed in range(20):
        path = tmp_path / f"{seed}"
        path.write_bytes(OLD)
        files = FaultyFiles(seed)
        files.unlink(dir_fd, path.name)
        assert not path.exists()
        files.power_cut()
        there.add(path.exists() and path.read_bytes())
    os.close(dir_fd)
    assert there == {OLD, False}


@pytest.mark.parametrize(
    "change",
    [
        lambda files, fd: files.fallocate(
            fd, linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE, 0, 64 * 1024
        ),
        lambda files, fd: files.truncate(fd, 0),
    ],
    ids=["punch", "truncate"],
)
def test_what_was_punched_or_cut_off_may_come_back(tmp_path: Path, change) -> None:
    contents: set[int | None] = set()
    for seed in range(30):
        path = tmp_path / f"{seed}"
        path.write_bytes(b"x" * 64 * 1024)
        files = FaultyFiles(seed)
        fd = files.open(path, os.O_RDWR)
        change(files, fd)
        files.power_cut()
        contents |= set(path.read_bytes()[::512] or [None])
    assert ord("x") in contents
    assert contents & {0, None}


def test_the_same_seed_tears_in_the_same_way(tmp_path: Path, seed: int) -> None:
    found = [after_power_cut(tmp_path / f"{run}", seed, None, hasty_replace)[0] for run in range(2)]
    assert found[0] == found[1]


def test_calls_are_recorded_and_fail_on_order(tmp_path: Path) -> None:
    files = FaultyFiles()
    fd = files.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    files.fail("pwrite", 2, errno.ENOSPC)
    files.shorten("pwrite", 3, 3)
    files.shorten("preadv", 1, 2)
    assert files.pwrite(fd, b"12345", 0) == 5
    with pytest.raises(OSError, match="No space") as caught:
        files.pwrite(fd, b"xxxxx", 0)
    assert caught.value.errno == errno.ENOSPC
    assert files.pwrite(fd, b"abcde", 5) == 3
    found = bytearray(8)
    assert files.preadv(fd, [memoryview(found)], 0) == 2
    assert files.preadv(fd, [memoryview(found)], 0) == 8
    assert found == b"12345abc"
    files.fail("any", 1, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        files.fstat(fd)
    files.let_go()
    assert files.calls[:2] == [Call("open", "file"), Call("pwrite", "file", 0, 5)]
    assert [call.kind for call in files.calls[4:]] == ["preadv", "preadv", "fstat"]


def test_nothing_is_done_once_the_power_is_off(tmp_path: Path) -> None:
    files = FaultyFiles()
    files.cut_before(2)
    fd = files.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for _ in range(2):
        with pytest.raises(PowerCut):
            files.pwrite(fd, b"x", 0)
    assert os.fstat(fd).st_size == 0
    files.let_go()
    assert len(files.calls) == 1
