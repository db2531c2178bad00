"""What happened, numbered in the order of becoming visible: who has read up to one misses none after it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control import tables
from replicator.control.models import Event, Severity
from replicator.control.repositories.rows import Window, next_number, shaped, some

_TABLE = tables.events


@dataclass(frozen=True, slots=True)
class Happening:
    """An event to be told. ``thing``: the id it is about; ``code``, ``cause``, ``fix`` as those of errors."""

    severity: Severity
    code: str
    thing: str
    message: str
    cause: str = ""
    fix: str = ""


async def page(connection: AsyncConnection, window: Window) -> tuple[list[Event], str | int | None]:
    """A part of all events, oldest first."""
    rows, following = await some(connection, select(_TABLE), _TABLE.c.seq, window)
    return [shaped(Event, row) for row in rows], following


async def latest(connection: AsyncConnection) -> int:
    """The number of the latest event; 0: there was none."""
    wanted = select(tables.counters.c.value).where(tables.counters.c.name == "event")
    return await connection.scalar(wanted) or 0


async def append(connection: AsyncConnection, happening: Happening, now_ns: int) -> int:
    """Tell an event; its number."""
    seq, _ = await next_number(connection, "event")
    await connection.execute(insert(_TABLE).values(**asdict(happening), seq=seq, time_ns=now_ns))
    return seq


async def prune(connection: AsyncConnection, before_ns: int) -> int:
    """Forget what happened before; how many events that were."""
    done = await connection.execute(delete(_TABLE).where(_TABLE.c.time_ns < before_ns))
    return done.rowcount
