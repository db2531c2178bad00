"""Loop devices and small mounted file systems, gone again after the test."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`loop(size, sector=512)`: a new block device of that many bytes."""
    with ExitStack() as undo:

        def make(size: int, sector: int = 512) -> Path:
            backing = tmp_path / f"loop-{size}-{sector}.img"
            with backing.open("wb") as file:
                file.truncate(size)
            device = run("losetup", "--find", "--show", "--sector-size", str(sector), backing)
            undo.callback(run, "losetup", "--detach", device)
            return Path(device)

        yield make


@pytest.fixture
def mounted(tmp_path: Path, loop: Callable[..., Path]) -> Iterator[Callable[[str, int], Path]]:
    """`mounted("ext4", size)`: an empty file system of that size, on a loop device or (tmpfs) in memory."""
    with ExitStack() as undo:

        def make(kind: str, size: int) -> Path:
            point = tmp_path / f"mounted-{kind}"
            point.mkdir()
            if kind == "tmpfs":
                run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", point)
            else:
                device = loop(size)
                run(f"mkfs.{kind}", "-q", device)
                run("mount", device, point)
            # Lazily: a test that failed may have left a file open there, and the mount would stay for ever.
            undo.callback(run, "umount", "--lazy", point)
            return point

        yield make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder on the test's own file system."""
    path = tmp_path / "datastore"
    path.mkdir()
    return path


@pytest.fixture
def dir_fd(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)
