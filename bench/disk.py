"""Disk images with real content, copies of them and changed ones. Only ever reads the files of the machine.

Not here: what is done with the images (``scenarios.py``).
"""

from __future__ import annotations

import mmap
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

from bench.errors import BenchError

MIB = 1024 * 1024
BLOCK_BYTES = 4096
FILES_SHARE = 0.68  # of an image: what ext4 holds comfortably, and about as full as servers' disks are
ROOTS = (Path("/usr"), Path("/opt"), Path("/var/lib"), Path("/home"))
FILE_SHARE_MAX = 1 / 16  # a single file larger than this part of the image would be most of what is measured
A_FOLDER = 1000
COMPARE_BYTES = MIB


class Content(NamedTuple):
    """What an image holds, in bytes: its size, and how much of it is not a hole."""

    size: int
    data: int


def build(image: Path, size: int, seed: int) -> Content:
    """Make an ext4 image of ``size`` bytes out of files of this machine, picked by ``seed``.

    The files are copied first (``mkfs.ext4 -d`` wants a folder), so twice the space is needed for a while.

    Raises:
        BenchError: mkfs.ext4 is missing or fails.
    """
    if shutil.which("mkfs.ext4") is None:
        raise BenchError("mkfs.ext4 is missing, so no disk can be made: apt-get install e2fsprogs")
    folder = image.with_suffix(".files")
    folder.mkdir()
    try:
        _copy(picked(int(size * FILES_SHARE), int(size * FILE_SHARE_MAX), seed), folder)
        command = ("mkfs.ext4", "-q", "-F", "-d", str(folder), str(image), f"{size // 1024}k")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"mkfs.ext4 failed: {done.stderr.strip()} (is there space in {image.parent}?)")
    finally:
        shutil.rmtree(folder)
    return content(image)


def picked(total: int, largest: int, seed: int) -> Iterator[Path]:
    """Files in a seeded order, until they make up ``total`` bytes: the same mix at every size."""
    found = list(_files_of_the_machine())
    Random(seed).shuffle(found)
    for path, size in found:
        if size <= min(total, largest):
            total -= size
            yield Path(path)


@cache
def _files_of_the_machine() -> tuple[tuple[str, int], ...]:
    """Every regular file with its size, sorted."""
    found = []
    for root in ROOTS:
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    status = os.lstat(path)
                except OSError:  # gone meanwhile
                    continue
                if stat.S_ISREG(status.st_mode) and status.st_size:
                    found.append((path, status.st_size))
    return tuple(sorted(found))


def _copy(files: Iterator[Path], folder: Path) -> None:
    for number, path in enumerate(files):
        below = folder / f"{number // A_FOLDER:04d}"
        if number % A_FOLDER == 0:
            below.mkdir()
        try:
            shutil.copyfile(path, below / f"{number % A_FOLDER:04d}-{path.name[:80]}")
        except (PermissionError, FileNotFoundError):  # not for everybody, or gone meanwhile
            continue


def content(image: Path) -> Content:
    """Size and data of an image."""
    return Content(image.stat().st_size, sum(end - start for start, end in data_ranges(image)))


def data_ranges(image: Path) -> Iterator[tuple[int, int]]:
    """[start, end) of what is not a hole."""
    with image.open("rb") as file:
        size, position = os.fstat(file.fileno()).st_size, 0
        while position < size:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: holes to the end
                return
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, position


def copy(image: Path, target: Path) -> None:
    """Copy an image, holes as holes, whatever the file system."""
    command = ("cp", "--sparse=always", "--reflink=never", str(image), str(target))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"cannot copy {image}: {done.stderr.strip()}")


def change(image: Path, share: float, seed: int) -> int:
    """Overwrite this share of all blocks of 4 KiB, wherever they are, with random bytes; returns how many."""
    blocks = any_blocks(image.stat().st_size, share, seed)
    overwrite(image, blocks, seed)
    return len(blocks)


def any_blocks(size: int, share: float, seed: int) -> list[int]:
    """This share of all blocks of 4 KiB of a disk, by number, sorted."""
    blocks = size // BLOCK_BYTES
    return sorted(Random(seed).sample(range(blocks), round(blocks * share)))


def overwrite(image: Path, blocks: Sequence[int], seed: int) -> None:
    """Write random bytes over blocks of 4 KiB, by number."""
    random = Random(~seed)
    with image.open("r+b") as file:
        for block in blocks:
            os.pwrite(file.fileno(), random.randbytes(BLOCK_BYTES), block * BLOCK_BYTES)


def warm(image: Path) -> None:
    """Read an image once, so that the page cache holds it (as far as memory goes)."""
    buffer = mmap.mmap(-1, COMPARE_BYTES)
    with image.open("rb", buffering=0) as file:
        for start, end in data_ranges(image):
            file.seek(start)
            while file.tell() < end and file.readinto(buffer):
                pass


def difference(one: Path, other: Path) -> str | None:
    """Where two images differ, in words; None: they hold the same bytes."""
    sizes = one.stat().st_size, other.stat().st_size
    if sizes[0] != sizes[1]:
        return f"{sizes[1]} bytes instead of {sizes[0]}"
    with one.open("rb", buffering=0) as first, other.open("rb", buffering=0) as second:
        for start, end in joined(sorted([*data_ranges(one), *data_ranges(other)])):
            for position in range(start, end, COMPARE_BYTES):
                count = min(COMPARE_BYTES, end - position)
                ours, theirs = (os.pread(file.fileno(), count, position) for file in (first, second))
                if ours != theirs or len(ours) != count:
                    return f"other bytes within {count} from byte {position} on"
    return None


def joined(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted ranges, those that touch or overlap made one."""
    start = end = -1
    for first, behind in ranges:
        if first > end:
            if start >= 0:
                yield start, end
            start = first
        end = max(end, behind)
    if start >= 0:
        yield start, end
