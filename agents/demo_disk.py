"""The demonstration's own disk: a small ext4 of real files, made and changed by the file system's tools."""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from asyncio import create_subprocess_exec
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

from replicator.errors import TargetError, UsageError
from replicator.workers import Workers

DISK_BYTES = 256 * 1024 * 1024
FILES_MAX_BYTES = 96 * 1024 * 1024
CHANGES = 8
CHANGE_BYTES = 256 * 1024
NOT_COPIED = frozenset({"site-packages", "__pycache__"})


async def make_disk(directory: Path, workers: Workers) -> Path:
    """A small ext4 disk with files of Python's own library."""
    if shutil.which("mkfs.ext4") is None:
        raise UsageError(
            "demo.no_mkfs",
            "mkfs.ext4 is missing, so no disk can be made",
            cause="e2fsprogs is not installed, or /usr/sbin is not in PATH",
            fix="apt-get install e2fsprogs, or give a disk of your own with --source",
        )
    image = directory / "demo-disk.img"
    with tempfile.TemporaryDirectory(dir=directory) as files:
        await workers.run(_copy_files, Path(sysconfig.get_path("stdlib")), Path(files))
        await workers.run(image.unlink, missing_ok=True)
        size = f"{DISK_BYTES // 1024}k"
        status, output = await finished("mkfs.ext4", "-q", "-F", "-d", files, str(image), size)
    if status:
        raise TargetError(
            "demo.mkfs_failed",
            f"mkfs.ext4 failed: {output.strip()}",
            cause=f"most likely no space in {directory}",
            fix="give another directory with --dir",
        )
    return image


async def change_disk(image: Path, workers: Workers) -> None:
    """Write new files into the disk's file system, as a machine that goes on working does."""
    with tempfile.TemporaryDirectory(dir=image.parent) as folder:
        changed = Path(folder) / "changed"
        await workers.run(changed.write_bytes, os.urandom(CHANGE_BYTES))
        commands = Path(folder) / "commands"
        lines = [f"write {changed} changed-{number}.bin\n" for number in range(CHANGES)]
        await workers.run(commands.write_text, "".join(lines))
        status, output = await finished("debugfs", "-w", "-f", str(commands), str(image))
    if status:
        raise TargetError(
            "demo.debugfs_failed",
            f"debugfs failed: {output.strip()}",
            cause="e2fsprogs is only partly installed, or no space is left",
            fix="apt-get install e2fsprogs, or give another directory with --dir",
        )


def _copy_files(origin: Path, target: Path) -> None:
    """Copy a library's own files, up to what the disk holds comfortably."""
    left = FILES_MAX_BYTES
    for folder, below, names in os.walk(origin):
        below[:] = sorted(set(below) - NOT_COPIED)
        there = target / Path(folder).relative_to(origin)
        there.mkdir(exist_ok=True)
        for path in (Path(folder) / name for name in sorted(names)):
            left -= path.stat().st_size
            if left < 0:
                return
            shutil.copyfile(path, there / path.name)


async def finished(*command: str) -> tuple[int, str]:
    """Exit status and all output of a program."""
    process = await create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    output, errors = await process.communicate()
    return process.returncode or 0, (output + errors).decode(errors="replace")
