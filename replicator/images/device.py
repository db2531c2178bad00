"""A raw image: a file that is the disk, byte for byte, or a whole block device.

The path is the operator's, so symbolic links in it are followed (``/dev/disk/by-id`` is made of them). Not
for VMDKs.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Self

from replicator import linux
from replicator.errors import TargetError
from replicator.files import Files
from replicator.images.opening import create_file, failure, not_a_file, refuse_size
from replicator.images.writer import FileImage, ZeroMethod, device_zeroing, file_zeroing


class RawImage(FileImage):
    """An ``Image`` over a raw file or block device; sectors of 4,096 bytes are for the kernel to fill."""

    @classmethod
    def open(cls, files: Files, path: str | os.PathLike[str], *, thin: bool = True) -> Self:
        """What is at ``path``. A device is ours alone until it is closed.

        ``thin``: in a file, zeros give space back.

        Raises:
            TargetError: ``target.device_busy`` (mounted, for example), ``target.missing``,
                ``target.not_a_file``, ``target.bad_size``, ``target.open_failed``.
        """
        name = os.fspath(path)
        try:
            # O_EXCL without O_CREAT: the kernel refuses a device that is in use; files do not mind.
            fd = files.open(path, os.O_RDWR | os.O_EXCL | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise failure(error, "target.open_failed", f"cannot open {name}") from error
        try:
            size_bytes, zeroing = _measure(fd, name, thin=thin)
        except TargetError:
            files.close(fd)
            raise
        return cls(files, name, fd, size_bytes, blank=False, zeroing=zeroing)

    @classmethod
    def create(
        cls, files: Files, path: str | os.PathLike[str], size_bytes: int, *, thin: bool = True
    ) -> Self:
        """A new, blank raw file, durable in its folder.

        Raises:
            SpaceError: ``target.full``. TargetError: ``target.exists``, ``target.missing`` (the folder),
                ``target.bad_size``, ``target.read_only``, ``target.create_failed``. Nothing is left behind.
        """
        whole = Path(path)
        try:
            dir_fd = files.open(whole.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise failure(error, "target.create_failed", f"cannot open the folder of {whole}") from error
        try:
            fd = create_file(files, dir_fd, whole.name, size_bytes, thin=thin)
        finally:
            files.close(dir_fd)
        return cls(files, str(whole), fd, size_bytes, blank=True, zeroing=file_zeroing(thin))


def _measure(fd: int, name: str, *, thin: bool) -> tuple[int, tuple[ZeroMethod, ...]]:
    """Size in bytes, and how to zero a range."""
    try:
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            size_bytes = linux.block_device_size(fd)
            zeroing = device_zeroing(linux.logical_sector_size(fd))
        elif stat.S_ISREG(status.st_mode):
            size_bytes, zeroing = status.st_size, file_zeroing(thin)
        else:
            raise not_a_file(name)
    except OSError as error:
        raise failure(error, "target.open_failed", f"cannot measure {name}") from error
    refuse_size(size_bytes, name)
    return size_bytes, zeroing
