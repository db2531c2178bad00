"""Servers join at a control server: the real conversation over TLS, tokens and servers in the database."""

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from protocol.state import Role
from replicator.certificates import ServerKind
from replicator.control import audit
from replicator.control.database import Database
from replicator.control.joining import JoinDesk
from replicator.control.models import TokenWanted
from replicator.control.repositories import join_tokens, servers
from replicator.control.repositories.rows import Change, Window
from replicator.enrolment import Enrolment, join, renew
from replicator.files import Files
from replicator.identity import Identities
from replicator.private_directory import PrivateDirectory
from replicator.tokens import GUESSES_PER_SOURCE, Token, TokenBook
from replicator.transport.accept import Acceptor, Handler
from replicator.transport.dial import Address
from replicator.transport.tls import ALPN_JOIN, server_context
from replicator.workers import Workers
from tests.replicator.trust import Installation, SetClock, refused


@pytest.fixture
def installation(tmp_path: Path, clock: SetClock) -> Installation:
    return Installation(tmp_path / "authority", clock)


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers() as threads:
        yield threads


class Door:
    """A control server's door for joins."""

    def __init__(
        self, database: Database, installation: Installation, workers: Workers, clock: SetClock
    ) -> None:
        self.database, self.workers, self.clock = database, workers, clock
        self.pin = installation.authority.pin
        self.desk = JoinDesk(database, clock)
        authority = installation.authority
        enrolment = Enrolment(
            authority,
            cast(TokenBook, self.desk),
            authority.own_id(ServerKind.CONTROL_SERVER),
            clock=clock,
            workers=workers,
            is_revoked=self.desk.is_revoked,
        )
        own = authority.own_credentials(ServerKind.CONTROL_SERVER, clock.now())
        context = server_context(own, authority.certificate)
        handlers: Any = {ALPN_JOIN: Handler(Role.AUTHORITY, enrolment.serve)}
        self.acceptor = Acceptor(lambda: context, handlers, clock)
        self.address = Address("127.0.0.1", 0)

    async def token(self, life_s: int = 3600) -> Token:
        async with self.database.write() as connection:
            wanted = TokenWanted(kind=ServerKind.PROCESS_SERVER, life_s=life_s)
            _, token = await join_tokens.create(connection, wanted, self.pin, "op", self.clock.now_ns())
        return token

    async def join(self, token: Token, state: Path) -> Any:
        identities = Identities(PrivateDirectory(Files(), state))
        parts: Any = {"identities": identities, "workers": self.workers, "clock": self.clock}
        return await join(self.address, token, **parts)

    async def renew(self, identity: Any, state: Path) -> Any:
        identities = Identities(PrivateDirectory(Files(), state))
        parts: Any = {"identities": identities, "workers": self.workers, "clock": self.clock}
        return await renew(identity, self.address, **parts)


@pytest_asyncio.fixture
async def door(
    database: Database, installation: Installation, workers: Workers, clock: SetClock
) -> AsyncIterator[Door]:
    opened = Door(database, installation, workers, clock)
    opened.address = await opened.acceptor.start(opened.address)
    yield opened
    await opened.acceptor.stop()


async def test_a_server_that_joins_stands_in_the_database_and_in_the_audit_log(
    door: Door, tmp_path: Path
) -> None:
    token = await door.token()
    identity = await door.join(token, tmp_path / "ps")
    async with door.database.read() as connection:
        found, _ = await servers.page(connection, Window())
        tokens, _ = await join_tokens.page(connection, Window())
        entries, _ = await audit.page(connection, Window())
    assert [(server.id, server.kind, server.revoked) for server in found] == [(identity.id, "ps", None)]
    assert [(one.server_id, one.used) for one in tokens] == [(identity.id, True)]
    assert [(entry.actor, entry.action) for entry in entries] == [(identity.id, "join")]


async def test_the_same_key_may_join_again_and_another_may_not(door: Door, tmp_path: Path) -> None:
    token = await door.token()
    spki = b"k" * 32
    first = await door.workers.run(door.desk.redeem, token.id, token.secret, spki, "here")
    assert await door.workers.run(door.desk.redeem, token.id, token.secret, spki, "here") == first
    with refused("join.token_used"):
        await door.join(token, tmp_path / "other")
    async with door.database.read() as connection:
        found, _ = await servers.page(connection, Window())
    assert [server.id for server in found] == [first]


async def test_a_wrong_expired_or_withdrawn_token_is_refused(
    door: Door, tmp_path: Path, clock: SetClock
) -> None:
    token = await door.token()
    with refused("join.secret_wrong"):
        await door.join(Token(token.id, token.pin, bytes(16)), tmp_path / "a")
    with refused("join.secret_wrong"):
        await door.join(Token(bytes(8), token.pin, token.secret), tmp_path / "a")
    clock.advance(timedelta(hours=1))
    with refused("join.token_expired"):
        await door.join(token, tmp_path / "a")
    late = await door.token()
    async with door.database.write() as connection:
        await join_tokens.withdraw(connection, late.id.hex())
    with refused("join.secret_wrong"):
        await door.join(late, tmp_path / "a")
    async with door.database.read() as connection:
        assert (await servers.page(connection, Window()))[0] == []


async def test_who_guesses_is_shut_out_before_the_database_is_asked(door: Door) -> None:
    token = await door.token()
    for number in range(GUESSES_PER_SOURCE):
        with refused("join.secret_wrong"):
            await door.workers.run(door.desk.redeem, token.id, number.to_bytes(16, "big"), bytes(32), "a")
    await door.database.close()
    with refused("join.too_many_guesses"):
        await door.workers.run(door.desk.redeem, token.id, token.secret, bytes(32), "a")


async def test_a_revoked_server_renews_no_more(door: Door, tmp_path: Path) -> None:
    identity = await door.join(await door.token(), tmp_path / "ps")
    renewed = await door.renew(identity, tmp_path / "ps")
    assert renewed.id == identity.id
    async with door.database.write() as connection:
        await servers.revoke(connection, Change(identity.id, None), door.clock.now_ns())
    with refused("identity.revoked"):
        await door.renew(renewed, tmp_path / "ps")


async def test_when_the_database_fails_nobody_joins_or_renews(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await door.token()
    identity = await door.join(await door.token(), tmp_path / "ps")

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    for engine in ("_reader", "_writer"):
        whole = getattr(door.database, engine)
        fake = type("Broken", (), {"connect": broken, "begin": broken, "dispose": whole.dispose})()
        monkeypatch.setattr(door.database, engine, fake)
    with refused("join.unavailable"):
        await door.join(token, tmp_path / "other")
    with refused("join.unavailable"):
        await door.renew(identity, tmp_path / "ps")
