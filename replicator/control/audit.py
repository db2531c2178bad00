"""The audit log: who did what to which thing. Append-only, and each entry is chained to the one before it.

An entry's hash is SHA-256 of the JSON array ``[seq, time_ns, actor, action, thing, details, previous]``:
``details`` is the text that is kept, ``previous`` the hash before it, 64 zeros before the first. The last
hash stands in ``counters`` too, so that an end that was cut off is noticed. Whoever may write to the database
can make all of it anew: compare with a hash that was noted elsewhere. Not here: what is worth an entry
(``routes.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import RowMapping, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control.models import AuditEntry, AuditVerdict
from replicator.control.repositories.rows import Window, next_number, shaped, some, to_text
from replicator.control.tables import audit as _table
from replicator.control.tables import counters

GENESIS: Final = "0" * 64
_ROWS_A_STEP: Final = 1000


@dataclass(frozen=True, slots=True)
class Deed:
    """Something that was done. ``details``: no secrets."""

    actor: str
    action: str
    thing: str
    details: Mapping[str, object]


async def append(connection: AsyncConnection, deed: Deed, now_ns: int) -> int:
    """Add an entry; its number. It is there if the transaction's other changes are."""
    seq, previous = await next_number(connection, "audit")
    row = {
        "seq": seq,
        "time_ns": now_ns,
        "actor": deed.actor,
        "action": deed.action,
        "thing": deed.thing,
        "details": to_text(dict(deed.details)),
        "previous_sha256": previous,
    }
    digest = _digest(row)
    await connection.execute(insert(_table).values(**row, sha256=digest))
    await connection.execute(update(counters).where(counters.c.name == "audit").values(sha256=digest))
    return seq


async def page(connection: AsyncConnection, window: Window) -> tuple[list[AuditEntry], str | int | None]:
    """A part of the log, oldest first."""
    rows, following = await some(connection, select(_table), _table.c.seq, window)
    return [shaped(AuditEntry, row, details=json.loads(row["details"])) for row in rows], following


async def verify(connection: AsyncConnection) -> AuditVerdict:
    """Read all of it and check the chain."""
    seq, previous = 0, GENESIS
    while True:
        rows, following = await some(connection, select(_table), _table.c.seq, Window(seq, _ROWS_A_STEP))
        for row in rows:
            if row["seq"] != seq + 1 or row["previous_sha256"] != previous or row["sha256"] != _digest(row):
                return AuditVerdict(entries=seq, sha256=previous, whole=False, broken_at=seq + 1)
            seq, previous = row["seq"], row["sha256"]
        if following is None:
            break
    last = (await connection.execute(select(counters).where(counters.c.name == "audit"))).mappings().one()
    whole = (last["value"], last["sha256"]) == (seq, previous)
    return AuditVerdict(entries=seq, sha256=previous, whole=whole, broken_at=None if whole else seq + 1)


def _digest(row: Mapping[str, Any] | RowMapping) -> str:
    fields = ("seq", "time_ns", "actor", "action", "thing", "details", "previous_sha256")
    return sha256(json.dumps([row[name] for name in fields], separators=(",", ":")).encode()).hexdigest()
