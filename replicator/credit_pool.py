"""One pool of byte credit for a daemon, shared fairly by its sessions.

Memory of the daemon is bounded by it: a frame is charged before its buffer is taken. With ``n`` sessions
each may hold a part of 1 / (n + 1), so that there is something left for the next one; a newcomer takes at
most half of what is free, so that several may come before the first gives anything back. Each holds credit
for a largest frame at least, whatever the others do: none comes to a standstill beside idle ones. Pure; not
for threads.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.constants import HEADER_BYTES, RAW_MAX_BYTES, TABLE_MAX_BYTES
from protocol.credit import ReceiveWindow
from replicator.errors import LinkError

LARGEST_FRAME_BYTES = HEADER_BYTES + TABLE_MAX_BYTES + RAW_MAX_BYTES


class Share:
    """A session's part of the pool: ``window`` is its credit, ``held`` what is granted, not yet durable."""

    def __init__(self, pool: CreditPool, announce: Callable[[], None]) -> None:
        self.window = ReceiveWindow(0)
        self.held = 0
        self._pool = pool
        self._announce = announce

    def release(self, size: int) -> None:
        """``size`` bytes are durable: the pool grants them anew, to this session or others."""
        self.held -= size
        self._pool.returned(size)

    def top_up(self, size: int) -> None:
        """Grant ``size`` bytes more and have it told to the sender."""
        self.held += size
        self.window.grant(size)
        self._announce()


class CreditPool:
    """``total`` bytes for all sessions together."""

    def __init__(self, total: int) -> None:
        if total < 2 * LARGEST_FRAME_BYTES:
            raise ValueError(f"a pool of {total} bytes cannot hold two frames of {LARGEST_FRAME_BYTES}")
        self._free = total
        self._total = total
        self._shares: list[Share] = []

    @property
    def _part(self) -> int:
        return max(LARGEST_FRAME_BYTES, self._total // (len(self._shares) + 1))

    def join(self, announce: Callable[[], None]) -> Share:
        """A share for a new session; ``announce`` is called whenever its window has grown. It must not raise:
        what made it grow may be another session's release.

        Raises:
            LinkError: ``target.busy``: there are too many sessions for the memory; worth another try.
        """
        share = Share(self, announce)
        self._shares.append(share)
        granted = min(self._part, self._free, max(LARGEST_FRAME_BYTES, self._free // 2))
        if granted < LARGEST_FRAME_BYTES:
            self._shares.remove(share)
            raise LinkError(
                "target.busy",
                f"the master target serves {len(self._shares)} sessions and has no memory for another",
                cause="more groups replicate at once than its credit pool allows",
                fix="try again later, or add a master target",
            )
        self._free -= granted
        share.held = granted
        share.window.grant(granted)
        return share

    def leave(self, share: Share) -> None:
        """The session is over: all that it held is free again."""
        self._shares.remove(share)
        self.returned(share.held)
        share.held = 0

    def returned(self, size: int) -> None:
        """Take bytes back and top up, in turn, sessions below a largest frame, then those below a part."""
        self._free += size
        for goal in (LARGEST_FRAME_BYTES, self._part):
            for share in self._shares:
                size = min(goal - share.held, self._free)
                if size > 0:
                    self._free -= size
                    share.top_up(size)
