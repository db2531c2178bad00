"""The settings of the installation: one document with a revision."""

from __future__ import annotations

import json

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control import tables
from replicator.control.models import Settings, SettingsWanted
from replicator.control.problems import changed
from replicator.control.repositories.rows import Change, to_text

_TABLE = tables.settings
_REVISION = tables.counters


async def get(connection: AsyncConnection) -> Settings:
    """The settings; what was never set is as it comes."""
    rows = (await connection.execute(select(_TABLE.c.name, _TABLE.c.value))).all()
    revision = await connection.scalar(select(_REVISION.c.value).where(_REVISION.c.name == "settings"))
    # What another release has set, and this one does not know, stays in the table.
    known = {name: json.loads(value) for name, value in rows if name in SettingsWanted.model_fields}
    return Settings(**known, revision=revision or 0)


async def replace(connection: AsyncConnection, asked: Change, wanted: SettingsWanted) -> Settings:
    """Set all of them; ``api.changed``."""
    counting = update(_REVISION).where(_REVISION.c.name == "settings")
    if asked.revision is not None:
        counting = counting.where(_REVISION.c.value == asked.revision)
    done = await connection.execute(counting.values(value=_REVISION.c.value + 1))
    if not done.rowcount:
        raise changed("the settings")
    values = wanted.model_dump()
    await connection.execute(delete(_TABLE).where(_TABLE.c.name.in_(values)))
    rows = [{"name": name, "value": to_text(value)} for name, value in values.items()]
    await connection.execute(insert(_TABLE), rows)
    return await get(connection)
