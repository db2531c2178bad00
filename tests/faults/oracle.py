"""The other side's memory: what a source held at each epoch, what was acknowledged of it, what was sealed.

It shares no memory with what is tested: it is told events in plain numbers (`Told`), from the same process or
over a pipe, and answers what may be found after a crash. Not here: how that is looked at
(`checks.py`) and what is done to the product (`story.py`).
"""

import random
import struct
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import NamedTuple, Protocol

from replicator.extents import Coverage

SECTOR = 512
KIB = 1024
SIZES = {"one": 192 * KIB, "two": 64 * KIB + SECTOR, "three": 20 * KIB}
"""The disks of the group: name and bytes. Now and then 64 KiB are written, which go past the page cache."""

Contents = dict[str, bytes]
"""What the disks of the group hold, by name."""


class Violation(AssertionError):
    """One of the promises I1 to I5 (README.md) was broken."""


class Written(NamedTuple):
    """A stretch of a disk that differs between two epochs."""

    start: int
    end: int
    zero: bool


class Source:
    """The disks that are replicated, as they were at epoch 0, 1, 2, ...: each follows from the seed alone.

    A writer stamps every sector that it writes with (its sequence number, a hash of number and place), over
    and over, so that a sector that is torn, old, or in the wrong place can be told from every other.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._epochs: list[Contents] = []

    def at(self, epoch: int) -> Contents:
        """What the disks held at an epoch."""
        while len(self._epochs) <= epoch:
            number = len(self._epochs)
            before = self._epochs[-1] if number else {name: bytes(size) for name, size in SIZES.items()}
            rng = random.Random(f"{self._seed}/{number}")
            self._epochs.append({name: _rewritten(before[name], name, number, rng) for name in SIZES})
        return self._epochs[epoch]

    def changed(self, disk: str, since: int | None, epoch: int, start: int, end: int) -> Iterator[Written]:
        """What of [start, end) differs between two epochs, in order; all of it, if `since` is None."""
        before, now = (self.at(since)[disk] if since is not None else None), self.at(epoch)[disk]
        found: Written | None = None
        for position in range(start, end, SECTOR):
            sector = now[position : position + SECTOR]
            if before is not None and sector == before[position : position + SECTOR]:
                continue
            zero = not any(sector)
            if found is not None and (found.end, found.zero) == (position, zero):
                found = found._replace(end=position + SECTOR)
            else:
                if found is not None:
                    yield found
                found = Written(position, position + SECTOR, zero)
        if found is not None:
            yield found


def _rewritten(before: bytes, disk: str, epoch: int, rng: random.Random) -> bytes:
    content = bytearray(before)
    sectors = len(content) // SECTOR
    for number in range(rng.randint(3, 9)):
        length = min(sectors, rng.choice((1, 1, 3, 8, 16, 40, 136)))
        first = rng.randrange(sectors - length + 1)
        if rng.random() < 0.5:
            first -= first % 8  # whole pages go another way than single sectors
        zero = rng.random() < 0.2
        sequence = epoch << 16 | number + 1
        for sector in range(first, first + length):
            stamp = bytes(SECTOR) if zero else _stamped(sequence, disk, sector)
            content[sector * SECTOR : (sector + 1) * SECTOR] = stamp
    return bytes(content)


_STAMP = struct.Struct("<Q8s")


def _stamped(sequence: int, disk: str, sector: int) -> bytes:
    digest = blake2b(f"{disk}/{sector}/{sequence}".encode(), digest_size=8).digest()
    return _STAMP.pack(sequence, digest) * (SECTOR // _STAMP.size)


def difference(found: bytes, wanted: bytes) -> str:
    """The first sector that differs, in words; empty if none does."""
    if found == wanted:
        return ""
    if len(found) != len(wanted):
        return f"{len(found)} bytes instead of {len(wanted)}"
    sectors = range(0, len(wanted), SECTOR)
    at = next(at for at in sectors if found[at : at + SECTOR] != wanted[at : at + SECTOR])
    stamps = [_STAMP.unpack_from(content, at)[0] for content in (found, wanted)]
    return "sector {}: write {}.{} instead of {}.{}".format(
        at // SECTOR, *(part for stamp in stamps for part in (stamp >> 16, stamp & 0xFFFF))
    )


class Told(Protocol):
    """What is told by whoever uses the product, in this order. Epochs by the number of `Source.at`."""

    def begins(self, epoch: int) -> None:
        """This epoch is about to be opened: another one that was under way is given up."""

    def acks(self, disk: str, start: int, end: int) -> None:
        """This stretch of the epoch under way was acknowledged."""

    def seals(self, epoch: int) -> None:
        """SEAL is about to be asked for."""

    def sealed(self, epoch: int) -> None:
        """SEALED was answered."""

    def prunes(self, count: int) -> None:
        """All but so many recovery points may go from now on."""


class Oracle:
    """What was told, and what follows for whoever looks after a crash.

    Attributes:
        source: the disks.
        epoch: under way; None if there is none.
        acked: what was acknowledged of it, by disk.
        answered: the epochs of which SEALED was answered, oldest first.
    """

    def __init__(self, seed: int) -> None:
        self.source = Source(seed)
        self.epoch: int | None = None
        self.acked: Mapping[str, Coverage] = {}
        self.answered: list[int] = []
        self._sealing: int | None = None
        self._kept_from = 0  # what is before this epoch may be gone
        self._next = 0

    def begins(self, epoch: int) -> None:
        """See `Told`."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.acked = {name: Coverage() for name in SIZES}
            self._sealing = None
            self._next = max(self._next, epoch + 1)

    def acks(self, disk: str, start: int, end: int) -> None:
        """See `Told`."""
        self.acked[disk].add(start, end)

    def seals(self, epoch: int) -> None:
        """See `Told`."""
        self._sealing = epoch

    def sealed(self, epoch: int) -> None:
        """See `Told`."""
        if epoch not in self.answered:
            self.answered.append(epoch)
        if epoch == self._sealing:
            self._sealing = None

    def prunes(self, count: int) -> None:
        """See `Told`."""
        self._kept_from = max([self._kept_from, *self.answered[-count:][:1]])

    @property
    def newest(self) -> int | None:
        """The newest epoch of which SEALED was answered."""
        return self.answered[-1] if self.answered else None

    @property
    def another(self) -> int:
        """An epoch that was never begun."""
        return self._next

    def may_be_newest(self, epoch: int | None) -> bool:
        """I2: at the last SEALED that was answered, or at the one that was asked for and not answered."""
        return epoch == self.newest or (epoch is not None and epoch == self._sealing)

    def points(self, newest: int) -> list[int]:
        """I3: the recovery points that must be there if this is the newest sealed epoch, oldest first."""
        return [epoch for epoch in dict.fromkeys([*self.answered, newest]) if epoch >= self._kept_from]
