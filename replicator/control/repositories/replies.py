"""Answers to requests with an idempotency key: who sends one again gets the answer, and no second effect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control import tables
from replicator.control.problems import key_reused
from replicator.control.repositories.rows import to_text

_TABLE = tables.idempotency
KEEP_NS: Final = 24 * 3600 * 1_000_000_000


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer that was given. ``body``: JSON without what is told once only."""

    status: int
    headers: Mapping[str, str]
    body: str


async def begin(
    connection: AsyncConnection, actor: str, key: str, request_sha256: str, now_ns: int
) -> Kept | None:
    """None: the request is new, and whoever sends it again meanwhile waits for the end of this transaction.
    Otherwise the answer that it got.

    Raises:
        UsageError: ``api.key_reused``.
    """
    await connection.execute(delete(_TABLE).where(_TABLE.c.created_ns < now_ns - KEEP_NS))
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    row = {"actor": actor, "key": key, "request_sha256": request_sha256, "created_ns": now_ns}
    claiming = dialect.insert(_TABLE).values(**row, status=0, headers="{}", body="")
    claimed = await connection.execute(claiming.on_conflict_do_nothing().returning(_TABLE.c.key))
    if claimed.first() is not None:
        return None
    known = select(_TABLE).where(_TABLE.c.actor == actor, _TABLE.c.key == key)
    found = (await connection.execute(known)).mappings().one()
    if found["request_sha256"] != request_sha256:
        raise key_reused()
    return Kept(found["status"], json.loads(found["headers"]), found["body"])


async def keep(connection: AsyncConnection, actor: str, key: str, kept: Kept) -> None:
    """Keep the answer to the request that ``begin`` found to be new."""
    keeping = update(_TABLE).where(_TABLE.c.actor == actor, _TABLE.c.key == key)
    values = {"status": kept.status, "headers": to_text(dict(kept.headers)), "body": kept.body}
    await connection.execute(keeping.values(**values))
