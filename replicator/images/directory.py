"""The images of a datastore directory: which disk is which file, whose it is, and whether it is whole.

Beside each VMDK lies a sidecar ``NAME.replica.json``: owner, epoch, clean or dirty. A VMDK's descriptor
appears only when its first epoch is sealed, so that a half-written disk never looks like a usable one. Disk
numbers are given out here and never reused; they live with the retention volume (``catalogue.json``), not
with the data. All of it blocks.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from protocol.messages import OpenDisk
from replicator.errors import PeerError, StateError, TargetError
from replicator.failpoints import reach
from replicator.files import Files, replace_file
from replicator.images.flat_vmdk import FlatVmdk, flat_name
from replicator.images.opening import failure
from replicator.private_directory import (
    HeldDirectory,
    PrivateDirectory,
    checked_record,
    decode_record,
    encode_record,
)

NAME_MAX_BYTES = 200  # leaves room for our suffixes in the 255 of a file name
CATALOGUE = "catalogue.json"
_CATALOGUE_FIELDS = {"version": int, "next_number": int, "next_epoch": int, "disks": list}
_ENTRY_FIELDS = {"number": int, "group": str, "name": str, "owner": str}
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A disk that this directory has known, for ever."""

    number: int
    group: str
    name: str
    owner: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything that must outlive the process but is no disk content."""

    next_number: int = 1
    next_epoch: int = 1
    disks: tuple[Entry, ...] = ()

    def find(self, name: str) -> Entry | None:
        """The entry of the disk with this name."""
        return next((entry for entry in self.disks if entry.name == name), None)


@dataclass(slots=True)
class OpenedDisk:
    """A disk of the epoch under way."""

    number: int
    name: str
    image: FlatVmdk


@dataclass(frozen=True, slots=True)
class OpenedGroup:
    """The images of one epoch. ``epoch_number``: local, counts up for ever."""

    owner: str
    epoch: bytes
    epoch_number: int
    disks: tuple[OpenedDisk, ...]

    def close(self) -> None:
        """Let go of all images."""
        for disk in self.disks:
            disk.image.close()


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

    def open_group(self, owner: str, group: str, epoch: bytes, wanted: Sequence[OpenDisk]) -> OpenedGroup:
        """Find or create the images of a group's disks, number them, and mark them dirty with this epoch.

        Everything is checked before anything is created or changed.

        Raises:
            PeerError: ``disk.bad_name``, ``disk.bad_size``, ``disk.name_taken``, ``disk.listed_twice``,
                ``group.not_yours``, ``image.size_mismatch``. TargetError, SpaceError: as the images say.
        """
        for disk in wanted:
            check_disk(disk)
        with self._retention.held() as held, ExitStack() as opening:
            catalogue = _load(held)
            entries, updated = admit(catalogue, owner, group, wanted)
            images = self._open_images(wanted, opening)
            _store(held, updated)
            for entry in entries:
                self._mark(entry, epoch, clean=False)
            opening.pop_all()
        disks = tuple(
            OpenedDisk(entry.number, entry.name, image) for entry, image in zip(entries, images, strict=True)
        )
        return OpenedGroup(owner, epoch, catalogue.next_epoch, disks)

    def seal(self, group: OpenedGroup) -> None:
        """The epoch is whole: make its images durable, give them their descriptors, mark them clean.

        Raises:
            TargetError, SpaceError: an image could not be made durable or published; none is marked clean.
        """
        for disk in group.disks:
            disk.image.sync()
        for disk in group.disks:
            disk.image.publish(secrets.randbelow(0xFFFFFFFE))
        for disk in group.disks:
            self._mark(Entry(disk.number, "", disk.name, group.owner), group.epoch, clean=True)

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

    def _mark(self, entry: Entry, epoch: bytes, *, clean: bool) -> None:
        record = {
            "version": _VERSION,
            "owner": entry.owner,
            "disk": entry.number,
            "epoch": epoch.hex(),
            "state": "clean" if clean else "dirty",
        }
        reach("sidecar.before_mark")
        name = f"{entry.name}.replica.json"
        try:
            replace_file(self._files, self._dir_fd, name, encode_record(record), mode=0o644)
        except OSError as error:
            raise failure(error, "target.write_failed", f"cannot write {name}") from error
        reach("sidecar.marked")


def admit(
    catalogue: Catalogue, owner: str, group: str, wanted: Sequence[OpenDisk]
) -> tuple[list[Entry], Catalogue]:
    """The entries of the wanted disks, new ones numbered, and the catalogue with them and one epoch more.

    Raises:
        PeerError: ``group.not_yours``, ``disk.name_taken``, ``disk.listed_twice``.
    """
    if not wanted:
        raise PeerError(
            "group.empty",
            f"group {group!r} has no disks",
            cause="a defect in the sender",
            fix="report it with the logs of both sides",
        )
    if len({disk.name for disk in wanted}) != len(wanted):
        raise PeerError(
            "disk.listed_twice",
            f"group {group!r} lists a disk twice",
            cause="two of its disks have the same name",
            fix="give each disk its own name with --disk",
        )
    foreign = next(
        (entry for entry in catalogue.disks if entry.group == group and entry.owner != owner), None
    )
    if foreign is not None:
        raise PeerError(
            "group.not_yours",
            f"group {group!r} belongs to another process server ({foreign.owner})",
            cause="another identity has replicated this group before",
            fix="send from there (with its --state directory), or choose another disk name",
        )
    entries: list[Entry] = []
    new: list[Entry] = []
    for disk in wanted:
        entry = catalogue.find(disk.name)
        if entry is None:
            entry = Entry(catalogue.next_number + len(new), group, disk.name, owner)
            new.append(entry)
        elif entry.group != group:
            raise PeerError(
                "disk.name_taken",
                f"disk {disk.name!r} belongs to group {entry.group!r}",
                cause="two groups use the same disk name on this master target",
                fix="choose another name with --disk",
            )
        entries.append(entry)
    return entries, Catalogue(
        catalogue.next_number + len(new), catalogue.next_epoch + 1, (*catalogue.disks, *new)
    )


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


def _load(held: HeldDirectory) -> Catalogue:
    content = held.read(CATALOGUE)
    if content is None:
        return Catalogue()
    try:
        record = decode_record(content, _CATALOGUE_FIELDS)
        if record["version"] != _VERSION:
            raise ValueError(f"version {record['version']} is not known")
        disks = tuple(Entry(**checked_record(entry, _ENTRY_FIELDS)) for entry in record["disks"])
        if any(entry.number >= record["next_number"] for entry in disks):
            raise ValueError("it would give out a disk number again")
    except ValueError as error:
        raise StateError(
            "catalogue.damaged",
            f"{held.path / CATALOGUE} cannot be used: {error}",
            cause="the file was edited, cut short or overwritten, or comes from a newer release",
            fix="restore it from a backup; disk numbers and owners are in the sidecars beside the VMDKs",
        ) from None
    return Catalogue(record["next_number"], record["next_epoch"], disks)


def _store(held: HeldDirectory, catalogue: Catalogue) -> None:
    held.replace(
        CATALOGUE,
        encode_record(
            {
                "version": _VERSION,
                "next_number": catalogue.next_number,
                "next_epoch": catalogue.next_epoch,
                "disks": [asdict(entry) for entry in catalogue.disks],
            }
        ),
    )
