"""What a master target knows of a group beyond its blocks: the sealed epochs that are retained, and the one
that is under way.

One file a group, ``group.json`` beside the group's logs, replaced whole and hashed. Values and pure
functions, but for ``load`` and ``store``. Not here: the blocks themselves (``log.py``), disk numbers and
owners (``images/catalogue.py``), and the deleting of undo logs: this says which may go.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from protocol.constants import MIB, SECTOR_BYTES
from protocol.messages import NO_ID, Consistency, Mode
from replicator.errors import StateError
from replicator.files import read_small_file
from replicator.private_directory import HeldDirectory, checked_record, decode_record, unusable

FILE = "group.json"
KEEP_S = 24 * 3600
ROWS_MAX = 64 * 1024  # of all epochs, one for each and one for each of its disks: keeps FILE at some 5 MiB
FILE_MAX_BYTES = 16 * MIB
LABELS = {
    Consistency.FUZZY: "fuzzy",
    Consistency.PER_DISK: "per-disk",
    Consistency.CRASH: "crash",
    Consistency.APPLICATION: "application",
}
_VERSION = 1
_FIELDS = {
    "version": int,
    "name": str,
    "names": dict,
    "before": str,
    "epochs": list,
    "under_way": str,
    "number": int,
    "mode": str,
    "early": bool,
    "hash": str,
}
_EPOCH_FIELDS = {"id": str, "number": int, "sealed_ns": int, "consistency": str, "disks": list}


@dataclass(frozen=True, slots=True)
class SealedDisk:
    """A disk as an epoch left it. ``size``: bytes; ``snapshot_ns``: since 1970 UTC, 0 without a snapshot."""

    number: int
    name: str
    size: int
    snapshot_ns: int = 0


@dataclass(frozen=True, slots=True)
class SealedEpoch:
    """An epoch that is whole and durable.

    Attributes:
        id: of the epoch, and of its recovery point if it is one.
        number: the local one, in the names of its logs.
        parent: id of the sealed epoch before it, to which its undo leads back; NO_ID: to what was there
            before any of ours.
        sealed_ns: when, by this side's clock, in ns since 1970 UTC.
        consistency: what a recovery point of it is worth; FUZZY: it is none.
        disks: in the order of OPEN.
    """

    id: bytes
    number: int
    parent: bytes
    sealed_ns: int
    consistency: Consistency
    disks: tuple[SealedDisk, ...]

    @property
    def is_point(self) -> bool:
        """Whether it is a recovery point."""
        return self.consistency is not Consistency.FUZZY

    @property
    def time_ns(self) -> int:
        """The moment that it shows: of its oldest snapshot; where a disk has none, when it was sealed."""
        return min((disk.snapshot_ns for disk in self.disks), default=0) or self.sealed_ns

    @property
    def skew_ms(self) -> int:
        """Milliseconds between its first and its last snapshot, rounded up; 0 where a disk has none."""
        times = [disk.snapshot_ns for disk in self.disks]
        return -(-(max(times) - min(times)) // 1_000_000) if all(times) and times else 0


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """Everything known of a group's epochs.

    Attributes:
        name: of the group.
        epochs: those retained, oldest first; each is the parent of the next.
        under_way: id of the epoch that was begun and not sealed, NO_ID if there is none.
        number: of the epoch under way, or of the last that was.
        mode: what was agreed on for it.
        early: part of it is in the base already.
    """

    name: str
    epochs: tuple[SealedEpoch, ...] = ()
    under_way: bytes = NO_ID
    number: int = 0
    mode: Mode = Mode.FULL
    early: bool = False

    @property
    def sealed(self) -> bytes:
        """Id of the newest sealed epoch, NO_ID if there is none."""
        return self.epochs[-1].id if self.epochs else NO_ID

    @property
    def history(self) -> tuple[bytes, ...]:
        """Ids of the sealed epochs, oldest first."""
        return tuple(epoch.id for epoch in self.epochs)

    def find(self, epoch: bytes) -> SealedEpoch | None:
        """The retained epoch of this id. A sender whose memory was set back may use one again: the newest."""
        return next((known for known in reversed(self.epochs) if known.id == epoch), None)


@dataclass(frozen=True, slots=True)
class Retention:
    """How long recovery points are kept. ``keep_s``: since they were sealed; ``keep_count``: None: any
    number.
    """

    keep_s: float = KEEP_S
    keep_count: int | None = None


def seal(
    record: GroupRecord, sealed_ns: int, consistency: Consistency, disks: Sequence[SealedDisk]
) -> GroupRecord:
    """The record with the epoch under way sealed.

    A FULL epoch begins a new history: it went to new images, to which no older undo applies.

    Raises:
        ValueError: none is under way.
    """
    if record.under_way == NO_ID:
        raise ValueError("no epoch is under way that could be sealed")
    before = () if record.mode is Mode.FULL else record.epochs
    parent = before[-1].id if before else NO_ID
    epoch = SealedEpoch(record.under_way, record.number, parent, sealed_ns, consistency, tuple(disks))
    return replace(record, epochs=(*before, epoch), under_way=NO_ID, early=False)


def expired(record: GroupRecord, now_ns: int, retention: Retention) -> tuple[int, ...]:
    """Numbers of the epochs, from the old end, that need no longer be retained: ``forget`` them.

    Never the newest epoch, nor the newest recovery point, nor anything newer than that. An epoch that makes
    no recovery point goes when it is too old, or with a point that is newer.
    """
    last = len(record.epochs) - 1
    points = [place for place, epoch in enumerate(record.epochs) if epoch.is_point]
    latest = points[-1] if points else last
    counted = 0  # how many the number of points alone lets go
    if retention.keep_count is not None and len(points) > max(1, retention.keep_count):
        counted = points[-max(1, retention.keep_count)]
    rows = 0
    gone = 0
    for place in range(last, -1, -1):
        epoch = record.epochs[place]
        rows += 1 + len(epoch.disks)
        too_old = now_ns - epoch.sealed_ns > retention.keep_s * 1_000_000_000
        if place < latest and (too_old or place < counted or rows > ROWS_MAX):
            gone = place + 1
            break
    return tuple(epoch.number for epoch in record.epochs[:gone])


def forget(record: GroupRecord, numbers: Collection[int]) -> GroupRecord:
    """The record without these epochs.

    Raises:
        ValueError: they are not the oldest, or the newest is among them.
    """
    kept = record.epochs[len(numbers) :]
    if {epoch.number for epoch in record.epochs[: len(numbers)]} != set(numbers) or not kept:
        raise ValueError("only the oldest epochs can be forgotten")
    return replace(record, epochs=kept)


def undo_needed(record: GroupRecord) -> frozenset[int]:
    """Numbers of the epochs whose undo leads to something that is retained: any other undo log may go.

    That of the oldest epoch does only if nothing of ours was before it: then it leads to what was there.
    """
    first = record.epochs[:1]
    needed = {epoch.number for epoch in record.epochs[1:]}
    needed.update(epoch.number for epoch in first if epoch.parent == NO_ID)
    return frozenset(needed | ({record.number} if record.under_way != NO_ID else set()))


def describe(record: GroupRecord) -> list[dict[str, Any]]:
    """The recovery points, oldest first, as the command line tells them."""
    return [
        {
            "id": epoch.id.hex(),
            "epoch": epoch.id.hex(),
            "time": _text(epoch.time_ns),
            "consistency": LABELS[epoch.consistency],
            "skew_ms": epoch.skew_ms,
            "disks": [disk.name for disk in epoch.disks],
        }
        for epoch in record.epochs
        if epoch.is_point
    ]


def load(held: HeldDirectory, name: str) -> GroupRecord:
    """The record of the group ``name`` from its directory; a new one where there is none.

    Raises:
        StateError: ``group.damaged``, ``state.unusable``.
    """
    try:
        content = read_small_file(held.files, held.fd, FILE, FILE_MAX_BYTES)
    except FileNotFoundError:
        return GroupRecord(name)
    except OSError as error:
        raise unusable(held.path / FILE, "read", error) from error
    try:
        return _decoded(content, name)
    except (ValueError, KeyError) as error:
        raise StateError(
            "group.damaged",
            f"{held.path / FILE} cannot be used: {error}",
            cause="the file was edited, cut short or overwritten, or comes from a newer release",
            fix="restore it from a backup; without it the VMDKs stay as they are, but their recovery points "
            "cannot be told from one another: move the group's directory away to begin anew",
        ) from None


def store(held: HeldDirectory, record: GroupRecord) -> None:
    """Replace the record; durable on return. ``StateError``, ``SpaceError`` if it cannot be written."""
    written = {
        "version": _VERSION,
        "name": record.name,
        "names": {str(disk.number): disk.name for epoch in record.epochs for disk in epoch.disks},
        "before": record.epochs[0].parent.hex() if record.epochs else "",
        "epochs": [
            {
                "id": epoch.id.hex(),
                "number": epoch.number,
                "sealed_ns": epoch.sealed_ns,
                "consistency": epoch.consistency.name,
                "disks": [[disk.number, disk.size, disk.snapshot_ns] for disk in epoch.disks],
            }
            for epoch in record.epochs
        ],
        "under_way": record.under_way.hex(),
        "number": record.number,
        "mode": record.mode.name,
        "early": record.early,
    }
    held.replace(FILE, json.dumps(written | {"hash": _hash(written)}).encode() + b"\n")


def _decoded(content: bytes, name: str) -> GroupRecord:
    """``ValueError`` or ``KeyError`` says what does not fit."""
    record = decode_record(content, _FIELDS)
    if record["version"] != _VERSION:
        raise ValueError(f"version {record['version']} is not known")
    if record.pop("hash") != _hash(record):
        raise ValueError("it is not what was written")
    if record["name"] != name:
        raise ValueError(f"it belongs to the group {record['name']!r}")
    parent = _id(record["before"]) if record["epochs"] else NO_ID
    epochs: list[SealedEpoch] = []
    for found in record["epochs"]:
        epochs.append(_epoch(checked_record(found, _EPOCH_FIELDS), parent, record["names"]))
        parent = epochs[-1].id
    numbers = [epoch.number for epoch in epochs]
    under_way = _id(record["under_way"])
    if numbers != sorted(set(numbers)) or (numbers and record["number"] < numbers[-1]):
        raise ValueError("numbers of epochs that do not rise")
    return GroupRecord(
        name, tuple(epochs), under_way, record["number"], Mode[record["mode"]], record["early"]
    )


def _epoch(record: Mapping[str, Any], parent: bytes, names: Mapping[str, str]) -> SealedEpoch:
    disks = []
    for found in record["disks"]:
        if not isinstance(found, list) or [type(value) for value in found] != [int, int, int]:
            raise ValueError("a disk that is none")
        number, size, snapshot_ns = found
        if size <= 0 or size % SECTOR_BYTES or snapshot_ns < 0:
            raise ValueError("a disk of a size or time that no disk has")
        disks.append(SealedDisk(number, names[str(number)], size, snapshot_ns))
    consistency = Consistency[record["consistency"]]
    return SealedEpoch(
        _id(record["id"]), record["number"], parent, record["sealed_ns"], consistency, tuple(disks)
    )


def _id(text: str) -> bytes:
    found = bytes.fromhex(text)
    if len(found) != len(NO_ID):
        raise ValueError("an epoch id of the wrong length")
    return found


def _hash(record: Mapping[str, Any]) -> str:
    return sha256(json.dumps(record).encode()).hexdigest()


def _text(time_ns: int) -> str:
    """ISO 8601, UTC, milliseconds: ``2024-05-01T12:00:00.123Z``."""
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest_ns // 1_000_000:03}Z"
