"""One pool of byte credit for a daemon, shared fairly by its sessions.

Memory of the daemon is bounded by it: a frame is charged before its buffer is taken. With ``n`` sessions
each may hold a part of 1 / (n + 1), so that there is something left for the next one; a newcomer takes at
most half of what is free, so that several may come before the first gives anything back. Each holds credit
for a largest frame at least, whatever the others do: none comes to a standstill beside idle ones. For whom
there is not so much left, there is a queue. Not for threads.
"""

from __future__ import annotations

from asyncio import CancelledError, Future, get_running_loop
from collections import deque
from collections.abc import Callable

from protocol.constants import HEADER_BYTES, RAW_MAX_BYTES, TABLE_MAX_BYTES
from protocol.credit import ReceiveWindow

LARGEST_FRAME_BYTES = HEADER_BYTES + TABLE_MAX_BYTES + RAW_MAX_BYTES


class Share:
    """A session's part of the pool.

    Attributes:
        window: its credit. held: what is granted, not yet durable.
        announce: called whenever the window has grown since it was given out. It must not raise: what made it
            grow may be another session's release.
    """

    def __init__(self, pool: CreditPool) -> None:
        self.window = ReceiveWindow(0)
        self.held = 0
        self.announce: Callable[[], object] = lambda: None
        self._pool = pool

    def release(self, size: int) -> None:
        """``size`` bytes are durable: the pool grants them anew, to this session or others."""
        self.held -= size
        self._pool.returned(size)

    def top_up(self, size: int) -> None:
        """Grant ``size`` bytes more and have it told to the sender."""
        self.held += size
        self.window.grant(size)
        self.announce()


class CreditPool:
    """``total`` bytes for all sessions together."""

    def __init__(self, total: int) -> None:
        if total < 2 * LARGEST_FRAME_BYTES:
            raise ValueError(f"a pool of {total} bytes cannot hold two frames of {LARGEST_FRAME_BYTES}")
        self._free = total
        self._total = total
        self._shares: list[Share] = []
        self._waiting: deque[Future[Share]] = deque()

    @property
    def _part(self) -> int:
        return max(LARGEST_FRAME_BYTES, self._total // (len(self._shares) + 1))

    def join(self) -> Share | None:
        """A share for a new session; None: there is none just now."""
        if self._free < LARGEST_FRAME_BYTES:
            return None
        share = Share(self)
        self._shares.append(share)
        share.held = min(self._part, self._free, max(LARGEST_FRAME_BYTES, self._free // 2))
        self._free -= share.held
        share.window.grant(share.held)
        return share

    async def enter(self) -> Share:
        """A share for a new session, as soon as there is one: who came first is first."""
        turn: Future[Share] = get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            return await turn
        except CancelledError:
            if turn.cancelled():
                self._waiting.remove(turn)
                self.returned(0)
            else:  # its turn came at the same moment
                self.leave(turn.result())
            raise

    def leave(self, share: Share) -> None:
        """The session is over: all that it held is free again."""
        self._shares.remove(share)
        self.returned(share.held)
        share.held = 0

    def returned(self, size: int) -> None:
        """Take bytes back and top up, in turn: sessions below a largest frame, those who wait, then sessions
        below a part.
        """
        self._free += size
        self._top_up(LARGEST_FRAME_BYTES)
        self._admit()
        if not self._waiting:
            self._top_up(self._part)

    def _top_up(self, goal: int) -> None:
        for share in self._shares:
            size = min(goal - share.held, self._free)
            if size > 0:
                self._free -= size
                share.top_up(size)

    def _admit(self) -> None:
        for turn in [turn for turn in self._waiting if not turn.done()]:
            share = self.join()
            if share is None:
                return
            self._waiting.remove(turn)
            turn.set_result(share)
