"""What a process server remembers of a group between two runs: the epoch under way, and the maps of the
sealed one.

May be lost at any time: then both sides compare. One directory a group and target authority, below
``--state``: ``group.json``, replaced whole, and the digest maps that it names. A map counts only once it is
named there, which happens after SEALED. All of it blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

from protocol.messages import NO_ID
from replicator.digest_map import DigestMap, DigestMapBuilder
from replicator.failpoints import reach
from replicator.private_directory import (
    HeldDirectory,
    PrivateDirectory,
    checked_record,
    decode_record,
    encode_record,
    unusable,
)

FILE = "group.json"
_FIELDS = {"version": int, "group": str, "under_way": str, "sources": dict, "sealed": str, "maps": dict}
_MAP_FIELDS = {"file": str, "root": str, "size": int}
_VERSION = 1


@dataclass(frozen=True, slots=True)
class PublishedMap:
    """Where the map of a disk is, and what it must be. ``size``: of the disk, in bytes."""

    file: str
    root: bytes
    size: int


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """Everything remembered. ``sources``: fingerprints as the epoch under way began, by disk."""

    under_way: bytes = NO_ID
    sources: Mapping[str, str] = field(default_factory=dict)
    sealed: bytes = NO_ID
    maps: Mapping[str, PublishedMap] = field(default_factory=dict)


class GroupMemory:
    """The memory of one group at one target.

    Args:
        state: the state directory.
        pin: of the target's authority, 32 bytes: another installation holds nothing of ours.
        group: its name.
    """

    def __init__(self, state: PrivateDirectory, pin: bytes, group: str) -> None:
        self._group = group
        self._directory = state.below("groups").below(sha256(pin + group.encode()).hexdigest()[:32])

    def load(self) -> GroupRecord:
        """What is remembered; nothing, if the record does not hold. ``StateError`` if the directory fails."""
        with self._directory.held() as held:
            return self._load(held)

    def begin(self, epoch: bytes, sources: Mapping[str, str]) -> None:
        """This epoch is under way from now on, so that a later run goes on with it."""
        reach("epoch.before_begin")
        with self._directory.held() as held:
            self._store(held, replace(self._load(held), under_way=epoch, sources=sources))
        reach("epoch.begun")

    def build(self, epoch: bytes, number: int, size: int, seed: int) -> DigestMapBuilder:
        """A builder for the map of the epoch's disk ``number``. ``StateError`` if its file cannot be made."""
        with self._directory.held() as held:
            try:
                return DigestMapBuilder(held.files, held.fd, f"{epoch.hex()}-{number}.map", size, seed)
            except OSError as error:
                raise unusable(held.path, "written", error) from error

    def publish(self, epoch: bytes, builders: Mapping[str, tuple[DigestMapBuilder, int]]) -> None:
        """The epoch is sealed: its maps (disk -> builder, size) are the ones to believe; incomplete ones are
        none.
        """
        roots = {disk: (builder.finish(), builder.name, size) for disk, (builder, size) in builders.items()}
        maps = {
            disk: PublishedMap(name, root, size)
            for disk, (root, name, size) in roots.items()
            if root is not None
        }
        with self._directory.held() as held:
            reach("epoch.before_publish")
            self._store(held, GroupRecord(sealed=epoch, maps=maps))
            reach("epoch.published")
            named = {published.file for published in maps.values()}
            for name in self._directory.names():
                if name.endswith(".map") and name not in named:
                    held.remove(name)

    def open_maps(self, record: GroupRecord, sizes: Mapping[str, int], seed: int) -> dict[str, DigestMap]:
        """The maps of the sealed epoch, for exactly these disks; none, unless every one of them is to be
        believed.
        """
        if record.sealed == NO_ID or sizes != {disk: known.size for disk, known in record.maps.items()}:
            return {}
        found: dict[str, DigestMap] = {}
        with self._directory.held() as held:
            for disk, known in record.maps.items():
                opened = DigestMap.open(held.files, held.fd, known.file, known.root, known.size, seed)
                if opened is None:
                    for other in found.values():
                        other.close()
                    return {}
                found[disk] = opened
        return found

    def _load(self, held: HeldDirectory) -> GroupRecord:
        content = held.read(FILE)
        try:
            record = decode_record(content or b"", _FIELDS)
            if record["version"] != _VERSION or record["group"] != self._group:
                return GroupRecord()
            maps = {disk: checked_record(known, _MAP_FIELDS) for disk, known in record["maps"].items()}
            return GroupRecord(
                _id(record["under_way"]),
                {disk: str(fingerprint) for disk, fingerprint in record["sources"].items()},
                _id(record["sealed"]),
                {
                    disk: PublishedMap(known["file"], bytes.fromhex(known["root"]), known["size"])
                    for disk, known in maps.items()
                },
            )
        except ValueError:
            return GroupRecord()

    def _store(self, held: HeldDirectory, record: GroupRecord) -> None:
        written = {
            "version": _VERSION,
            "group": self._group,
            "under_way": record.under_way.hex(),
            "sources": dict(record.sources),
            "sealed": record.sealed.hex(),
            "maps": {
                disk: {"file": known.file, "root": known.root.hex(), "size": known.size}
                for disk, known in record.maps.items()
            },
        }
        held.replace(FILE, encode_record(written))


def _id(text: str) -> bytes:
    found = bytes.fromhex(text)
    if len(found) != len(NO_ID):
        raise ValueError("an id of the wrong length")
    return found
