"""Joining and renewing over real TLS on loopback: what is given, what is refused, what a kill leaves."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from protocol.messages import Ca, Join, Joined, Renew
from protocol.state import Role
from replicator import certificates, tokens
from replicator.authority import FILE as AUTHORITY_FILE
from replicator.certificates import Credentials, ServerKind
from replicator.clock import Clock
from replicator.enrolment import Enrolment, join, keep_fresh, needs_renewal, renew, renewal_statement
from replicator.errors import LinkError, ReplicatorError, TrustError
from replicator.files import Files
from replicator.identity import Identities, Identity
from replicator.private_directory import PrivateDirectory
from replicator.tokens import GUESSES_PER_SOURCE, Token
from replicator.transport import tls
from replicator.transport.accept import Acceptor, Handler
from replicator.transport.dial import Address, dial
from replicator.transport.stream import Stream
from replicator.workers import Workers
from tests.replicator.trust import ROOT, Installation, SetClock, refused


class ObservedEnrolment(Enrolment):
    """Keeps what it was asked; answers as ``answering`` says, if a test has set it."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.asked: list[Join | Renew] = []
        self.answering: Callable[[Join | Renew], Joined] | None = None

    def _answer(self, request: Join | Renew, nonce: bytes, source: str) -> Joined:
        self.asked.append(request)
        return self.answering(request) if self.answering else super()._answer(request, nonce, source)


class Server:
    """A master target that answers the join conversation, as the composition root puts it together."""

    def __init__(self, path: Path, clock: Clock, workers: Workers) -> None:
        self.clock = clock
        self.installation = Installation(path, clock)
        self.authority = self.installation.authority
        self.revoked: set[str] = set()
        self.credentials = self.authority.own_credentials(ServerKind.MASTER_TARGET, Clock().now())
        self.enrolment = ObservedEnrolment(
            self.authority,
            self.installation.tokens,
            self.installation.server,
            clock=clock,
            workers=workers,
            is_revoked=self._is_revoked,
        )
        self._acceptor = Acceptor(
            lambda: tls.server_context(self.credentials, self.authority.certificate),
            {tls.ALPN_JOIN: Handler(Role.AUTHORITY, self.enrolment.serve)},
            Clock(),
        )
        self.address = Address("127.0.0.1", 0)

    def _is_revoked(self, server_id: str) -> bool:
        return server_id in self.revoked

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        self.address = await self._acceptor.start(Address("127.0.0.1", 0))
        try:
            yield
        finally:
            await self._acceptor.stop()

    def token(self, kind: ServerKind = ServerKind.PROCESS_SERVER) -> Token:
        return self.installation.tokens.create(kind)


class Joiner:
    """The joining side, with its state directory."""

    def __init__(self, path: Path, clock: Clock, workers: Workers) -> None:
        self.path = path
        self.identities = Identities(PrivateDirectory(Files(), path))
        self.means: dict[str, Any] = {"identities": self.identities, "workers": workers, "clock": clock}

    async def join(self, address: Address, token: Token) -> Identity:
        return await join(address, token, **self.means)

    async def renew(self, identity: Identity, address: Address) -> Identity:
        return await renew(identity, address, **self.means)

    async def keep_fresh(self, identity: Identity, address: Address, jitter: float = 0.0) -> Identity:
        return await keep_fresh(identity, address, jitter, **self.means)


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def workers():
    with Workers(2) as made:
        yield made


@pytest.fixture
async def server(tmp_path: Path, clock: SetClock, workers: Workers) -> AsyncIterator[Server]:
    made = Server(tmp_path / "server", clock, workers)
    async with made.listening():
        yield made


@pytest.fixture
async def other_server(tmp_path: Path, clock: SetClock, workers: Workers) -> AsyncIterator[Server]:
    made = Server(tmp_path / "other", clock, workers)
    async with made.listening():
        yield made


@pytest.fixture
def joiner(tmp_path: Path, clock: SetClock, workers: Workers) -> Joiner:
    return Joiner(tmp_path / "joiner", clock, workers)


@asynccontextmanager
async def asking(server: Server, clock: Clock) -> AsyncIterator[tuple[Stream, Ca]]:
    """A joiner's connection in the test's own hands, at the moment where it may ask."""
    context = tls.joining_context(server.authority.certificate)
    stream = await dial(server.address, context, Role.JOINER, server_name=None, clock=Clock())
    try:
        offer = await stream.receive()
        assert isinstance(offer, Ca)
        yield stream, offer
    finally:
        await stream.close()


def spki_of(der: bytes) -> bytes:
    return certificates.spki(certificates.public_key_of(certificates.from_der(der)))


