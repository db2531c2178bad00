"""The join conversation, both ends: how a server gets an identity, and fresh certificates for it.

Join: the first connection trusts nobody and sends nothing; it shows the authority, which must have the
token's pin. The second trusts that authority alone, and carries the secret. Renewal needs no token, and works
after expiry too:
the old key signs the statement ::

    "replicator renewal v1" || nonce || SHA-256(request) || SHA-256(certificate)

21 bytes of ASCII, the 32 bytes of the server's CA message on this connection, and the digests of RENEW's
``csr`` and ``certificate`` as sent (DER). The signature is ECDSA with SHA-256 (DER-encoded; P-256 and P-384),
Ed25519, or RSA-PSS with SHA-256, MGF1 with SHA-256 and 32 bytes of salt, by the key of ``certificate``.

Not here: what is issued (``authority.py``), the book of tokens (``tokens.py``), what is kept
(``identity.py``).
"""

from __future__ import annotations

import hmac
import logging
import secrets
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Protocol

from protocol.constants import NONCE_BYTES
from protocol.messages import Ca, Join, Joined, Renew
from protocol.state import Role
from replicator import certificates
from replicator.authority import Authority
from replicator.certificates import Credentials, PrivateKey, PublicKey
from replicator.clock import Clock
from replicator.errors import ReplicatorError, SpaceError, StateError, TrustError
from replicator.failpoints import reach
from replicator.identity import Identities, Identity, check_credentials
from replicator.tokens import MAKE_ANOTHER, Token, TokenBook
from replicator.transport.dial import Address, dial
from replicator.transport.stream import Stream
from replicator.transport.tls import joining_context
from replicator.workers import Workers

log = logging.getLogger(__name__)

GRACE = timedelta(days=30)  # a site that was off over the holidays comes back by itself

_STATEMENT = b"replicator renewal v1"


def renewal_statement(nonce: bytes, request: bytes, certificate: bytes) -> bytes:
    """What the old key signs to renew, as the module's head defines it."""
    return _STATEMENT + nonce + sha256(request).digest() + sha256(certificate).digest()


def needs_renewal(certificate: bytes, now: datetime, jitter: float) -> bool:
    """Whether 2/3 to 3/4, by ``jitter`` in [0, 1), of the life of a certificate (DER) is over."""
    return now >= certificates.renewal_due(certificates.from_der(certificate), jitter)


# ------------------------------------------------------------------ the joining side


class Dial(Protocol):
    """How a connection is made: ``transport.dial.dial``."""

    async def __call__(
        self, address: Address, tls: ssl.SSLContext, role: Role, *, server_name: str | None, clock: Clock
    ) -> Stream:
        """A stream with TLS up."""


async def join(
    address: Address,
    token: Token,
    *,
    identities: Identities,
    workers: Workers,
    clock: Clock,
    dial: Dial = dial,
) -> Identity:
    """Turn a token into an identity, kept durably. Killed at any time, it may be called again as before.

    Raises:
        TrustError: ``join.wrong_pin``, ``join.answer_wrong``, ``identity.server_not_trusted``; what the
            server refuses with: ``join.*``, ``identity.revoked``.
        StateError: our own state directory; see ``Identities``.
        LinkError, PeerError: see ``Stream``.
    """
    async with _offered(address, joining_context(None), dial, clock) as (_, offer):
        authority = _pinned(offer.certificate, token.pin, address)
    key = await workers.run(identities.key_for_joining, token.pin)
    async with _offered(address, joining_context(authority), dial, clock) as (stream, offer):
        server = _server_of(stream, offer, authority)
        stream.send(Join(token.id, token.secret, certificates.make_request(key)))
        joined = await stream.expect(Joined)
    reach("join.received")
    credentials = _accepted(joined, key, authority, server, address)
    identity = Identity(authority, server, (str(address),), credentials)
    await workers.run(identities.store, identity)
    return identity


