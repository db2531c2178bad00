"""Wakes those who wait for new events, and sends the events on as they come (server-sent events).

What is sent is read from the database, by number: a client that comes back with Last-Event-ID misses nothing,
and what another control server writes is found at the next look. Every look asks again if the client may.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from replicator.clock import Clock
from replicator.control.auth import Access, Shown, ask
from replicator.control.database import Database
from replicator.control.models import COUNT_MAX, Event
from replicator.control.problems import malformed
from replicator.control.repositories import events
from replicator.control.repositories.rows import Window

LOOK_S: Final = 3.0  # a revoked client is gone within 5 s; a proxy sees bytes often enough to keep the line
STREAMS_MAX: Final = 64
_EVENTS_A_LOOK: Final = 200


class Feed:
    """Tells that there are new events; ``close`` ends all who wait. ``listeners``: streams that are open."""

    def __init__(self) -> None:
        self._turn = asyncio.Event()
        self.closed = False
        self.listeners: set[object] = set()

    def turn(self) -> asyncio.Event:
        """Is set at the next ``wake``: taken before looking, nothing is missed between look and wait."""
        return self._turn

    def wake(self) -> None:
        """There are new events."""
        self._turn.set()
        self._turn = asyncio.Event()

    def close(self) -> None:
        """Nobody waits any more."""
        self.closed = True
        self._turn.set()


async def follow(
    database: Database, feed: Feed, clock: Clock, shown: Shown, after: int
) -> AsyncIterator[bytes]:
    """Events after a number as server-sent events; a comment when a look finds none.

    Raises:
        ReplicatorError: the client may not look (any more), or it cannot be found out.
    """
    while not feed.closed:
        turn = feed.turn()
        await ask(database, shown, Access.VIEWER, clock.now_ns())
        async with database.read() as connection:
            found, _ = await events.page(connection, Window(after, _EVENTS_A_LOOK))
        if found:
            after = found[-1].seq
            yield b"".join(map(_encoded, found))
        else:
            yield b": nothing new\n\n"
        if len(found) < _EVENTS_A_LOOK:
            with suppress(TimeoutError):
                await asyncio.wait_for(turn.wait(), LOOK_S)


async def start_of(database: Database, last_event_id: str | None) -> int:
    """After which event a stream begins: where the client was, or now."""
    if last_event_id is None:
        async with database.read() as connection:
            return await events.latest(connection)
    if not last_event_id.isascii() or not last_event_id.isdigit() or int(last_event_id[:20]) > COUNT_MAX:
        raise malformed("Last-Event-ID is no number of an event")
    return int(last_event_id)


def _encoded(event: Event) -> bytes:
    return f"id: {event.seq}\nevent: {event.severity}\ndata: {event.model_dump_json()}\n\n".encode()
