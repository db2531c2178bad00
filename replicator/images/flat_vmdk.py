"""A flat VMDK in a folder: the data in ``NAME-flat.vmdk``, the descriptor in ``NAME.vmdk``.

The descriptor is written last (``publish``): a half-written disk does not look like a VMDK. Not for checking
names of disks: who passes one in has done so. Not for sparse VMDKs.
"""

from __future__ import annotations

import os
import stat
from typing import Final, NoReturn, Self

from replicator.errors import TargetError
from replicator.failpoints import reach
from replicator.files import Files, read_fully, replace_file
from replicator.formats import vmdk
from replicator.images.opening import claim, create_file, exists, failure, open_file, refuse_size
from replicator.images.writer import FileImage, file_zeroing

_NEW_MODE: Final = 0o600


class FlatVmdk(FileImage):
    """An ``Image`` that becomes a VMDK when it is published. ``dir_fd`` stays the caller's, and open.

    Attributes:
        published: whether the descriptor is there.
        thin: whether zeros give space back to the datastore.
    """

    def __init__(self, files: Files, dir_fd: int, disk: str, fd: int, descriptor: vmdk.Descriptor) -> None:
        zeroing = file_zeroing(descriptor.thin)
        super().__init__(
            files, descriptor_name(disk), fd, descriptor.size_bytes, blank=False, zeroing=zeroing
        )
        self.thin = descriptor.thin
        self.disk = disk
        self.published = False
        self._dir_fd = dir_fd
        self._descriptor = descriptor

    @classmethod
    def create(
        cls,
        files: Files,
        dir_fd: int,
        disk: str,
        size_bytes: int,
        *,
        thin: bool = True,
        create_type: vmdk.CreateType = "vmfs",
    ) -> Self:
        """A new, blank disk, its file durable in the folder; there is no descriptor yet.

        Raises:
            SpaceError: ``target.full``. TargetError: ``target.exists``, ``target.bad_size``,
                ``target.read_only``, ``target.create_failed``. Nothing is left behind.
        """
        descriptor = _intended(dir_fd, disk, size_bytes, thin=thin, create_type=create_type)
        fd = create_file(files, dir_fd, descriptor.extent.name, size_bytes, thin=thin)
        image = cls(files, dir_fd, disk, fd, descriptor)
        image.blank = True
        return image

    @classmethod
    def open_unpublished(
        cls,
        files: Files,
        dir_fd: int,
        disk: str,
        size_bytes: int,
        *,
        thin: bool = True,
        create_type: vmdk.CreateType = "vmfs",
    ) -> Self:
        """What ``create`` with the same arguments left when it was interrupted before ``publish``.

        It is not blank: what was written and not acknowledged is written again, and may be zeros by then.

        Raises:
            FileNotFoundError: there is no such file; an empty one, which a crash has left, is removed.
            TargetError: ``target.exists`` (it is published), ``target.not_a_file``, ``vmdk.extent_size``,
                ``target.open_failed``.
        """
        descriptor = _intended(dir_fd, disk, size_bytes, thin=thin, create_type=create_type)
        _remove_unfinished(files, dir_fd, descriptor.extent.name)
        return cls(files, dir_fd, disk, _open_flat(files, dir_fd, descriptor), descriptor)

    @classmethod
    def open_published(cls, files: Files, dir_fd: int, disk: str) -> Self:
        """An existing VMDK, of ours or of others, through its descriptor.

        Raises:
            FileNotFoundError: there is no descriptor. TargetError: ``vmdk.*`` as in ``formats.vmdk.parse``,
                ``vmdk.extent_size``, ``target.missing`` (the data), ``target.not_a_file``,
                ``target.open_failed``.
        """
        descriptor, _ = _read_descriptor(files, dir_fd, descriptor_name(disk))
        try:
            fd = _open_flat(files, dir_fd, descriptor)
        except FileNotFoundError as error:
            what = f"cannot open {descriptor.extent.name}, the data of {descriptor_name(disk)}"
            raise failure(error, "target.open_failed", what) from error
        image = cls(files, dir_fd, disk, fd, descriptor)
        image.published = True
        return image

    @property
    def cid(self) -> int:
        """The content id in its descriptor, as it was opened or last published."""
        return self._descriptor.cid

    def modified_ns(self) -> int:
        """When its data was last changed, by the file system's clock, ns since 1970. ``TargetError``."""
        try:
            return self._files.fstat(self._fd).st_mtime_ns
        except OSError as error:
            raise failure(error, "target.read_failed", f"cannot look at {self.name}") from error

    def publish(self, cid: int) -> None:
        """Say durably that the content is now ``cid``; ``sync`` comes before. The first call makes the VMDK.

        Of a descriptor that is there the content id alone changes; what others wrote into it since stays.

        Raises:
            SpaceError: ``target.full``. TargetError: ``target.publish_failed`` (the old descriptor or the new
                one is there, whole), ``target.sync_failed``, or as ``open_published``.
        """
        self._refuse_after_failed_sync()
        descriptor, mode = self._descriptor, _NEW_MODE
        try:
            if self.published:
                descriptor, mode = _read_descriptor(self._files, self._dir_fd, self.name)
            self._descriptor = vmdk.with_cid(descriptor, cid)
            reach("image.before_publish")
            replace_file(self._files, self._dir_fd, self.name, vmdk.render(self._descriptor), mode)
        except OSError as error:
            raise failure(error, "target.publish_failed", f"cannot write {self.name}") from error
        self.published = True
        reach("image.published")


