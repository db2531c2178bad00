"""The images of a datastore directory: which disk is which file, and which epoch each of them holds.

A VMDK's descriptor appears only when its first epoch is sealed, so that a half-written disk never looks like
a usable one; a sidecar beside it says the rest (``sidecar.py``). What must outlive the datastore, numbers and
epochs, lies with the retention volume (``catalogue.py``, ``coverage_journal.py``). All of it blocks.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from protocol.messages import NO_ID, Open, OpenDisk
from replicator.errors import PeerError, TargetError
from replicator.extents import Coverage
from replicator.files import Files
from replicator.images.catalogue import Entry, GroupEpochs, admit, load, store
from replicator.images.coverage_journal import CoverageJournal, remove_journal
from replicator.images.flat_vmdk import FlatVmdk, flat_name
from replicator.images.sidecar import Sidecar, read_sidecar, write_sidecar
from replicator.plan import TargetState, choose_mode
from replicator.private_directory import PrivateDirectory

NAME_MAX_BYTES = 200  # leaves room for our suffixes in the 255 of a file name


@dataclass(frozen=True, slots=True)
class OpenedDisk:
    """A disk of the epoch under way. ``durable``: what of the epoch it holds already."""

    number: int
    name: str
    image: FlatVmdk
    durable: Coverage


@dataclass(frozen=True, slots=True)
class OpenedGroup:
    """The images of one epoch.

    Attributes:
        epochs: what the catalogue says of the group: number and mode of the epoch, the newest sealed one.
        epoch: id of the epoch.
        journal: takes what becomes durable; None when the epoch is sealed already.
    """

    epochs: GroupEpochs
    owner: str
    disks: tuple[OpenedDisk, ...]
    epoch: bytes
    journal: CoverageJournal | None

    def close(self) -> None:
        """Let go of everything."""
        for disk in self.disks:
            disk.image.close()
        if self.journal is not None:
            self.journal.close()


class ImageDirectory:
    """A directory of VMDKs, held by one process at a time.

    Args:
        files: the I/O seam.
        path: where the VMDKs lie.
        retention: what is the master target's own.
        thin: whether new VMDKs are thin.
    """

    def __init__(self, files: Files, path: Path, retention: PrivateDirectory, *, thin: bool) -> None:
        self._files = files
        self._path = path
        self._retention = retention
        self._thin = thin
        self._dir_fd = self._open_directory()
        self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the directory free. Idempotent."""
        for fd in (self._dir_fd, self._lock_fd):
            if fd >= 0:
                self._files.close(fd)
        self._dir_fd = self._lock_fd = -1

    def lock(self) -> None:
        """Keep every other master target away from this retention directory.

        Raises:
            TargetError: ``target.in_use``.
        """
        with self._retention.held() as held:
            fd = self._files.open_beneath(held.fd, "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._files.close(fd)
            raise TargetError(
                "target.in_use",
                f"{self._retention.path} is in use by another master target",
                cause="`replicator receive` runs there already",
                fix="stop the other one, or give this one a directory of its own",
            ) from None
        self._lock_fd = fd

    def open_group(self, owner: str, wanted: Open) -> OpenedGroup:
        """Find or create the images of a group's disks and decide what the epoch has to say.

        Everything is checked before anything is created or changed.

        Raises:
            PeerError: ``disk.bad_name``, ``disk.bad_size``, ``disk.name_taken``, ``disk.listed_twice``,
                ``group.not_yours``, ``image.size_mismatch``. TargetError, SpaceError: as the images say.
        """
        for disk in wanted.disks:
            check_disk(disk)
        with self._retention.held() as held, ExitStack() as opening:
            catalogue = load(held)
            entries, updated = admit(catalogue, owner, wanted.group, wanted.disks)
            images = self._open_images(wanted.disks, opening)
            known = catalogue.epochs_of(wanted.group)
            state = self._state(known, entries, images)
            if state.clean and wanted.epoch == state.sealed:
                opening.pop_all()
                whole = _disks(entries, images, [Coverage([(0, disk.size)]) for disk in wanted.disks])
                return OpenedGroup(known, owner, whole, state.sealed, None)
            resumed = wanted.epoch == state.under_way != NO_ID
            epochs = GroupEpochs(
                wanted.group,
                known.sealed,
                wanted.epoch,
                known.number if resumed else updated.next_epoch,
                choose_mode(wanted.epoch, wanted.parent, state),
            )
            store(held, updated.with_epochs(epochs))
            if not resumed:
                for number in {known.number, epochs.number}:  # a file of a lost catalogue may have our number
                    remove_journal(held, number)
                for entry, image in zip(entries, images, strict=True):
                    self._mark(entry, image, wanted.epoch, clean=False)
            journal = CoverageJournal.open(held, epochs.number)
            opening.pop_all()
        durable = [journal.disks.get(entry.number, Coverage()) for entry in entries]
        return OpenedGroup(epochs, owner, _disks(entries, images, durable), wanted.epoch, journal)

    def seal(self, group: OpenedGroup) -> None:
        """The epoch is whole: make its images durable and publish them, mark them clean. Idempotent.

        Raises:
            TargetError, SpaceError: an image could not be made durable or published; none is marked clean.
        """
        if group.journal is None:
            return
        for disk in group.disks:
            disk.image.sync()
        for disk in group.disks:
            disk.image.publish(secrets.randbelow(0xFFFFFFFE))
        for disk in group.disks:
            entry = Entry(disk.number, group.epochs.name, disk.name, group.owner)
            self._mark(entry, disk.image, group.epoch, clean=True)
        with self._retention.held() as held:
            catalogue = load(held)
            epochs = replace(group.epochs, sealed=group.epoch, under_way=NO_ID)
            store(held, catalogue.with_epochs(epochs))
            remove_journal(held, epochs.number)

    def _state(self, known: GroupEpochs, entries: Sequence[Entry], images: Sequence[FlatVmdk]) -> TargetState:
        """What the images hold. One that somebody else wrote to, or without its own sidecar, holds no
        epoch.
        """
        nothing = TargetState(known.sealed, blank=all(image.blank for image in images))
        clean, ours = known.under_way == NO_ID, True
        for entry, image in zip(entries, images, strict=True):
            sidecar = read_sidecar(self._files, self._dir_fd, image.disk)
            if image.blank or sidecar is None or sidecar.cid != image.cid:
                return nothing
            if (sidecar.owner, sidecar.disk) != (entry.owner, entry.number):
                return nothing
            settled = sidecar.clean and sidecar.modified_ns == image.modified_ns()
            clean = clean and settled and sidecar.epoch == known.sealed
            ours = ours and sidecar.epoch == known.under_way
        return replace(
            nothing, clean=clean, under_way=known.under_way if ours else NO_ID, under_way_mode=known.mode
        )

    def _mark(self, entry: Entry, image: FlatVmdk, epoch: bytes, *, clean: bool) -> None:
        modified_ns = image.modified_ns() if clean else 0
        sidecar = Sidecar(entry.owner, entry.number, epoch, clean, image.cid, modified_ns)
        write_sidecar(self._files, self._dir_fd, entry.name, sidecar)

    def _open_directory(self) -> int:
        try:
            fd = self._files.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise TargetError(
                "target.missing",
                f"{self._path} does not exist",
                cause="a wrong path, or a datastore that is not mounted",
                fix="create the directory or mount the datastore; it is never created here, so that "
                "nothing lands below an empty mount point",
            ) from None
        except OSError as error:
            raise TargetError(
                "target.unusable",
                f"{self._path} cannot be used: {error.strerror}",
                cause="it is no directory, or this user may not open it",
                fix="give a directory that this user owns",
            ) from None
        flags = os.fstatvfs(fd).f_flag
        if flags & os.ST_RDONLY or not os.access(self._path, os.W_OK):
            self._files.close(fd)
            raise TargetError(
                "target.read_only",
                f"{self._path} cannot be written to",
                cause="the file system is mounted read-only, or this user lacks the right",
                fix="mount it read-write, or give this user the right to write",
            )
        return fd

    def _open_images(self, wanted: Sequence[OpenDisk], opening: ExitStack) -> list[FlatVmdk]:
        """The images in the order of ``wanted``; none is created before all that exist have been checked."""
        images = {}
        for disk in wanted:
            image = self._existing(disk)
            if image is not None:
                opening.callback(image.close)
                images[disk.name] = image
        for disk in wanted:
            if disk.name not in images:
                created = FlatVmdk.create(self._files, self._dir_fd, disk.name, disk.size, thin=self._thin)
                opening.callback(self._unmake, disk.name)
                opening.callback(created.close)
                images[disk.name] = created
        return [images[disk.name] for disk in wanted]

    def _unmake(self, name: str) -> None:
        """Undo a creation: the group could not be opened whole. What stays, the next OPEN finds again."""
        with suppress(OSError):
            self._files.unlink(self._dir_fd, flat_name(name))

    def _existing(self, disk: OpenDisk) -> FlatVmdk | None:
        """The disk's image if it is there; its size must fit."""
        try:
            image = FlatVmdk.open_published(self._files, self._dir_fd, disk.name)
        except FileNotFoundError:
            try:
                image = FlatVmdk.open_unpublished(
                    self._files, self._dir_fd, disk.name, disk.size, thin=self._thin
                )
            except FileNotFoundError:
                return None
        if image.size_bytes != disk.size:
            image.close()
            raise PeerError(
                "image.size_mismatch",
                f"{disk.name}.vmdk has {image.size_bytes} bytes, the source has {disk.size}",
                cause="the source is another disk, or one of the two was resized",
                fix="choose another name with --disk, or resize or remove the VMDK",
            )
        return image


def check_disk(disk: OpenDisk) -> None:
    """Refuse names that are no plain file names and sizes that no disk has.

    Raises:
        PeerError: ``disk.bad_name``, ``disk.bad_size``.
    """
    name = disk.name
    printable = name.isprintable() and "/" not in name and not name.startswith(".")
    data_of_another = name.lower().endswith(flat_name("").removesuffix(".vmdk"))
    if not name or not printable or data_of_another or len(name.encode()) > NAME_MAX_BYTES:
        raise PeerError(
            "disk.bad_name",
            f"{name[:60]!r} cannot be a disk's name",
            cause=f"a name becomes a file name: 1 to {NAME_MAX_BYTES} printable bytes, without '/', not "
            "starting with '.', not ending with '-flat' (NAME-flat.vmdk holds the data of disk NAME)",
            fix="choose another name with --disk",
        )
    if not disk.size or disk.size % 512:
        raise PeerError(
            "disk.bad_size",
            f"disk {name!r} has {disk.size} bytes",
            cause="a disk has at least one sector and whole sectors of 512 bytes",
            fix="check the source",
        )


def _disks(
    entries: Sequence[Entry], images: Sequence[FlatVmdk], durable: Sequence[Coverage]
) -> tuple[OpenedDisk, ...]:
    return tuple(
        OpenedDisk(entry.number, entry.name, image, coverage)
        for entry, image, coverage in zip(entries, images, durable, strict=True)
    )
