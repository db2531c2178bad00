"""What a receiving session works with: what a daemon's sessions share, and the state of disks and frames.

Not here: what is done with them (``session.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocol.connection import Body, Data
from protocol.constants import HEADER_BYTES
from replicator.buffers import BufferPool
from replicator.credit_pool import CreditPool
from replicator.extents import Coverage
from replicator.groups import Groups
from replicator.images.directory import OpenedDisk
from replicator.workers import Workers


@dataclass(frozen=True, slots=True)
class ReceivingParts:
    """What a daemon's sessions share.

    Attributes:
        groups: what the master target holds.
        workers: threads for disk and CPU work.
        seed: the installation's hash seed.
        credit: the daemon's pool of credit, which bounds its memory.
        pool: memory for frames.
        give: takes the memory of a DATA body back.
    """

    groups: Groups
    workers: Workers
    seed: int
    credit: CreditPool
    pool: BufferPool
    give: Callable[[Body], None]


@dataclass(slots=True)
class ReceivingDisk:
    """A disk of the epoch under way. ``claimed``: arrived; ``durable``: of it, what a commit has covered."""

    opened: OpenedDisk
    claimed: Coverage
    durable: Coverage

    @property
    def number(self) -> int:
        """What frames call it."""
        return self.opened.number

    @property
    def size(self) -> int:
        """In bytes."""
        return self.opened.image.size_bytes


@dataclass(frozen=True, slots=True)
class Verified:
    """A frame that holds what was read at the source, and is not yet durable."""

    disk: ReceivingDisk
    data: Data

    @property
    def wire_bytes(self) -> int:
        """What it cost of the credit."""
        return HEADER_BYTES + self.data.header.body_len