async def renew(
    identity: Identity,
    address: Address,
    *,
    identities: Identities,
    workers: Workers,
    clock: Clock,
    dial: Dial = dial,
) -> Identity:
    """The identity with a fresh key and certificate, kept durably. The old certificate may have expired.

    Raises:
        TrustError: ``join.answer_wrong``, ``identity.server_not_trusted``; what the server refuses with:
            ``identity.expired_beyond_grace``, ``identity.revoked``, ``identity.foreign``.
        StateError, LinkError, PeerError: as ``join``.
    """
    old = identity.credentials
    key = certificates.new_key()
    request = certificates.make_request(key)
    async with _offered(address, joining_context(identity.authority), dial, clock) as (stream, offer):
        server = _server_of(stream, offer, identity.authority)
        if server != identity.server:
            raise _answer_wrong(address, f"it is {server}, and we joined at {identity.server}")
        statement = renewal_statement(offer.nonce, request, old.certificate)
        signature = certificates.sign(certificates.key_from_pem(old.key), statement)
        stream.send(Renew(old.certificate, request, signature))
        joined = await stream.expect(Joined)
    credentials = _accepted(joined, key, identity.authority, server, address)
    if certificates.id_of(certificates.from_der(credentials.certificate)) != identity.id:
        raise _answer_wrong(address, "the certificate is for another identity than ours")
    renewed = replace(identity, credentials=credentials)
    await workers.run(identities.store, renewed)
    return renewed


async def keep_fresh(
    identity: Identity,
    address: Address,
    jitter: float,
    *,
    identities: Identities,
    workers: Workers,
    clock: Clock,
    dial: Dial = dial,
) -> Identity:
    """The identity, renewed if it is time. While the old certificate is still good, a failure is only logged.

    Raises:
        ReplicatorError: it has expired, and cannot be renewed: see ``renew``.
    """
    if not needs_renewal(identity.credentials.certificate, clock.now(), jitter):
        return identity
    try:
        return await renew(identity, address, identities=identities, workers=workers, clock=clock, dial=dial)
    except ReplicatorError as error:
        if clock.now() >= identity.expires:
            raise
        log.warning("identity %s stays as it is until %s: %s", identity.id, identity.expires, error)
        return identity


@asynccontextmanager
async def _offered(
    address: Address, tls: ssl.SSLContext, dial: Dial, clock: Clock
) -> AsyncIterator[tuple[Stream, Ca]]:
    stream = await dial(address, tls, Role.JOINER, server_name=None, clock=clock)
    try:
        yield stream, await stream.expect(Ca)
    finally:
        await stream.close()


def _pinned(authority: bytes, pin: bytes, address: Address) -> bytes:
    """``authority`` (DER), if it is the one that the token names."""
    try:
        found = certificates.spki(certificates.public_key_of(certificates.authority_from_der(authority)))
    except ValueError as error:
        raise _answer_wrong(address, f"its authority cannot be used: {error}") from None
    if not hmac.compare_digest(found, pin):
        raise TrustError(
            "join.wrong_pin",
            f"{address} belongs to the installation {found.hex()[:16]}, the token to {pin.hex()[:16]}; "
            "nothing secret was sent",
            cause="the token is another server's, the server was installed anew, or somebody is in between",
            fix=f"check the address; if it is right, {MAKE_ANOTHER}",
        )
    return authority


def _server_of(stream: Stream, offer: Ca, authority: bytes) -> str:
    """The id of the server at the other end, which TLS has found to be the authority's."""
    if offer.certificate != authority:
        raise _answer_wrong(stream.peer_address, "it shows another authority than before")
    try:
        return certificates.id_of(certificates.from_der(stream.peer_certificate or b""))
    except ValueError as error:
        raise _answer_wrong(stream.peer_address, f"its certificate: {error}") from None


def _accepted(
    joined: Joined, key: PrivateKey, authority: bytes, server: str, address: Address
) -> Credentials:
    try:
        check_credentials(joined.certificate, key, authority)
        if joined.server != server:
            raise ValueError("it names another server than its certificate")
    except ValueError as error:
        raise _answer_wrong(address, str(error)) from None
    return Credentials(joined.certificate, certificates.key_to_pem(key))


def _answer_wrong(address: object, reason: str) -> TrustError:
    return TrustError(
        "join.answer_wrong",
        f"the answer of {address} is refused: {reason}",
        cause="another server of the installation answers there, or a damaged one, or one of another release",
        fix="check the address and the server's log; if it was replaced, join again with a new token",
    )


# ------------------------------------------------------------------ the authority's side


