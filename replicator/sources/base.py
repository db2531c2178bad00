"""What the pipelines ask of a source. Its conformance suite: ``tests/replicator/sources/conformance.py``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, TypeVar

from protocol.payload import Extent

T = TypeVar("T")


class Source(Protocol):
    """A disk that is read, at rest or alive.

    Attributes:
        name: what an operator would call it, for messages.
        size_bytes: size of the disk; a multiple of 512, not zero, fixed while it is open.
    """

    name: str
    size_bytes: int

    def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        """The disk from ``start`` to its end as touching extents in order; ``zero`` ones are known zeros.

        Made as it is consumed, so that a disk of any size costs the same memory.

        Raises:
            SourceError: the source cannot be read, or is no longer what it was.
        """
        ...

    async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        """Fill ``view`` with the bytes of the extents, one after the other, and return what ``then`` returns.

        ``then`` is what comes next with these bytes (hashing, packing); it runs in a worker thread, if
        possible in the one that has just read. Calls may run side by side.

        Raises:
            SourceError: code ``source.read_failed`` names the range; ``source.shrank`` when it ends early.
            Whatever ``then`` raises.
        """
        ...

    async def fingerprint(self) -> str:
        """Text that differs when the content may differ from what it was; empty if nothing can tell.

        Raises:
            SourceError: it cannot be looked at.
        """
        ...

    async def changed(self) -> bool:
        """Whether the source may have changed since it was opened. Never True for a snapshot.

        Raises:
            SourceError: ``source.grew`` or ``source.shrank``: its size is no longer the one announced.
        """
        ...

    async def close(self) -> None:
        """Let go of it. Idempotent."""
        ...
