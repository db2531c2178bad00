"""What the pipelines ask of an image. The conformance suite is ``tests/replicator/images/conformance.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from protocol.messages import Interval
from protocol.payload import Extent
from replicator.images.reading import Digested


class Image(Protocol):
    """A disk that is written. All methods block: they are called through ``workers.py``.

    Attributes:
        name: what an operator would call it, for messages.
        size_bytes: size of the disk; a multiple of 512.
        blank: True while every byte that was never written is known to read as zero (a new file).
    """

    name: str
    size_bytes: int
    blank: bool

    def write(self, extents: Sequence[Extent], payload: memoryview) -> None:
        """Write extents; ``payload`` holds the bytes of those that are not ``zero``, one after the other.

        Sorted and disjoint, inside the disk, whole sectors. Concurrent calls on disjoint extents are allowed
        and lose nothing, however close they are. Durable only after ``sync``.

        Raises:
            SpaceError: ``target.full``. TargetError: ``target.write_failed``. What was written so far is
            undefined.
        """
        ...

    def read_ahead(self, extents: Sequence[Extent]) -> None:
        """Have sorted extents on their way that ``read_into`` is going to be asked for: disks serve many at
        once.

        Raises:
            TargetError: ``target.read_failed``.
        """
        ...

    def read_into(self, extents: Sequence[Extent], view: memoryview) -> None:
        """Fill ``view`` with the bytes of extents, one after the other, whatever their kind.

        Fast if they are sorted and ``view`` is page-aligned. Not while they are being written.

        Raises:
            TargetError: ``target.read_failed``; ``target.sync_failed`` after a failed sync, since what is
            read then may be what the disk has lost.
        """
        ...

    def digests(self, intervals: Sequence[Interval], block: int, seed: int, most: int) -> Digested:
        """Digests of what is there, as ``reading.digest_blocks``. Not while they are being written.

        Raises:
            TargetError: ``target.read_failed``.
        """
        ...

    def sync(self) -> None:
        """Make everything whose ``write`` returned before this call durable.

        Raises:
            TargetError: ``target.sync_failed``; final: the image must be reopened and verified, never synced
            again.
        """
        ...

    def close(self) -> None:
        """Let go of it, without making anything durable. Idempotent."""
        ...