class Enrolment:
    """Serves the join conversation.

    Args:
        authority: signs.
        tokens: who may join.
        server_id: our own id, which joiners check our certificate for.
        is_revoked: whether an id is revoked; called in a worker thread. If it raises, nothing is issued.
        grace: how long after expiry a certificate may still be renewed.
    """

    def __init__(
        self,
        authority: Authority,
        tokens: TokenBook,
        server_id: str,
        *,
        clock: Clock,
        workers: Workers,
        is_revoked: Callable[[str], bool],
        grace: timedelta = GRACE,
    ) -> None:
        self._authority = authority
        self._tokens = tokens
        self._server_id = server_id
        self._clock = clock
        self._workers = workers
        self._is_revoked = is_revoked
        self._grace = grace

    async def serve(self, stream: Stream) -> None:
        """One conversation, in the role of the authority. The caller tells refusals to the peer and closes.

        Raises:
            TrustError: the request is refused: ``join.*``, ``identity.*``. What is wrong with our own files
                (``join.unavailable``) stands in the log only: the peer is nobody yet.
            LinkError, PeerError: see ``Stream``.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        stream.send(Ca(self._authority.certificate, nonce))
        request = await stream.receive()
        if not isinstance(request, Join | Renew):
            return  # BYE: it only wanted to look at our authority
        try:
            joined = await self._workers.run(self._answer, request, nonce, stream.peer_address)
        except (StateError, SpaceError) as error:
            log.error("%s cannot be answered: %s", stream.peer_address, error)
            raise _unavailable() from None
        reach("join.before_answer")
        stream.send(joined)
        await stream.drain()
        reach("join.answered")

    def _answer(self, request: Join | Renew, nonce: bytes, source: str) -> Joined:
        if isinstance(request, Join):
            return self._join(request, source)
        return self._renew(request, nonce, source)

    def _join(self, request: Join, source: str) -> Joined:
        key = certificates.requested_key(request.csr)
        host = source.rpartition(":")[0]
        server_id = self._tokens.redeem(request.token, request.secret, certificates.spki(key), host)
        joined = self._issue(key, server_id)
        log.info("%s joined as %s", source, server_id)
        return joined

    def _renew(self, request: Renew, nonce: bytes, source: str) -> Joined:
        try:
            old = certificates.from_der(request.certificate)
            old_key, server_id = certificates.public_key_of(old), certificates.id_of(old)
        except ValueError as error:
            raise _foreign(str(error)) from None
        if not self._authority.has_issued(old):
            raise _foreign("this installation did not issue it")
        statement = renewal_statement(nonce, request.csr, request.certificate)
        if not certificates.signature_fits(old_key, request.signature, statement):
            raise _signature_wrong(server_id)
        if self._clock.now() > old.not_valid_after_utc + self._grace:
            raise _expired(server_id, old.not_valid_after_utc, self._grace)
        joined = self._issue(certificates.requested_key(request.csr), server_id)
        log.info("%s renewed the certificate of %s", source, server_id)
        return joined

    def _issue(self, key: PublicKey, server_id: str) -> Joined:
        if self._is_revoked(server_id):
            raise _revoked(server_id)
        return Joined(self._authority.issue(key, server_id, self._clock.now()), self._server_id)


def _unavailable() -> TrustError:
    return TrustError(
        "join.unavailable",
        "the server cannot answer joins and renewals",
        cause="its own files cannot be used: a full or failing disk, or damage; its log says which",
        fix="put the server right, then run the same command again: it goes on safely",
    )


def _foreign(reason: str) -> TrustError:
    return TrustError(
        "identity.foreign",
        f"the certificate is not one of this installation: {reason}",
        cause="the server was installed anew, or the certificate is from another installation",
        fix=f"check the address; if it is right, {MAKE_ANOTHER}",
    )


def _signature_wrong(server_id: str) -> TrustError:
    return TrustError(
        "identity.signature_wrong",
        f"the request to renew {server_id} is not signed by its key",
        cause="the asking side's certificate and key do not fit, or it has the certificate without the key",
        fix=f"look who asks; if it is the true owner, {MAKE_ANOTHER}",
    )


def _expired(server_id: str, ended: datetime, grace: timedelta) -> TrustError:
    return TrustError(
        "identity.expired_beyond_grace",
        f"the certificate of {server_id} expired on {ended:%Y-%m-%d} and can no longer be renewed",
        cause=f"it was away for longer than the {grace.days} days after expiry that the server allows",
        fix=MAKE_ANOTHER,
    )


def _revoked(server_id: str) -> TrustError:
    return TrustError(
        "identity.revoked",
        f"the identity {server_id} is revoked",
        cause="an operator has withdrawn it",
        fix=f"ask the operator why; to let this machine in again, {MAKE_ANOTHER}",
    )