# ------------------------------------------------------------------ joining


@pytest.mark.parametrize("kind", list(ServerKind))
async def test_a_token_becomes_an_identity_of_its_kind(
    server: Server, joiner: Joiner, kind: ServerKind
) -> None:
    identity = await joiner.join(server.address, server.token(kind))
    assert certificates.kind_of(identity.id) is kind
    assert identity.server == server.installation.server
    assert identity.addresses == (str(server.address),)
    assert identity.pin == server.authority.pin
    assert joiner.identities.find(server.authority.pin) == identity
    assert server.authority.has_issued(identity.certificate)


async def test_the_identity_is_accepted_by_the_server_it_is_for(server: Server, joiner: Joiner) -> None:
    identity = await joiner.join(server.address, server.token())
    context = tls.client_context(identity.credentials, identity.authority)
    context.set_alpn_protocols([tls.ALPN_JOIN])
    stream = await dial(
        server.address,
        context,
        Role.JOINER,
        server_name=certificates.host_name(identity.server),
        clock=Clock(),
    )
    assert isinstance(await stream.receive(), Ca)
    await stream.close()


async def test_the_same_token_serves_the_same_side_again_and_nobody_else(
    server: Server, joiner: Joiner, tmp_path: Path, clock: SetClock, workers: Workers
) -> None:
    token = server.token()
    key = joiner.identities.key_for_joining(token.pin)
    first = await joiner.join(server.address, token)
    assert certificates.key_from_pem(first.credentials.key).public_key() == key.public_key()
    stranger = Joiner(tmp_path / "stranger", clock, workers)
    with refused("join.token_used") as caught:
        await stranger.join(server.address, token)
    assert isinstance(caught.value, TrustError)
    assert stranger.identities.find(token.pin) is None


async def test_a_wrong_secret_is_refused_and_guessing_is_ended(server: Server, joiner: Joiner) -> None:
    token = server.token()
    wrong = replace(token, secret=b"x" * 16)
    for _ in range(GUESSES_PER_SOURCE):
        with refused("join.secret_wrong"):
            await joiner.join(server.address, wrong)
    with refused("join.too_many_guesses"):
        await joiner.join(server.address, token)


async def test_an_expired_token_is_refused(server: Server, joiner: Joiner, clock: SetClock) -> None:
    token = server.token()
    clock.advance(timedelta(hours=1, seconds=1))
    with refused("join.token_expired"):
        await joiner.join(server.address, token)


async def test_a_token_of_another_installation_is_never_sent(
    server: Server, other_server: Server, joiner: Joiner
) -> None:
    with refused("join.wrong_pin"):
        await joiner.join(server.address, other_server.token())
    assert server.enrolment.asked == []
    assert not joiner.path.exists()  # not even a key was made


async def test_a_relay_that_shows_the_pinned_authority_without_its_key_gets_no_secret(
    server: Server, other_server: Server, joiner: Joiner
) -> None:
    """Whoever is in between can copy the CA certificate; its own certificate is another authority's."""
    relay = other_server
    relay.enrolment._authority = server.authority
    with refused("identity.server_not_trusted"):
        await joiner.join(relay.address, server.token())
    assert relay.enrolment.asked == []


async def test_a_revoked_identity_is_not_given_out_again(server: Server, joiner: Joiner) -> None:
    token = server.token()
    joiner.identities.key_for_joining(token.pin)
    server.enrolment._is_revoked = lambda server_id: True
    with refused("identity.revoked"):
        await joiner.join(server.address, token)
    server.enrolment._is_revoked = lambda server_id: False
    await joiner.join(server.address, token)


async def test_nothing_is_issued_when_the_revocation_list_cannot_be_read(
    server: Server, joiner: Joiner
) -> None:
    def unreadable(server_id: str) -> bool:
        with PrivateDirectory(Files(), Path("/dev/null/nowhere")).held():
            return False

    server.enrolment._is_revoked = unreadable
    with refused("join.unavailable") as caught:
        await joiner.join(server.address, server.token())
    assert "/dev/null" not in str(caught.value)


async def test_a_malformed_request_does_not_use_up_the_token(server: Server, joiner: Joiner, clock) -> None:
    token = server.token()
    async with asking(server, clock) as (stream, _):
        stream.send(Join(token.id, token.secret, b"no request"))
        with refused("join.request_refused"):
            await stream.receive()
    await joiner.join(server.address, token)


