"""What a master target knows of its groups and disks beyond their content: numbers, owners, epochs.

One file in the retention directory, replaced whole. Disk numbers and epoch numbers are never given out twice.
Values and pure functions, but for ``load`` and ``store``. Not here: what lies in the datastore.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from protocol.messages import NO_ID, Mode, OpenDisk
from replicator.errors import PeerError, StateError
from replicator.images.flat_vmdk import flat_name
from replicator.private_directory import HeldDirectory, checked_record, decode_record, encode_record

FILE = "catalogue.json"
_FIELDS = {"version": int, "next_number": int, "next_epoch": int, "disks": list, "groups": list}
_DISK_FIELDS = {"number": int, "group": str, "name": str, "owner": str}
_GROUP_FIELDS = {"name": str, "sealed": str, "under_way": str, "number": int, "mode": str}
_VERSION = 1

NAME_MAX_BYTES = 200  # leaves room for our suffixes in the 255 of a file name


@dataclass(frozen=True, slots=True)
class Entry:
    """A disk that this directory has known, for ever."""

    number: int
    group: str
    name: str
    owner: str


@dataclass(frozen=True, slots=True)
class GroupEpochs:
    """A group's epochs: the newest sealed one; the one under way (NO_ID: none), its local number and mode."""

    name: str
    sealed: bytes = NO_ID
    under_way: bytes = NO_ID
    number: int = 0
    mode: Mode = Mode.FULL


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything that must outlive the process but is no disk content."""

    next_number: int = 1
    next_epoch: int = 1
    disks: tuple[Entry, ...] = ()
    groups: tuple[GroupEpochs, ...] = ()

    def find(self, name: str) -> Entry | None:
        """The entry of the disk with this name."""
        return next((entry for entry in self.disks if entry.name == name), None)

    def epochs_of(self, group: str) -> GroupEpochs:
        """What is known of a group; of an unknown one, nothing."""
        return next((known for known in self.groups if known.name == group), GroupEpochs(group))

    def with_epochs(self, epochs: GroupEpochs) -> Catalogue:
        """The catalogue with a group's epochs replaced."""
        others = tuple(known for known in self.groups if known.name != epochs.name)
        return replace(self, groups=(*others, epochs), next_epoch=max(self.next_epoch, epochs.number + 1))


def admit(
    catalogue: Catalogue, owner: str, group: str, wanted: Sequence[OpenDisk]
) -> tuple[list[Entry], Catalogue]:
    """The entries of the wanted disks, new ones numbered, and the catalogue with them.

    Raises:
        PeerError: ``group.empty``, ``group.not_yours``, ``disk.name_taken``, ``disk.listed_twice``.
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
    numbers = catalogue.next_number + len(new)
    return entries, replace(catalogue, next_number=numbers, disks=(*catalogue.disks, *new))


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


def load(held: HeldDirectory) -> Catalogue:
    """The catalogue of a retention directory; a new one where there is none.

    Raises:
        StateError: ``catalogue.damaged``.
    """
    content = held.read(FILE)
    if content is None:
        return Catalogue()
    try:
        record = decode_record(content, _FIELDS)
        if record["version"] != _VERSION:
            raise ValueError(f"version {record['version']} is not known")
        disks = tuple(Entry(**checked_record(entry, _DISK_FIELDS)) for entry in record["disks"])
        groups = tuple(_group(checked_record(entry, _GROUP_FIELDS)) for entry in record["groups"])
        if any(entry.number >= record["next_number"] for entry in disks):
            raise ValueError("a disk's number would be given out again")
        if any(known.number >= record["next_epoch"] for known in groups):
            raise ValueError("an epoch's number would be given out again")
        return Catalogue(record["next_number"], record["next_epoch"], disks, groups)
    except (ValueError, KeyError) as error:
        raise StateError(
            "catalogue.damaged",
            f"{held.path / FILE} cannot be used: {error}",
            cause="the file was edited, cut short or overwritten, or comes from a newer release",
            fix="restore it from a backup; disk numbers and owners are in the sidecars beside the VMDKs",
        ) from None


def store(held: HeldDirectory, catalogue: Catalogue) -> None:
    """Replace the catalogue; durable on return."""
    record = {
        "version": _VERSION,
        "next_number": catalogue.next_number,
        "next_epoch": catalogue.next_epoch,
        "disks": [asdict(entry) for entry in catalogue.disks],
        "groups": [
            {
                "name": known.name,
                "sealed": known.sealed.hex(),
                "under_way": known.under_way.hex(),
                "number": known.number,
                "mode": known.mode.name,
            }
            for known in catalogue.groups
        ],
    }
    held.replace(FILE, encode_record(record))


def _group(record: dict[str, object]) -> GroupEpochs:
    sealed, under_way = bytes.fromhex(str(record["sealed"])), bytes.fromhex(str(record["under_way"]))
    if len(sealed) != len(NO_ID) or len(under_way) != len(NO_ID):
        raise ValueError("an epoch id of the wrong length")
    number = record["number"]
    assert isinstance(number, int)  # noqa: S101 - the schema was checked
    return GroupEpochs(str(record["name"]), sealed, under_way, number, Mode[str(record["mode"])])
