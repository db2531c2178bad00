"""A process server as one command: joins if it must, sends a disk, reports what that took."""

from __future__ import annotations

import random
import time
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
from replicator.images.directory import check_disk
from replicator.private_directory import PrivateDirectory
from replicator.sender import DiskToSend, Progress, Sender
from replicator.sources.raw import RawSource
from replicator.tokens import parse_token
from replicator.transport.dial import Address, dial
from replicator.transport.tls import client_context
from replicator.workers import Workers


@dataclass(frozen=True, slots=True)
class SendConfig:
    """What a send needs to know.

    Attributes:
        source: raw file or block device.
        to: the master target.
        token: join token as text, needed only without an identity.
        disk: the disk's name at the target.
        state: directory of identities.
        streams: data streams, 1 to 16.
        level: zstd level; 0 is off, None follows the bottleneck.
    """

    source: Path
    to: Address
    token: str | None
    disk: str
    state: Path
    streams: int
    level: int | None


@dataclass(frozen=True, slots=True)
class SendReport:
    """A sealed send; byte counts as in ``Progress``."""

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


async def send(config: SendConfig, progress: Progress, clock: Clock, files: Files) -> SendReport:
    """Send one disk whole.

    Raises:
        ReplicatorError: what stood in the way; see ``docs/errors.md``.
    """
    began = time.monotonic()
    with Workers() as workers:
        source = await RawSource.open(files, workers, config.source)
        try:
            # The target checks it too, but not every text that argv can hold fits on the wire.
            check_disk(OpenDisk(config.disk, source.size_bytes))
            identity = await _identity(config, workers, clock, files)
            sender = Sender(
                partial(
                    dial,
                    config.to,
                    client_context(identity.credentials, identity.authority),
                    Role.SENDER,
                    server_name=host_name(identity.server),
                    clock=clock,
                ),
                workers,
                AutoLevel() if config.level is None else FixedLevel(config.level),
                config.streams,
                progress,
            )
            outcome = await sender.send_full(config.disk, [DiskToSend(config.disk, source)])
        finally:
            await source.close()
    return SendReport(
        disk=config.disk,
        mode="full",
        epoch=outcome.epoch.hex(),
        read_bytes=progress.read,
        matched_bytes=progress.matched,
        zero_bytes=progress.zero,
        sent_bytes=progress.sent,
        resent_bytes=progress.resent,
        seconds=round(time.monotonic() - began, 3),
        vmdk=f"{config.disk}.vmdk",
        fuzzy=outcome.fuzzy,
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
    identity = await workers.run(identities.remember, identity, str(config.to))
    jitter = random.random()  # noqa: S311 - spreads renewals, guards nothing
    return await keep_fresh(identity, config.to, jitter, identities=identities, workers=workers, clock=clock)
