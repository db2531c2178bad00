"""Real file systems and block devices for the time of a test: loop devices and loop mounts. Wants root.

Programs: losetup, mount, umount, mkfs.ext4, mkfs.xfs: mark the tests that use these with `peer`.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOUNT_BYTES = 320 * 1024 * 1024  # the smallest XFS is 300 MiB; both lie in sparse files


def run(*command: str | Path) -> str:
    """Run a program that must succeed; its output, stripped."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr.strip()}"
    return done.stdout.strip()


@contextmanager
def loop_device(backing: Path, sector_bytes: int = 512) -> Iterator[Path]:
    """A block device whose content is the file `backing`."""
    device = Path(run("losetup", "--find", "--show", "--sector-size", str(sector_bytes), backing))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """A fresh file system of `kind` ("ext4", "xfs") mounted below `folder`."""
    image, place = folder / f"{kind}.img", folder / kind
    with image.open("wb") as file:
        file.truncate(MOUNT_BYTES)
    run(f"mkfs.{kind}", "-q", image)
    place.mkdir()
    run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        run("umount", "--lazy", place)  # a failed test may have left a file open there
        image.unlink()
