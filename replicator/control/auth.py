"""Who asks, and whether they may: the one place where it is decided. An error while deciding means no.

A server shows the certificate that the installation's authority gave it; TLS has checked that before. An
operator shows a token. A header that names a token is decided by that token alone: a request is never let in
by the certificate because the token was wrong. Not here: what each route asks for (``routes.py``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from replicator import certificates
from replicator.control.database import Database
from replicator.control.models import Role
from replicator.control.problems import forbidden, unauthenticated, undecided
from replicator.control.repositories import operators, servers
from replicator.errors import SpaceError, StateError

log = logging.getLogger(__name__)


class Access(StrEnum):
    """Whom a route is for."""

    PUBLIC = "everybody"
    IDENTIFIED = "every server of the installation and every operator"
    VIEWER = "operators of every role"
    OPERATOR = "operators and administrators"
    ADMIN = "administrators"


_ROLES: Final = {
    Access.PUBLIC: frozenset(Role),
    Access.IDENTIFIED: frozenset(Role),
    Access.VIEWER: frozenset(Role),
    Access.OPERATOR: frozenset({Role.OPERATOR, Role.ADMIN}),
    Access.ADMIN: frozenset({Role.ADMIN}),
}


@dataclass(frozen=True, slots=True)
class Shown:
    """What a request shows of its sender.

    Attributes:
        authorization: the header, or None.
        certificate: DER, which TLS has found to be of our authority, or None.
    """

    authorization: str | None
    certificate: bytes | None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. ``actor``: id of the operator or server, for the audit log; ``role``: None for a server."""

    actor: str
    role: Role | None


NOBODY: Final = Caller("nobody", None)


async def ask(database: Database, shown: Shown, access: Access, now_ns: int) -> Caller:
    """Who asks, if they may, by what the database says now.

    Raises:
        TrustError: ``api.unauthenticated``, ``api.forbidden``. StateError: ``api.undecided``.
    """
    if access is Access.PUBLIC:
        return NOBODY
    try:
        async with database.read() as connection:
            return await decide(connection, shown, access, now_ns)
    except (StateError, SpaceError) as error:
        log.error("a request is refused because its sender cannot be looked up: %s", error)
        raise undecided() from error


async def decide(connection: AsyncConnection, shown: Shown, access: Access, now_ns: int) -> Caller:
    """Who asks, if they may, as a part of the transaction in which it is done; TrustErrors as ``ask``."""
    caller = await _identify(connection, shown, now_ns)
    allowed = access is Access.IDENTIFIED if caller.role is None else caller.role in _ROLES[access]
    if not allowed:
        raise forbidden(caller.actor, access)
    return caller


async def _identify(connection: AsyncConnection, shown: Shown, now_ns: int) -> Caller:
    if shown.authorization is not None:
        scheme, _, token = shown.authorization.partition(" ")
        operator = await operators.bearer(connection, token.strip(), now_ns)
        if scheme.lower() != "bearer" or operator is None:
            raise unauthenticated("the token is not accepted")
        return Caller(operator.id, operator.role)
    if shown.certificate is None:
        raise unauthenticated("neither a token nor a certificate was shown")
    try:
        server_id = certificates.id_of(certificates.from_der(shown.certificate))
    except ValueError:
        raise unauthenticated("the certificate names no server of this installation") from None
    if not await servers.is_trusted(connection, server_id):
        raise unauthenticated(f"{server_id} has not joined, or was revoked")
    return Caller(server_id, None)
