"""A master target: listens, lets process servers join, receives their disks into VMDKs."""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from agents.log_ids import ids
from protocol.state import Role
from replicator import certificates
from replicator.authority import Authority
from replicator.certificates import ServerKind
from replicator.clock import Clock
from replicator.enrolment import Enrolment
from replicator.errors import TrustError
from replicator.files import Files
from replicator.groups import Groups, Limits
from replicator.images.directory import ImageDirectory
from replicator.private_directory import PrivateDirectory
from replicator.receiver import Receiver
from replicator.tokens import TokenBook
from replicator.transport.accept import Acceptor, Counts, Handler
from replicator.transport.dial import Address
from replicator.transport.stream import Stream
from replicator.transport.tls import ALPN_DATA, ALPN_HTTP, ALPN_JOIN, server_context
from replicator.workers import Workers

log = logging.getLogger(__name__)

OWN_RENEWAL_JITTER = 0.0  # nobody else renews with it: there is no crowd to avoid


@dataclass(frozen=True, slots=True)
class MasterTargetConfig:
    """What a master target needs to know.

    Attributes:
        directory: where the VMDKs are written.
        retention: where its own things lie: authority, tokens, catalogue.
        listen: address; port 0 takes any free one.
        limits: what each group may keep.
        thin: whether new VMDKs are thin.
    """

    directory: Path
    retention: Path
    listen: Address
    limits: Limits = field(default_factory=Limits)
    thin: bool = True


class MasterTarget:
    """A running master target. ``start``, then ``stop`` whatever happens.

    Args:
        web: makes the protocol for a connection that speaks HTTP; None: there is no web here.

    Attributes:
        streams: data connections that are there now.
    """

    def __init__(
        self,
        config: MasterTargetConfig,
        workers: Workers,
        clock: Clock,
        files: Files,
        web: Callable[[], asyncio.BaseProtocol] | None = None,
    ) -> None:
        self.streams = 0
        self._web = web
        self._tokens: TokenBook | None = None
        self._receiver: Receiver | None = None
        self._config = config
        self._workers = workers
        self._clock = clock
        self._files = files
        self._images: ImageDirectory | None = None
        self._groups: Groups | None = None
        self._acceptor: Acceptor | None = None

    async def start(self) -> tuple[Address, str]:
        """Listen; returns the bound address and a fresh join token for a process server.

        Raises:
            TargetError: the directory or the port cannot be used. StateError: the retention directory cannot.
        """
        retention = PrivateDirectory(self._files, self._config.retention)
        self._images = await self._workers.run(self._open_images, retention)
        authority = await self._workers.run(Authority.open, retention, self._clock)
        self._tokens = tokens = TokenBook(retention, authority.pin, self._clock)
        token = await self.fresh_token()
        enrolment = Enrolment(
            authority,
            tokens,
            authority.own_id(ServerKind.MASTER_TARGET),
            clock=self._clock,
            workers=self._workers,
            is_revoked=lambda _: False,  # a master target of its own has no list: its owner makes it anew
        )
        self._groups = Groups(
            self._images,
            retention,
            self._workers,
            authority.hash_seed,
            self._clock,
            self._config.limits,
        )
        await self._groups.start()
        self._receiver = receiver = Receiver(self._groups, self._workers, authority.hash_seed, identify)
        conversations = {
            ALPN_DATA: Handler(Role.RECEIVER, self._serve_data),
            ALPN_JOIN: Handler(Role.AUTHORITY, enrolment.serve),
        }
        alpn = (*conversations, ALPN_HTTP) if self._web is not None else tuple(conversations)
        self._acceptor = Acceptor(
            OwnContext(authority, self._clock, alpn),
            conversations,
            self._clock,
            receiver.allocate,
            self._web,
        )
        return await self._acceptor.start(self._config.listen), token

    async def fresh_token(self) -> str:
        """Another join token for a process server. Only after ``start``."""
        assert self._tokens is not None  # noqa: S101 - start() made it
        return (await self._workers.run(self._tokens.create, ServerKind.PROCESS_SERVER)).to_text()

    @property
    def counts(self) -> Counts:
        """What happened at the door."""
        return self._acceptor.counts if self._acceptor is not None else Counts()

    async def drain(self) -> None:
        """Take no connection any more, and wait for the end of those that are there."""
        if self._acceptor is not None:
            await self._acceptor.drain()

    async def stop(self) -> None:
        """End all sessions and let go of everything. What was acknowledged is durable already."""
        if self._acceptor is not None:
            await self._acceptor.stop()
        if self._groups is not None:
            await self._groups.stop()
        if self._images is not None:
            await self._workers.run(self._images.close)

    async def _serve_data(self, stream: Stream) -> None:
        assert self._receiver is not None  # noqa: S101 - start() made it before the door
        self.streams += 1
        try:
            with ids(stream=secrets.token_hex(4), peer=stream.peer_address):
                await self._receiver.serve(stream)
        finally:
            self.streams -= 1

    def _open_images(self, retention: PrivateDirectory) -> ImageDirectory:
        images = ImageDirectory(self._files, self._config.directory, retention, thin=self._config.thin)
        try:
            images.lock()
        except BaseException:
            images.close()
            raise
        return images


class OwnContext:
    """The server's TLS context, made anew with a fresh certificate when the old one nears its end."""

    def __init__(self, authority: Authority, clock: Clock, alpn: Sequence[str]) -> None:
        self._alpn = alpn
        self._authority = authority
        self._clock = clock
        self._context: ssl.SSLContext | None = None
        self._due = clock.now()

    def __call__(self) -> ssl.SSLContext:
        """The context for the next connection."""
        now = self._clock.now()
        if self._context is None or now >= self._due:
            credentials = self._authority.own_credentials(ServerKind.MASTER_TARGET, now)
            self._context = server_context(credentials, self._authority.certificate, self._alpn)
            self._due = certificates.renewal_due(
                x509.load_der_x509_certificate(credentials.certificate), OWN_RENEWAL_JITTER
            )
        return self._context


def identify(certificate: bytes) -> str:
    """The identity in a peer's certificate (DER), which TLS has found to be of our authority.

    Raises:
        TrustError: ``identity.foreign``: it names none of our identities.
    """
    try:
        return certificates.id_of(certificates.from_der(certificate))
    except ValueError as error:
        raise TrustError(
            "identity.foreign",
            f"the certificate names no identity of this installation: {error}",
            cause="it was made by other means than joining",
            fix="join with a token",
        ) from None