async def test_many_joins_at_once_all_get_their_own_identity(
    server: Server, tmp_path, clock, workers
) -> None:
    joiners = [Joiner(tmp_path / str(number), clock, workers) for number in range(8)]
    found = await asyncio.gather(*(one.join(server.address, server.token()) for one in joiners))
    assert len({identity.id for identity in found}) == 8


# ------------------------------------------------------------------ answers that are refused by the joiner


@pytest.mark.parametrize("case", ["another key", "another authority", "another server", "garbage"])
async def test_an_answer_that_does_not_hold_is_not_stored(
    server: Server, other_server: Server, joiner: Joiner, clock: SetClock, case: str
) -> None:
    def answer(request: Join | Renew) -> Joined:
        key = certificates.requested_key(request.csr)
        own, name = server.installation.server, certificates.new_id(ServerKind.PROCESS_SERVER)
        match case:
            case "another key":
                key = certificates.new_key().public_key()
            case "another authority":
                return Joined(other_server.authority.issue(key, name, clock.now()), own)
            case "another server":
                own = other_server.installation.server
            case "garbage":
                return Joined(b"garbage", own)
        return Joined(server.authority.issue(key, name, clock.now()), own)

    server.enrolment.answering = answer
    with refused("join.answer_wrong"):
        await joiner.join(server.address, server.token())
    assert joiner.identities.find(server.authority.pin) is None


async def test_an_authority_that_cannot_be_read_is_refused_at_the_first_look(
    server: Server, joiner: Joiner
) -> None:
    token = server.token()
    server.authority.certificate, kept = b"garbage", server.authority.certificate
    own = server.credentials
    server._acceptor._tls = lambda: tls.server_context(own, kept)
    with refused("join.answer_wrong"):
        await joiner.join(server.address, token)


# ------------------------------------------------------------------ renewing


async def test_a_renewal_keeps_the_id_and_changes_key_and_certificate(server, joiner, clock) -> None:
    old = await joiner.join(server.address, server.token())
    clock.advance(timedelta(days=5))
    new = await joiner.renew(old, server.address)
    assert new.id == old.id
    assert new.expires - old.expires >= timedelta(days=5)
    assert new.credentials.key != old.credentials.key
    assert joiner.identities.find(old.pin) == new


async def test_a_renewal_can_be_renewed_and_an_older_certificate_too(server, joiner, clock) -> None:
    first = await joiner.join(server.address, server.token())
    second = await joiner.renew(first, server.address)
    assert (await joiner.renew(second, server.address)).id == first.id
    assert (
        await joiner.renew(first, server.address)
    ).id == first.id  # the answer of the first renewal was lost


async def test_a_certificate_renews_itself_after_expiry_inside_the_grace_period(
    server, joiner, clock
) -> None:
    old = await joiner.join(server.address, server.token())
    clock.advance(timedelta(days=7 + 29))
    new = await joiner.keep_fresh(old, server.address)
    assert new.id == old.id
    assert new.expires > clock.now()


async def test_beyond_the_grace_period_it_is_refused(server, joiner, clock) -> None:
    old = await joiner.join(server.address, server.token())
    clock.advance(timedelta(days=7 + 30, minutes=1))
    for renewing in (joiner.renew, joiner.keep_fresh):
        with refused("identity.expired_beyond_grace"):
            await renewing(old, server.address)


async def test_a_revoked_identity_is_not_renewed(server, joiner) -> None:
    identity = await joiner.join(server.address, server.token())
    server.revoked.add(identity.id)
    with refused("identity.revoked"):
        await joiner.renew(identity, server.address)


async def ask_renewal(server: Server, certificate: bytes, sign) -> Joined:
    async with asking(server, server.clock) as (stream, offer):
        request = certificates.make_request(certificates.new_key())
        stream.send(Renew(certificate, request, sign(renewal_statement(offer.nonce, request, certificate))))
        answer = await stream.receive()
        assert isinstance(answer, Joined)
        return answer


def signer(pem: bytes):
    return lambda statement: certificates.sign(certificates.key_from_pem(pem), statement)


async def test_a_certificate_of_another_installation_is_not_renewed(server, other_server, joiner) -> None:
    foreign = await joiner.join(other_server.address, other_server.token())
    with refused("identity.foreign"):
        await ask_renewal(server, foreign.credentials.certificate, signer(foreign.credentials.key))


@pytest.mark.parametrize("what", ["garbage", "authority"])
async def test_what_is_no_identity_is_not_renewed(server, joiner, what) -> None:
    certificate = b"garbage" if what == "garbage" else server.authority.certificate
    with refused("identity.foreign"):
        await ask_renewal(server, certificate, lambda statement: b"")