def descriptor_name(disk: str) -> str:
    """File name of a disk's descriptor."""
    return f"{disk}.vmdk"


def flat_name(disk: str) -> str:
    """File name of the data of a disk that we made."""
    return f"{disk}-flat.vmdk"


def _intended(
    dir_fd: int, disk: str, size_bytes: int, *, thin: bool, create_type: vmdk.CreateType
) -> vmdk.Descriptor:
    """The descriptor that ``publish`` is to write, save for its content id, where there is none yet."""
    name = descriptor_name(disk)
    if exists(dir_fd, name):
        raise TargetError(
            "target.exists",
            f"{name} is already there",
            cause="a VMDK of this name was finished earlier, here or by somebody else",
            fix="open that one, choose another name, or move its files away",
        )
    refuse_size(size_bytes, name)
    try:
        return vmdk.new(flat_name(disk), size_bytes, cid=0, create_type=create_type, thin=thin)
    except vmdk.VmdkError as error:
        _pass_on(error, name)


def _open_flat(files: Files, dir_fd: int, descriptor: vmdk.Descriptor) -> int:
    name, size_bytes = descriptor.extent.name, descriptor.size_bytes
    fd, status = open_file(files, dir_fd, name, os.O_RDWR)
    try:
        claim(fd, name)
        if status.st_size != size_bytes:
            raise TargetError(
                "vmdk.extent_size",
                f"{name} has {status.st_size} bytes, {size_bytes} are expected",
                cause="the file was truncated or grown, or it belongs to another disk",
                fix="restore the file, or remove the disk and send it again in full",
            )
    except TargetError:
        files.close(fd)
        raise
    return fd


def _remove_unfinished(files: Files, dir_fd: int, name: str) -> None:
    """A crash between the making of a file and its size being durable leaves it empty: away with it."""
    fd, status = open_file(files, dir_fd, name, os.O_RDWR)
    try:
        if status.st_size == 0:
            claim(fd, name)
            files.unlink(dir_fd, name)
    except OSError as error:
        raise failure(error, "target.open_failed", f"cannot remove {name}, which is empty") from error
    finally:
        files.close(fd)


def _read_descriptor(files: Files, dir_fd: int, name: str) -> tuple[vmdk.Descriptor, int]:
    """The descriptor and its file's permission bits."""
    fd, status = open_file(files, dir_fd, name, os.O_RDONLY)
    content = memoryview(bytearray(vmdk.DESCRIPTOR_MAX_BYTES + 1))
    try:
        count = read_fully(files, fd, content, 0)
    except OSError as error:
        raise failure(error, "target.open_failed", f"cannot read {name}") from error
    finally:
        files.close(fd)
    try:
        return vmdk.parse(bytes(content[:count]), name), stat.S_IMODE(status.st_mode)
    except vmdk.VmdkError as error:
        _pass_on(error, name)


def _pass_on(error: vmdk.VmdkError, name: str) -> NoReturn:
    raise TargetError(error.code, f"{name}: {error.message}", cause=error.cause, fix=error.fix) from error
