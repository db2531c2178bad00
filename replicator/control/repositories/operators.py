"""The operators: people and programs that use the API, each with one token and one role."""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from hashlib import sha256
from typing import Final

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control import tables
from replicator.control.models import Operator, OperatorWanted, Role
from replicator.control.problems import conflict
from replicator.control.repositories.rows import (
    Change,
    Window,
    change,
    check_name_is_free,
    one,
    shaped,
    some,
)

_TABLE = tables.operators
PREFIX: Final = "rpo1."  # to be found by secret scanners, and a version
_ID_BYTES: Final = 16
_SECRET_BYTES: Final = 23  # 39 bytes in all are 52 characters of base64, without padding
_NOBODY: Final = bytes(32).hex()  # a hash that no secret has: unknown ids cost the same comparison
_S: Final = 1_000_000_000


async def page(connection: AsyncConnection, window: Window) -> tuple[list[Operator], str | int | None]:
    """A part of all operators, by id; the revoked ones too: the audit log names them."""
    rows, following = await some(connection, select(_TABLE), _TABLE.c.id, window)
    return [shaped(Operator, row) for row in rows], following


async def get(connection: AsyncConnection, operator_id: str) -> Operator:
    """One operator; ``api.not_found``."""
    return shaped(Operator, await one(connection, _TABLE, "operator", operator_id))


async def create(connection: AsyncConnection, wanted: OperatorWanted, now_ns: int) -> tuple[Operator, str]:
    """A new operator and the text of its token, which is nowhere else; ``api.conflict``."""
    await check_name_is_free(connection, _TABLE, "operator", wanted.name)
    id_bytes, secret = secrets.token_bytes(_ID_BYTES), secrets.token_bytes(_SECRET_BYTES)
    row = {
        "id": f"op-{id_bytes.hex()}",
        "name": wanted.name,
        "role": wanted.role,
        "secret_sha256": sha256(secret).hexdigest(),
        "created_ns": now_ns,
        "expires_ns": None if wanted.life_s is None else now_ns + wanted.life_s * _S,
        "revoked_ns": None,
        "revision": 1,
    }
    await connection.execute(insert(_TABLE).values(**row))
    return shaped(Operator, row), PREFIX + base64.urlsafe_b64encode(id_bytes + secret).decode()


async def revoke(connection: AsyncConnection, asked: Change, now_ns: int) -> Operator:
    """Its token is refused then. ``api.not_found``, ``api.changed``; ``api.conflict``: the last one."""
    operator = await get(connection, asked.id)
    if operator.revoked is None:
        await change(connection, _TABLE, "operator", asked, {"revoked_ns": now_ns})
        if operator.role is Role.ADMIN and not await _admins(connection, now_ns):
            raise conflict(f"{operator.name} is the last administrator", "make another administrator first")
    return await get(connection, asked.id)


async def bearer(connection: AsyncConnection, token: str, now_ns: int) -> Operator | None:
    """The operator whose token this is, if it may be used; else None, for whatever reason."""
    parts = _parse(token)
    if parts is None:
        return None
    operator_id, secret = parts
    row = (await connection.execute(select(_TABLE).where(_TABLE.c.id == operator_id))).mappings().first()
    expected = row["secret_sha256"] if row is not None else _NOBODY
    if not hmac.compare_digest(sha256(secret).hexdigest(), expected) or row is None:
        return None
    expired = row["expires_ns"] is not None and row["expires_ns"] <= now_ns
    return None if expired or row["revoked_ns"] is not None else shaped(Operator, row)


async def _admins(connection: AsyncConnection, now_ns: int) -> int:
    # All of their rows are locked, lest two administrators revoke one another at the same moment.
    rows = await connection.execute(
        select(_TABLE.c.expires_ns)
        .where(_TABLE.c.role == Role.ADMIN, _TABLE.c.revoked_ns.is_(None))
        .with_for_update()
    )
    return sum(expires is None or expires > now_ns for (expires,) in rows)


def _parse(token: str) -> tuple[str, bytes] | None:
    body = token.removeprefix(PREFIX)
    if body == token or "+" in body or "/" in body:
        return None
    try:
        content = binascii.a2b_base64(body.replace("-", "+").replace("_", "/"), strict_mode=True)
    except ValueError:
        return None
    if len(content) != _ID_BYTES + _SECRET_BYTES:
        return None
    return f"op-{content[:_ID_BYTES].hex()}", content[_ID_BYTES:]
