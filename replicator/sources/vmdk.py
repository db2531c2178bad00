"""A flat VMDK as a source: its descriptor leads to the file that holds the disk, which is then a raw one.

A descriptor is untrusted: its data is a regular file in its own folder, reached through no symbolic link. Not
for sparse formats and snapshots: they are recognised and refused (``formats/vmdk.py``).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from replicator.errors import SourceError
from replicator.files import Files, read_fully
from replicator.formats import vmdk
from replicator.sources.raw import RawSource
from replicator.workers import Workers


async def open_vmdk(files: Files, workers: Workers, path: Path) -> RawSource:
    """The disk that the descriptor at ``path`` names.

    Raises:
        SourceError: ``source.missing``, ``source.unreadable``; ``vmdk.*`` for a descriptor that does not hold
            or a kind that is not supported, ``vmdk.extent_size``; as ``RawSource.open`` for the data.
    """
    descriptor, data_fd = await workers.run(_open_data, files, path)
    try:
        # Whatever the name leads to by now, this is the file that was looked at.
        source = await RawSource.open(files, workers, f"/proc/self/fd/{data_fd}")
    finally:
        files.close(data_fd)
    source.name = os.fspath(path)
    if source.size_bytes != descriptor.size_bytes:
        await source.close()
        raise _wrong_size(path, descriptor, source.size_bytes)
    return source


def _open_data(files: Files, path: Path) -> tuple[vmdk.Descriptor, int]:
    """The descriptor, and its data open for reading. Blocks."""
    try:
        dir_fd = files.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _not_opened(path, error) from None
    try:
        descriptor = _read_descriptor(files, dir_fd, path)
        fd, size = _open_regular(files, dir_fd, path.parent / descriptor.extent.name)
    finally:
        files.close(dir_fd)
    if size != descriptor.size_bytes:
        files.close(fd)
        raise _wrong_size(path, descriptor, size)
    return descriptor, fd


def _read_descriptor(files: Files, dir_fd: int, path: Path) -> vmdk.Descriptor:
    fd, _ = _open_regular(files, dir_fd, path)
    content = memoryview(bytearray(vmdk.DESCRIPTOR_MAX_BYTES + 1))  # of a sparse disk enough to recognise it
    try:
        count = read_fully(files, fd, content, 0)
    except OSError as error:
        raise _not_opened(path, error) from None
    finally:
        files.close(fd)
    try:
        return vmdk.parse(bytes(content[:count]), path.name)
    except vmdk.VmdkError as error:
        raise SourceError(error.code, f"{path}: {error.message}", cause=error.cause, fix=error.fix) from None


def _open_regular(files: Files, dir_fd: int, path: Path) -> tuple[int, int]:
    """A regular file of the folder, and its size."""
    try:
        fd = files.open_beneath(dir_fd, path.name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _not_opened(path, error) from None
    found = files.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        files.close(fd)
        raise SourceError(
            "source.unsuitable",
            f"{path} is not a regular file",
            cause="a flat VMDK is two files in one folder, its descriptor and its data",
            fix="name the descriptor of a flat VMDK; a block device is a source by its own name",
        )
    return fd, found.st_size


def _not_opened(path: Path, error: OSError) -> SourceError:
    if isinstance(error, FileNotFoundError):
        return SourceError(
            "source.missing",
            f"{path} does not exist",
            cause="a wrong path, a datastore that is not mounted, or one of the VMDK's two files is gone",
            fix="check the path; descriptor and data belong into one folder",
        )
    return SourceError(
        "source.unreadable",
        f"{path} cannot be read: {error.strerror}",
        cause="a symbolic link or no plain file, or this user may not read it",
        fix="name the descriptor itself, and let this user read it",
    )


def _wrong_size(path: Path, descriptor: vmdk.Descriptor, size: int) -> SourceError:
    return SourceError(
        "vmdk.extent_size",
        f"{path.parent / descriptor.extent.name} has {size} bytes, its descriptor says "
        f"{descriptor.size_bytes}",
        cause="the file was cut short or grown, or it belongs to another disk",
        fix="restore the file or its descriptor",
    )