async def test_a_certificate_without_its_key_is_not_renewed(server, joiner) -> None:
    identity = await joiner.join(server.address, server.token())
    thief = certificates.key_to_pem(certificates.new_key())
    with refused("identity.signature_wrong"):
        await ask_renewal(server, identity.credentials.certificate, signer(thief))


async def test_a_renewal_cannot_be_replayed_on_another_connection(server, joiner) -> None:
    identity = await joiner.join(server.address, server.token())
    statements: list[bytes] = []

    def recording(statement: bytes) -> bytes:
        statements.append(signer(identity.credentials.key)(statement))
        return statements[0]

    await ask_renewal(server, identity.credentials.certificate, recording)
    with refused("identity.signature_wrong"):
        await ask_renewal(server, identity.credentials.certificate, recording)


async def test_another_request_cannot_be_put_under_a_signature(server, joiner, clock) -> None:
    identity = await joiner.join(server.address, server.token())
    old = identity.credentials
    async with asking(server, clock) as (stream, offer):
        signed = renewal_statement(
            offer.nonce, certificates.make_request(certificates.new_key()), old.certificate
        )
        thief = certificates.make_request(certificates.new_key())
        stream.send(Renew(old.certificate, thief, signer(old.key)(signed)))
        with refused("identity.signature_wrong"):
            await stream.receive()


def test_the_renewal_statement_is_what_the_specification_says() -> None:
    nonce = bytes(range(32))
    statement = renewal_statement(nonce, b"request", b"certificate")
    assert (
        statement
        == b"replicator renewal v1" + nonce + sha256(b"request").digest() + sha256(b"certificate").digest()
    )
    assert len(statement) == 21 + 32 + 32 + 32


async def test_a_renewal_at_another_server_of_the_installation_is_refused(server, joiner, clock) -> None:
    """Its certificate is good for TLS; only the one we joined at keeps the book."""
    identity = await joiner.join(server.address, server.token())
    key = certificates.new_key()
    other_id = certificates.new_id(ServerKind.MASTER_TARGET)
    server.credentials = Credentials(
        server.authority.issue(key.public_key(), other_id, clock.now()), certificates.key_to_pem(key)
    )
    with refused("join.answer_wrong"):
        await joiner.renew(identity, server.address)
    assert not any(isinstance(request, Renew) for request in server.enrolment.asked)


async def test_it_is_renewed_at_two_thirds_of_its_life_and_not_before(server, joiner, clock) -> None:
    identity = await joiner.join(server.address, server.token())
    clock.advance(timedelta(days=4.5))
    assert await joiner.keep_fresh(identity, server.address) is identity
    clock.advance(timedelta(days=0.3))
    assert await joiner.keep_fresh(identity, server.address, jitter=0.99) is identity
    assert await joiner.keep_fresh(identity, server.address) != identity
    assert needs_renewal(identity.credentials.certificate, clock.now(), 0.0)


async def test_a_server_that_is_away_stops_nobody_while_the_old_certificate_is_good(
    server, joiner, clock, caplog: pytest.LogCaptureFixture
) -> None:
    identity = await joiner.join(server.address, server.token())
    await server._acceptor.stop()
    clock.advance(timedelta(days=6))
    assert await joiner.keep_fresh(identity, server.address) is identity
    assert "stays as it is" in caplog.text
    clock.advance(timedelta(days=1, minutes=1))
    with pytest.raises(LinkError):
        await joiner.keep_fresh(identity, server.address)


# ------------------------------------------------------------------ killed half-way

SERVER = (
    "import asyncio, pathlib, sys\n"
    "from tests.replicator.test_enrolment import serve_for_ever\n"
    "asyncio.run(serve_for_ever(pathlib.Path(sys.argv[1])))\n"
)
JOINER = (
    "import asyncio, pathlib, sys\n"
    "from tests.replicator.test_enrolment import join_once\n"
    "asyncio.run(join_once(pathlib.Path(sys.argv[1]), sys.argv[2], sys.stdin.read()))\n"
)


async def serve_for_ever(path: Path) -> None:
    with Workers(2) as workers:
        server = Server(path, Clock(), workers)
        async with server.listening():
            print(server.address, flush=True)
            await asyncio.Event().wait()


async def join_once(path: Path, address: str, token: str) -> None:
    with Workers(2) as workers:
        identity = await Joiner(path, Clock(), workers).join(
            Address.parse(address), tokens.parse_token(token)
        )
    print(identity.id)


async def start(program: str, *arguments: object, failpoint: str = "") -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        *map(str, arguments),
        env={**os.environ, "FAILPOINT": failpoint},
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )


def bound_in(path: Path) -> list[dict]:
    return [
        entry for entry in json.loads((path / tokens.FILE).read_bytes())["tokens"] if entry["spki_sha256"]
    ]


@pytest.mark.parametrize(
    ("failpoint", "bound"),
    [
        ("replace.before_write", False),
        ("replace.before_fsync", False),
        ("replace.before_rename", False),
        ("replace.before_fsync_dir", True),
        ("replace.done", True),
        ("token.bound", True),
        ("join.before_answer", True),
    ],
)
async def test_a_server_killed_between_token_and_answer_gives_the_same_identity_afterwards(
    tmp_path: Path, workers: Workers, failpoint: str, bound: bool
) -> None:
    clock, home = Clock(), tmp_path / "server"
    token = Installation(home, clock).tokens.create(ServerKind.PROCESS_SERVER)
    joiner = Joiner(tmp_path / "joiner", clock, workers)
    process = await start(SERVER, home, failpoint=failpoint)
    assert process.stdout
    address = Address.parse((await process.stdout.readline()).decode().strip())
    with pytest.raises(LinkError):
        await joiner.join(address, token)
    assert await process.wait() == -signal.SIGKILL
    assert joiner.identities.find(token.pin) is None
    before = bound_in(home)
    assert bool(before) is bound
    again = Server(home, clock, workers)
    async with again.listening():
        identity = await joiner.join(again.address, token)
    [entry] = bound_in(home)
    assert entry["identity"] == identity.id
    assert before in ([], [entry])


PLACES = ("before_write", "before_fsync", "before_rename", "before_fsync_dir", "done")


@pytest.mark.parametrize(
    ("failpoint", "joined"),
    [
        (f"replace.{place}:{nth}", (nth, place) in ((3, "before_fsync_dir"), (3, "done")))
        for nth in (1, 2, 3)
        for place in PLACES
    ]
    + [("join.key_stored", False), ("join.received", False), ("join.stored", True)],
)
async def test_a_joiner_killed_between_token_and_identity_joins_afterwards_as_the_same(
    tmp_path: Path, workers: Workers, failpoint: str, joined: bool
) -> None:
    clock = Clock()
    server = Server(tmp_path / "server", clock, workers)
    joiner = Joiner(tmp_path / "joiner", clock, workers)
    token = server.token()
    async with server.listening():
        process = await start(JOINER, joiner.path, server.address, failpoint=failpoint)
        out, _ = await process.communicate(token.to_text().encode())
        assert (process.returncode, out) == (-signal.SIGKILL, b"")
        kept = joiner.identities.find(token.pin)
        assert (kept is not None) is joined
        identity = kept or await joiner.join(server.address, token)
    [entry] = bound_in(tmp_path / "server")
    assert identity.id == entry["identity"]
    assert spki_of(identity.credentials.certificate).hex() == entry["spki_sha256"]


# ------------------------------------------------------------------ secrets


async def test_no_secret_reaches_a_log_an_error_or_a_file_that_is_not_its_own(
    server: Server,
    other_server: Server,
    joiner: Joiner,
    clock: SetClock,
    tmp_path: Path,
    workers: Workers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    token, used, foreign = server.token(), server.token(), other_server.token()
    shown: list[object] = [token]
    await Joiner(tmp_path / "first", clock, workers).join(server.address, used)
    for wrong in (used, foreign, replace(token, secret=used.secret)):
        with pytest.raises(ReplicatorError) as caught:
            await joiner.join(server.address, wrong)
        shown += [caught.value, caught.value.args, caught.value.__context__, caught.value.__cause__]
    identity = await joiner.join(server.address, token)
    renewed = await joiner.renew(identity, server.address)
    shown += [identity, renewed, server.credentials, server.authority, server.installation.tokens]
    text = caplog.text + "".join(f"{thing!r} {thing}" for thing in shown)

    keys = [found.credentials.key for found in (identity, renewed)] + [server.credentials.key]
    keys += [json.loads((tmp_path / "server" / AUTHORITY_FILE).read_bytes())["key"].encode()]
    secrets = {
        line for key in keys for line in key.decode().splitlines()[1:-1] if "MIGHAgEAMBMGByqGSM49" not in line
    }
    for each in (token, used, foreign):
        secrets |= {each.to_text(), each.to_text()[16:36], each.secret.hex(), repr(each.secret)[2:-1]}
    for secret in secrets:
        assert secret not in text
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert path.stat().st_mode & 0o777 == 0o600, path
        content = path.read_bytes()
        for each in (token, used, foreign):
            assert each.secret not in content and each.secret.hex().encode() not in content, path
