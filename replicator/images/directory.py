"""The images of a datastore directory: which disk is which file, and which epoch each of them holds.

A VMDK's descriptor appears only when its first epoch is there, so that a half-written disk never looks like a
usable one; a sidecar beside it says the rest (``sidecar.py``). What must outlive the datastore, numbers and
epochs, lies with the retention volume (``catalogue.py``, ``coverage_journal.py``). All of it blocks.

A first epoch is written straight into its images (*direct*). Once one of a group's images is a VMDK that
somebody may rely on, epochs go to a log and change no image before they are sealed: that is the business of
``holding.py``, which tells here what its log says of the images (``Lineage``).
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from protocol.constants import ID_BYTES
from protocol.messages import NO_ID, Mode, Open, OpenDisk
from replicator.errors import PeerError, TargetError
from replicator.extents import Coverage
from replicator.files import Files
from replicator.images.catalogue import Entry, GroupEpochs, admit, check_disk, load, store
from replicator.images.coverage_journal import CoverageJournal, remove_journal
from replicator.images.flat_vmdk import FlatVmdk, flat_name
from replicator.images.opening import open_datastore
from replicator.images.sidecar import Sidecar, content_id, read_sidecar, write_sidecar
from replicator.plan import Action, Decision, TargetState, decide
from replicator.private_directory import PrivateDirectory


@dataclass(frozen=True, slots=True)
class OpenedDisk:
    """A disk of the epoch under way. ``durable``: what of the epoch it holds already."""

    number: int
    name: str
    image: FlatVmdk
    durable: Coverage


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a log says of a group's images.

    Attributes:
        base: the epoch that they hold, as long as none is being applied.
        applying: epochs of which they may hold a part.
        history: the sealed epochs that are retained, oldest first.
    """

    base: bytes
    applying: frozenset[bytes] = frozenset()
    history: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenedGroup:
    """The images of one epoch.

    Attributes:
        epochs: what the catalogue says of the group: number and mode of the epoch, the newest sealed one.
        epoch: id of the epoch.
        decision: what it has to say, and why.
        adopted: number of epoch ``epochs.sealed``, as which what the images hold is known from now on: they
            are not what the log says. 0: they are.
        journal: of a direct epoch, takes what becomes durable; None for one that goes to the log.
        sealed: it is sealed: there is nothing more to be said.
    """

    epochs: GroupEpochs
    owner: str
    disks: tuple[OpenedDisk, ...]
    epoch: bytes
    decision: Decision
    adopted: int
    journal: CoverageJournal | None
    sealed: bool = False

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
        self._dir_fd = open_datastore(files, path)
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

    def epochs_of(self, group: str) -> GroupEpochs:
        """What the catalogue says of a group. ``StateError`` if it cannot be read."""
        with self._retention.held() as held:
            return load(held).epochs_of(group)

    def check(self, owner: str, wanted: Open) -> None:
        """Refuse what no group may be asked, before anything is touched. ``PeerError`` as ``open_group``."""
        for disk in wanted.disks:
            check_disk(disk)
        with self._retention.held() as held:
            admit(load(held), owner, wanted.group, wanted.disks)

    def open_group(self, owner: str, wanted: Open, lineage: Lineage | None = None) -> OpenedGroup:
        """Find or create the images of a group's disks and decide what the epoch has to say.

        Everything is checked before anything is created or changed. Without a ``lineage`` the images should
        hold the newest sealed epoch.

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
            state = self._state_of_direct(known, entries, images)
            being_published = known.mode is Mode.FULL and wanted.epoch == state.under_way != NO_ID
            direct = being_published or not any(image.published for image in images)
            adopted = 0
            lineage = lineage or Lineage(known.sealed)
            believed = direct or self._holds(lineage, entries, images)
            if not direct:
                under_way = known.under_way if believed else NO_ID
                state = TargetState(
                    known.sealed, under_way, known.mode, clean=believed, history=lineage.history
                )
            decision = decide(wanted.epoch, wanted.parent, state)
            if not believed:
                known = replace(
                    known, sealed=secrets.token_bytes(ID_BYTES), under_way=NO_ID, number=updated.next_epoch
                )
                updated = updated.with_epochs(known)
                adopted = known.number
                for entry, image in zip(entries, images, strict=True):
                    image.blank = False  # from now on what lies there counts
                    self._mark(entry, image, known.sealed, clean=True)
            if decision.action is Action.UP_TO_DATE:
                if known.under_way in lineage.applying:  # the images shall hold this one: the later is undone
                    known = replace(known, under_way=NO_ID)
                    store(held, updated.with_epochs(known))
                opening.pop_all()
                whole = _disks(entries, images, [Coverage([(0, disk.size)]) for disk in wanted.disks])
                return OpenedGroup(known, owner, whole, wanted.epoch, decision, 0, None, sealed=True)
            resumed = wanted.epoch == state.under_way != NO_ID
            epochs = GroupEpochs(
                wanted.group,
                known.sealed,
                wanted.epoch,
                known.number if resumed else updated.next_epoch,
                decision.mode,
            )
            store(held, updated.with_epochs(epochs))
            if not resumed:
                for number in {known.number, epochs.number}:  # a file of a lost catalogue may have our number
                    remove_journal(held, number)
                for entry, image in zip(entries, images, strict=True) if direct else ():
                    self._mark(entry, image, wanted.epoch, clean=False)
            journal = CoverageJournal.open(held, epochs.number) if direct or resumed else None
            opening.pop_all()
        noted = journal.disks if journal is not None else {}
        durable = [noted.get(entry.number, Coverage()) for entry in entries]
        if journal is not None and not direct:
            journal.close()
            journal = None
        disks = _disks(entries, images, durable)
        return OpenedGroup(epochs, owner, disks, wanted.epoch, decision, adopted, journal)

    def open_again(self, group: str, disks: Sequence[OpenDisk], lineage: Lineage) -> OpenedGroup | None:
        """The images of a group whose newest sealed epoch is still to be applied, without a sender.

        None: they are not what the log says; the next OPEN finds out what they are.

        Raises:
            TargetError, PeerError: one of them cannot be opened.
        """
        with self._retention.held() as held, ExitStack() as opening:
            catalogue = load(held)
            entries = [entry for entry in map(catalogue.find, (disk.name for disk in disks)) if entry]
            images = []
            for disk in disks:
                image = self._existing(disk)
                if image is None:
                    return None
                opening.callback(image.close)
                images.append(image)
            if len(entries) != len(images) or not self._holds(lineage, entries, images):
                return None
            opening.pop_all()
        epochs = catalogue.epochs_of(group)
        whole = _disks(entries, images, [Coverage([(0, image.size_bytes)]) for image in images])
        decision = Decision(Action.UP_TO_DATE, "what was sealed is applied")
        return OpenedGroup(epochs, entries[0].owner, whole, epochs.sealed, decision, 0, None, sealed=True)

    def seal(self, group: OpenedGroup) -> None:
        """The epoch is whole. What was written directly is made durable and published. Idempotent.

        Raises:
            TargetError, SpaceError: an image could not be made durable or published; none is marked clean.
        """
        if group.sealed:
            return
        if group.journal is not None:
            for disk in group.disks:
                disk.image.sync()
            self.settle(group, group.epoch)
        with self._retention.held() as held:
            catalogue = load(held)
            epochs = replace(group.epochs, sealed=group.epoch, under_way=NO_ID)
            store(held, catalogue.with_epochs(epochs))
            remove_journal(held, epochs.number)

    def unsettle(self, group: OpenedGroup, epoch: bytes) -> None:
        """From now on the images hold a part of this epoch; durable on return."""
        for disk in group.disks:
            self._mark(_entry(group, disk), disk.image, epoch, clean=False)

    def settle(self, group: OpenedGroup, epoch: bytes) -> None:
        """The images hold this epoch, durably: publish them under a new content id and mark them clean.

        Raises:
            TargetError, SpaceError: one could not be published; none is marked clean.
        """
        for disk in group.disks:
            disk.image.publish(content_id(epoch))
        for disk in group.disks:
            self._mark(_entry(group, disk), disk.image, epoch, clean=True)

    def settled(self, disks: Iterable[str]) -> bool:
        """Whether no disk of these names says that it is between two states."""
        marks = [read_sidecar(self._files, self._dir_fd, disk) for disk in disks]
        return all(mark is None or mark.clean for mark in marks)

    def note_durable(self, number: int, entries: Iterable[tuple[int, int, int]]) -> None:
        """(disk, start, end) of epoch ``number`` is in the images before its seal; durable on return."""
        with self._retention.held() as held, closing(CoverageJournal.open(held, number)) as journal:
            journal.append(entries)

    def _state_of_direct(
        self, known: GroupEpochs, entries: Sequence[Entry], images: Sequence[FlatVmdk]
    ) -> TargetState:
        """What a first epoch has left, VMDKs of ours among it if a crash came before the seal was noted."""
        nothing = TargetState(known.sealed, blank=all(image.blank for image in images))
        for entry, image in zip(entries, images, strict=True):
            sidecar = self._sidecar_of(entry, image)
            if sidecar is None or sidecar.epoch != known.under_way:
                return nothing
            if image.cid not in (sidecar.cid, content_id(sidecar.epoch)):
                return nothing
        return replace(nothing, under_way=known.under_way, under_way_mode=known.mode)

    def _holds(self, lineage: Lineage, entries: Sequence[Entry], images: Sequence[FlatVmdk]) -> bool:
        """Whether the images are what the log says. One that somebody else wrote to is not."""
        for entry, image in zip(entries, images, strict=True):
            sidecar = self._sidecar_of(entry, image)
            if sidecar is None:
                return False
            untouched = sidecar.cid == image.cid and sidecar.modified_ns == image.modified_ns()
            if sidecar.clean and (sidecar.epoch != lineage.base or not untouched):
                return False
            if not sidecar.clean and sidecar.epoch not in lineage.applying:
                return False
        return True

    def _sidecar_of(self, entry: Entry, image: FlatVmdk) -> Sidecar | None:
        """An image's sidecar, if it is there and its own."""
        sidecar = read_sidecar(self._files, self._dir_fd, image.disk)
        own = sidecar is not None and (sidecar.owner, sidecar.disk) == (entry.owner, entry.number)
        return sidecar if own and not image.blank else None

    def _mark(self, entry: Entry, image: FlatVmdk, epoch: bytes, *, clean: bool) -> None:
        modified_ns = image.modified_ns() if clean else 0
        sidecar = Sidecar(entry.owner, entry.number, epoch, clean, image.cid, modified_ns)
        write_sidecar(self._files, self._dir_fd, entry.name, sidecar)

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


def _entry(group: OpenedGroup, disk: OpenedDisk) -> Entry:
    return Entry(disk.number, group.epochs.name, disk.name, group.owner)


def _disks(
    entries: Sequence[Entry], images: Sequence[FlatVmdk], durable: Sequence[Coverage]
) -> tuple[OpenedDisk, ...]:
    return tuple(
        OpenedDisk(entry.number, entry.name, image, coverage)
        for entry, image, coverage in zip(entries, images, durable, strict=True)
    )
