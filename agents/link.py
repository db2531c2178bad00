"""The process server's side of its connection with one target, over all tries: identity, dialling, sender.

Not here: what is sent (``process_server.py`` for files and devices, ``azure_server.py`` for Azure).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from agents.send_config import SendConfig
from protocol.state import Role
from replicator.adapt import AutoLevel, FixedLevel
from replicator.certificates import host_name
from replicator.changes import Changes
from replicator.clock import Clock
from replicator.enrolment import join, keep_fresh
from replicator.errors import TrustError
from replicator.files import Files
from replicator.framing import Progress
from replicator.identity import Identities, Identity
from replicator.private_directory import PrivateDirectory
from replicator.sender import DiskToSend, Outcome, Sender
from replicator.sender_state import GroupMemory
from replicator.tokens import parse_token
from replicator.transport.dial import dial
from replicator.transport.stream import Stream
from replicator.transport.tls import client_context
from replicator.workers import Workers


class Link:
    """Our side of the connection with one target, over all tries."""

    def __init__(
        self,
        config: SendConfig,
        workers: Workers,
        clock: Clock,
        files: Files,
        progress: Progress,
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._workers = workers
        self._clock = clock
        self._files = files
        self._progress = progress
        self._tell = tell
        self._sender: Sender | None = None
        self._identity: Identity | None = None

    def met(self) -> bool:
        """Whether the target has let us in at this address, now or in an earlier run."""
        known = self._identity is not None and str(self._config.to) in self._identity.addresses
        return known or (self._sender is not None and self._sender.welcomed)

    async def identify(self) -> tuple[bytes, GroupMemory]:
        """The pin of the target's authority, joined if need be, and what is remembered of the group there."""
        config = self._config
        self._identity = await _identity(config, self._workers, self._clock, self._files)
        pin = self._identity.pin
        return pin, GroupMemory(PrivateDirectory(self._files, config.state), pin, config.group)

    async def send(
        self, disks: Sequence[DiskToSend], changes: Changes | None, epoch: bytes | None = None
    ) -> Outcome:
        """One try; ``epoch``: the id that the disks' snapshots carry."""
        config = self._config
        _, memory = await self.identify()
        if self._sender is None:
            self._sender = Sender(
                self._dial,
                self._workers,
                AutoLevel() if config.level is None else FixedLevel(config.level),
                memory,
                config.streams,
                self._progress,
                self._tell,
            )
        outcome = await self._sender.send(config.group, disks, changes, settle=True, epoch=epoch)
        identities = Identities(PrivateDirectory(self._files, config.state))
        assert self._identity is not None  # noqa: S101 - identify() found it
        await self._workers.run(identities.remember, self._identity, str(config.to))
        return outcome

    async def settled(self, disks: Sequence[DiskToSend], epoch: bytes) -> None:
        """Wait until the target's disks hold the epoch, not only its log. One try."""
        if self._sender is not None:
            await self._sender.settled(self._config.group, disks, epoch)

    def close(self) -> None:
        """Let go of an epoch that could not be sealed. Blocks."""
        if self._sender is not None:
            self._sender.close()

    async def _dial(self) -> Stream:
        identity = self._identity
        assert identity is not None  # noqa: S101 - send() found it
        return await dial(
            self._config.to,
            client_context(identity.credentials, identity.authority),
            Role.SENDER,
            server_name=host_name(identity.server),
            clock=self._clock,
        )


async def _identity(config: SendConfig, workers: Workers, clock: Clock, files: Files) -> Identity:
    """Our identity at the target: found, or made with the token; renewed when it is time."""
    identities = Identities(PrivateDirectory(files, config.state))
    token = parse_token(config.token) if config.token is not None else None
    if token is not None:
        identity = await workers.run(identities.find, token.pin)
    else:
        identity = await workers.run(identities.find_by_address, str(config.to))
    if identity is None:
        if token is None:
            raise TrustError(
                "identity.missing",
                f"no identity for {config.to}",
                cause="this process server has not joined there, or --state names another directory",
                fix="give the join token that `replicator receive` printed, with --token-file or --token",
            )
        return await join(config.to, token, identities=identities, workers=workers, clock=clock)
    jitter = random.random()  # noqa: S311 - spreads renewals, guards nothing
    return await keep_fresh(identity, config.to, jitter, identities=identities, workers=workers, clock=clock)
