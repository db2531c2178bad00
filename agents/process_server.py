"""A process server as one command: joins if it must, sends a disk, reports what that took."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from protocol.messages import OpenDisk
from protocol.state import Role
from replicator.adapt import AutoLevel, FixedLevel
from replicator.certificates import host_name
from replicator.clock import Clock
from replicator.enrolment import join, keep_fresh
from replicator.errors import TrustError
from replicator.files import Files
from replicator.identity import Identities, Identity
from replicator.images.catalogue import check_disk
from replicator.private_directory import PrivateDirectory
from replicator.retrying import keep_trying
from replicator.sender import DiskToSend, Outcome, Sender
from replicator.sender_state import GroupMemory
from replicator.sending import Progress
from replicator.sources.raw import RawSource
from replicator.sources.vmdk import open_vmdk
from replicator.tokens import parse_token
from replicator.transport.dial import Address, dial
from replicator.transport.stream import Stream
from replicator.transport.tls import client_context
from replicator.workers import Workers

PASSES_MAX = 3  # over a source that is being written: the third either finds it at rest, or it never is


@dataclass(frozen=True, slots=True)
class SendConfig:
    """What a send needs to know.

    Attributes:
        source: raw file, block device, or descriptor of a flat VMDK.
        to: the master target.
        token: join token as text, needed only without an identity.
        disk: the disk's name at the target.
        state: directory of identities and digest maps.
        streams: data streams, 1 to 16.
        level: zstd level; 0 is off, None follows the bottleneck.
        quiesced: the operator vouches that nobody writes to the source.
        give_up_after_s: how long to try again in vain; None: for ever, once the target has let us in.
    """

    source: Path
    to: Address
    token: str | None
    disk: str
    state: Path
    streams: int
    level: int | None
    quiesced: bool
    give_up_after_s: float | None


@dataclass(frozen=True, slots=True)
class SendReport:
    """A sealed send; byte counts as in ``Progress``. ``fuzzy``: the source may have changed meanwhile."""

    disk: str
    mode: str
    epoch: str
    read_bytes: int
    matched_bytes: int
    zero_bytes: int
    sent_bytes: int
    resent_bytes: int
    seconds: float
    vmdk: str
    fuzzy: bool
    passes: int


async def send(
    config: SendConfig, progress: Progress, clock: Clock, files: Files, tell: Callable[[str], None]
) -> SendReport:
    """Bring the target's disk to what the source holds; ``tell`` takes lines about what is waited for.

    Raises:
        ReplicatorError: what stood in the way; see ``docs/errors.md``.
    """
    began = clock.monotonic_s()
    with Workers() as workers:
        link = _Link(config, workers, clock, files, progress)
        first: Outcome | None = None
        passes = 0
        while True:
            passes += 1
            source = await _open_source(config, files, workers)
            try:
                # The target checks it too, but not every text that argv can hold fits on the wire.
                check_disk(OpenDisk(config.disk, source.size_bytes))
                disks = [DiskToSend(config.disk, source)]
                outcome = await keep_trying(
                    partial(link.send, disks), link.met, tell, clock, config.give_up_after_s
                )
                await keep_trying(
                    partial(link.settled, disks, outcome.epoch),
                    link.met,
                    tell,
                    clock,
                    config.give_up_after_s,
                )
            finally:
                await workers.run(link.close)
                await source.close()
            first = first or outcome
            worthwhile = outcome.stale or (outcome.changed and source.watched)
            if not worthwhile or passes == PASSES_MAX:
                break
            tell(f"{config.source} may have changed since it was first read: sending what changed")
    return SendReport(
        disk=config.disk,
        mode=first.mode.name.lower(),
        epoch=outcome.epoch.hex(),
        read_bytes=progress.read,
        matched_bytes=progress.matched,
        zero_bytes=progress.zero,
        sent_bytes=progress.sent,
        resent_bytes=progress.resent,
        seconds=round(clock.monotonic_s() - began, 3),
        vmdk=f"{config.disk}.vmdk",
        fuzzy=outcome.changed or outcome.stale,
        passes=passes,
    )


async def _open_source(config: SendConfig, files: Files, workers: Workers) -> RawSource:
    if config.source.name.endswith(".vmdk") and not config.source.name.endswith("-flat.vmdk"):
        return await open_vmdk(files, workers, config.source)
    return await RawSource.open(files, workers, config.source, quiesced=config.quiesced)


class _Link:
    """Our side of the connection with one target, over all tries."""

    def __init__(
        self, config: SendConfig, workers: Workers, clock: Clock, files: Files, progress: Progress
    ) -> None:
        self._config = config
        self._workers = workers
        self._clock = clock
        self._files = files
        self._progress = progress
        self._sender: Sender | None = None
        self._identity: Identity | None = None

    def met(self) -> bool:
        """Whether the target has let us in at this address, now or in an earlier run."""
        known = self._identity is not None and str(self._config.to) in self._identity.addresses
        return known or (self._sender is not None and self._sender.welcomed)

    async def send(self, disks: Sequence[DiskToSend]) -> Outcome:
        """One try."""
        config = self._config
        self._identity = await _identity(config, self._workers, self._clock, self._files)
        if self._sender is None:
            state = PrivateDirectory(self._files, config.state)
            self._sender = Sender(
                self._dial,
                self._workers,
                AutoLevel() if config.level is None else FixedLevel(config.level),
                GroupMemory(state, self._identity.pin, config.disk),
                config.streams,
                self._progress,
            )
        outcome = await self._sender.send(config.disk, disks)
        identities = Identities(PrivateDirectory(self._files, config.state))
        await self._workers.run(identities.remember, self._identity, str(config.to))
        return outcome

    async def settled(self, disks: Sequence[DiskToSend], epoch: bytes) -> None:
        """Wait until the target's disks hold the epoch, not only its log. One try."""
        if self._sender is not None:
            await self._sender.settled(self._config.disk, disks, epoch)

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
