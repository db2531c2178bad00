"""The join tokens that were given out. What one is, and who may use it: ``replicator/tokens.py``."""

from __future__ import annotations

import secrets
from datetime import timedelta
from hashlib import sha256
from typing import Any

from sqlalchemy import RowMapping, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator import certificates
from replicator.control import tables
from replicator.control.models import JoinToken, TokenWanted
from replicator.control.problems import not_found
from replicator.control.repositories import servers
from replicator.control.repositories.rows import Window, one, shaped, some
from replicator.tokens import ID_BYTES, SECRET_BYTES, TOKENS_MAX, Entry, Guesses, Token, too_many

_TABLE = tables.join_tokens
_S = 1_000_000_000


async def page(connection: AsyncConnection, window: Window) -> tuple[list[JoinToken], str | int | None]:
    """A part of all tokens, by id; the expired ones too, until the next one is made."""
    rows, following = await some(connection, select(_TABLE), _TABLE.c.id, window)
    return [_shown(row) for row in rows], following


async def create(
    connection: AsyncConnection, wanted: TokenWanted, pin: bytes, created_by: str, now_ns: int
) -> tuple[JoinToken, Token]:
    """A new token, and what it looks like to those who list it. Expired ones are dropped.

    Raises:
        UsageError: ``token.too_many``.
    """
    await connection.execute(delete(_TABLE).where(_TABLE.c.expires_ns <= now_ns))
    waiting = await connection.scalar(select(func.count()).select_from(_TABLE))
    if (waiting or 0) >= TOKENS_MAX:
        raise too_many()
    token = Token(secrets.token_bytes(ID_BYTES), pin, secrets.token_bytes(SECRET_BYTES))
    life = timedelta(seconds=wanted.life_s)
    row: dict[str, Any] = {
        "id": token.id.hex(),
        "kind": wanted.kind,
        "note": wanted.note,
        "secret_sha256": sha256(token.secret).hexdigest(),
        "spki_sha256": "",
        "server_id": certificates.new_id(wanted.kind),
        "created_by": created_by,
        "created_ns": now_ns,
        "expires_ns": now_ns + life // timedelta(seconds=1) * _S,
    }
    await connection.execute(insert(_TABLE).values(**row))
    return _shown(await one(connection, _TABLE, "join token", row["id"])), token


async def withdraw(connection: AsyncConnection, token_id: str) -> None:
    """Nobody joins with it any more; who has joined stays. ``api.not_found``."""
    done = await connection.execute(delete(_TABLE).where(_TABLE.c.id == token_id))
    if not done.rowcount:
        raise not_found(f"join token {token_id}")


async def redeem(
    connection: AsyncConnection,
    token: tuple[bytes, bytes],
    spki: bytes,
    source: str,
    guesses: Guesses,
    now_ns: int,
) -> str:
    """The identity that a token (id, secret) stands for, bound to the key that asks; a server from then on.

    Raises:
        TrustError: as ``TokenBook.redeem``, but for the check of ``guesses`` that comes before.
    """
    token_id, secret = token
    wanted = select(_TABLE).where(_TABLE.c.id == token_id.hex()).with_for_update()
    row = (await connection.execute(wanted)).mappings().first()
    bound = guesses.admit(_entry(row) if row is not None else None, secret, spki, source)
    binding = update(_TABLE).where(_TABLE.c.id == token_id.hex())
    await connection.execute(binding.values(spki_sha256=bound.spki_sha256.hex()))
    await servers.joined(connection, bound.identity, now_ns)
    return bound.identity


def _entry(row: RowMapping) -> Entry:
    return Entry(
        bytes.fromhex(row["id"]),
        bytes.fromhex(row["secret_sha256"]),
        row["expires_ns"] // _S,
        bytes.fromhex(row["spki_sha256"]),
        row["server_id"],
    )


def _shown(row: RowMapping) -> JoinToken:
    return shaped(JoinToken, row, used=row["spki_sha256"] != "")
