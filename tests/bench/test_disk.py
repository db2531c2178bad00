"""Disks of real content, changed where and as much as said, compared to the byte."""

import os
import subprocess
from pathlib import Path

import pytest

from bench import disk
from bench.errors import BenchError

MIB = 1 << 20


def sparse(path: Path, size: int, *stretches: tuple[int, int]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in stretches:
            file.seek(offset)
            file.write(os.urandom(length))
    return path


@pytest.mark.peer("mkfs.ext4", "fsck.ext4")
def test_a_disk_is_a_whole_file_system_about_two_thirds_full(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    made = disk.build(image, 64 * MIB, 1)
    assert made.size == image.stat().st_size == 64 * MIB
    assert 0.6 < made.data / made.size < 0.8
    subprocess.run(("fsck.ext4", "-n", "-f", str(image)), check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["disk.img"]


def test_the_files_are_those_of_the_seed() -> None:
    one, same, other = (list(disk.picked(8 * MIB, MIB, seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert 7 * MIB < sum(path.stat().st_size for path in one) <= 8 * MIB
    assert all(path.stat().st_size <= MIB for path in one)


def test_as_many_blocks_change_as_were_asked_for(tmp_path: Path) -> None:
    image = sparse(tmp_path / "disk.img", 4 * MIB)
    assert disk.change(image, 0.10, 7) == 102
    content = image.read_bytes()
    blocks = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    assert sum(any(block) for block in blocks) == 102
    again = sparse(tmp_path / "again.img", 4 * MIB)
    disk.change(again, 0.10, 7)
    assert again.read_bytes() == content


def test_a_copy_is_equal_and_as_sparse(tmp_path: Path) -> None:
    image = sparse(tmp_path / "disk.img", 16 * MIB, (MIB, MIB), (9 * MIB, 4096))
    disk.copy(image, tmp_path / "copy.img")
    assert disk.difference(image, tmp_path / "copy.img") is None
    assert disk.content(tmp_path / "copy.img") == disk.content(image) == (16 * MIB, MIB + 4096)


@pytest.mark.parametrize("offset", [0, 5 * MIB + 1, 16 * MIB - 1])
def test_one_other_byte_is_found_wherever_it_is(tmp_path: Path, offset: int) -> None:
    image = sparse(tmp_path / "disk.img", 16 * MIB, (0, MIB), (16 * MIB - 4096, 4096))
    disk.copy(image, tmp_path / "copy.img")
    with (tmp_path / "copy.img").open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))
    assert disk.difference(image, tmp_path / "copy.img") is not None
    assert disk.difference(tmp_path / "copy.img", image) is not None


def test_a_size_that_differs_is_found(tmp_path: Path) -> None:
    one, other = sparse(tmp_path / "one", 2 * MIB), sparse(tmp_path / "other", MIB)
    assert "1048576 bytes instead of 2097152" in (disk.difference(one, other) or "")


def test_a_hole_and_zeros_are_the_same(tmp_path: Path) -> None:
    one, other = sparse(tmp_path / "one", MIB), tmp_path / "other"
    other.write_bytes(bytes(MIB))
    assert disk.difference(one, other) is None


def test_without_mkfs_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="apt-get install e2fsprogs"):
        disk.build(tmp_path / "disk.img", 64 * MIB, 1)
