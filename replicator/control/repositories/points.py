"""The mirror of recovery points: what master targets hold and have announced. Lost, it is announced again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control import tables
from replicator.control.models import RecoveryPoint
from replicator.control.repositories.rows import Window, shaped, some, to_text

_TABLE = tables.recovery_points


@dataclass(frozen=True, slots=True)
class Announced:
    """A recovery point in the words of its master target. ``epoch``: 32 hex digits; times: ns since 1970."""

    epoch: str
    time_ns: int
    sealed_ns: int
    consistency: str
    skew_ms: int
    disks: tuple[str, ...]


async def page(
    connection: AsyncConnection, window: Window, group_name: str | None = None
) -> tuple[list[RecoveryPoint], str | int | None]:
    """A part of all recovery points, or of those of a group, by epoch."""
    key = (_TABLE.c.epoch + _TABLE.c.master_target + _TABLE.c.group_name).label("page_key")
    wanted = select(_TABLE, key)
    if group_name is not None:
        wanted = wanted.where(_TABLE.c.group_name == group_name)
    rows, following = await some(connection, wanted, key, window)
    return [
        shaped(RecoveryPoint, row, group=row["group_name"], disks=json.loads(row["disks"])) for row in rows
    ], following


async def announced(
    connection: AsyncConnection, master_target: str, group_name: str, points: Sequence[Announced]
) -> None:
    """All points that a master target holds of a group: what is not among them is gone there."""
    of_group = (_TABLE.c.master_target == master_target) & (_TABLE.c.group_name == group_name)
    await connection.execute(delete(_TABLE).where(of_group))
    rows = [
        {
            "master_target": master_target,
            "group_name": group_name,
            "epoch": point.epoch,
            "time_ns": point.time_ns,
            "sealed_ns": point.sealed_ns,
            "consistency": point.consistency,
            "skew_ms": point.skew_ms,
            "disks": to_text(point.disks),
        }
        for point in points
    ]
    if rows:
        await connection.execute(insert(_TABLE), rows)
