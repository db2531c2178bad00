"""A process server as one command: joins if it must, sends a group of disks, reports what that took."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from protocol.messages import NO_ID, OpenDisk
from protocol.state import Role
from replicator.adapt import AutoLevel, FixedLevel
from replicator.certificates import host_name
from replicator.changes import CHANGES_MAX_BYTES, Changes, parse_changes
from replicator.clock import Clock
from replicator.enrolment import join, keep_fresh
from replicator.errors import TrustError, UsageError
from replicator.files import Files, read_fully
from replicator.framing import Progress
from replicator.identity import Identities, Identity
from replicator.images.catalogue import check_disk
from replicator.private_directory import PrivateDirectory
from replicator.retrying import keep_trying
from replicator.sender import DiskToSend, Outcome, Sender
from replicator.sender_state import GroupMemory
from replicator.sources.raw import RawSource
from replicator.sources.vmdk import open_vmdk
from replicator.tokens import parse_token
from replicator.transport.dial import Address, dial
from replicator.transport.stream import Stream
from replicator.transport.tls import client_context
from replicator.workers import Workers

PASSES_MAX = 3  # over a source that is being written: the third either finds it at rest, or it never is


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """A disk to send. ``name``: at the target; ``source``: raw file, block device or flat VMDK."""

    name: str
    source: Path


@dataclass(frozen=True, slots=True)
class SendConfig:
    """What a send needs to know.

    Attributes:
        group: name of the disks' group at the target.
        disks: at least one; no name and no source twice.
        to: the master target.
        token: join token as text, needed only without an identity.
        state: directory of identities and digest maps.
        streams: data streams, 1 to 16.
        level: zstd level; 0 is off, None follows the bottleneck.
        quiesced: the operator vouches that nobody writes to the sources.
        give_up_after_s: how long to try again in vain; None: for ever, once the target has let us in.
        changed_extents: file that lists what has changed (``replicator/changes.py``).
    """

    group: str
    disks: tuple[DiskConfig, ...]
    to: Address
    token: str | None
    state: Path
    streams: int
    level: int | None
    quiesced: bool
    give_up_after_s: float | None
    changed_extents: Path | None = None

    @property
    def sources(self) -> str:
        """All of them, for messages."""
        return ", ".join(str(disk.source) for disk in self.disks)


@dataclass(frozen=True, slots=True)
class SendReport:
    """A sealed send; byte counts as in ``Progress``, of all disks.

    ``disk``, ``vmdk``: of the first disk. ``fuzzy``: a source may have changed meanwhile. ``consistency``:
    what a recovery point of it is worth; ``recovery_point``: its id, None if the target made none.
    """

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
    group: str
    disks: tuple[str, ...]
    consistency: str
    recovery_point: str | None


async def send(
    config: SendConfig, progress: Progress, clock: Clock, files: Files, tell: Callable[[str], None]
) -> SendReport:
    """Bring the target's disks to what the sources hold; ``tell`` takes lines about what is waited for.

    Raises:
        ReplicatorError: what stood in the way; see ``docs/errors.md``.
    """
    began = clock.monotonic_s()
    with Workers() as workers:
        link = _Link(config, workers, clock, files, progress, tell)
        first: Outcome | None = None
        passes = 0
        while True:
            passes += 1
            async with AsyncExitStack() as opened:
                disks, watched = await _open_sources(config, files, workers, clock, opened)
                opened.push_async_callback(workers.run, link.close)
                sizes = {disk.name: disk.source.size_bytes for disk in disks}
                changes = None
                if first is None and config.changed_extents is not None:
                    changes = await workers.run(_changes, config.changed_extents, sizes, files)
                attempt = partial(link.send, disks, changes)
                outcome = await keep_trying(attempt, link.met, tell, clock, config.give_up_after_s)
                if not outcome.settled:
                    settled = partial(link.settled, disks, outcome.epoch)
                    await keep_trying(settled, link.met, tell, clock, config.give_up_after_s)
            first = first or outcome
            worthwhile = outcome.stale or (outcome.changed and watched)
            if not worthwhile or passes == PASSES_MAX:
                break
            tell(f"{config.sources} may have changed since it was first read: sending what changed")
    point = outcome.recovery_point
    return SendReport(
        disk=config.disks[0].name,
        mode=first.mode.name.lower(),
        epoch=outcome.epoch.hex(),
        read_bytes=progress.read,
        matched_bytes=progress.matched,
        zero_bytes=progress.zero,
        sent_bytes=progress.sent,
        resent_bytes=progress.resent,
        seconds=round(clock.monotonic_s() - began, 3),
        vmdk=f"{config.disks[0].name}.vmdk",
        fuzzy=outcome.changed or outcome.stale,
        passes=passes,
        group=config.group,
        disks=tuple(disk.name for disk in config.disks),
        consistency=outcome.consistency.name.lower().replace("_", "-"),
        recovery_point=point.hex() if point != NO_ID else None,
    )


async def _open_sources(
    config: SendConfig, files: Files, workers: Workers, clock: Clock, opened: AsyncExitStack
) -> tuple[list[DiskToSend], bool]:
    """The disks, closed with ``opened``. True: a change of any of them would be seen.

    Once the last of them is open, all that promise to be at rest show the content of that one moment, for as
    long as they keep the promise.
    """
    sources = []
    for disk in config.disks:
        source = await _open_source(disk.source, config.quiesced, files, workers)
        opened.push_async_callback(source.close)
        # The target checks it too, but not every text that argv can hold fits on the wire.
        check_disk(OpenDisk(disk.name, source.size_bytes))
        sources.append(source)
    moment_ns = clock.now_ns()
    at_rest = [source.watched or config.quiesced for source in sources]
    disks = [
        DiskToSend(disk.name, source, moment_ns if rests else 0)
        for disk, source, rests in zip(config.disks, sources, at_rest, strict=True)
    ]
    return disks, all(at_rest)


async def _open_source(path: Path, quiesced: bool, files: Files, workers: Workers) -> RawSource:
    if path.name.endswith(".vmdk") and not path.name.endswith("-flat.vmdk"):
        return await open_vmdk(files, workers, path)
    return await RawSource.open(files, workers, path, quiesced=quiesced)


def _changes(path: Path, sizes: Mapping[str, int], files: Files) -> Changes:
    """What a list of changed extents says of disks of these sizes. Blocks."""
    try:
        fd = files.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            size = files.fstat(fd).st_size
            content = bytearray(min(size, CHANGES_MAX_BYTES) + 1)
            count = read_fully(files, fd, memoryview(content), 0)
        finally:
            files.close(fd)
    except OSError as error:
        raise UsageError(
            "changes.unreadable",
            f"the list of changed extents {path} cannot be read: {error.strerror}",
            cause="a wrong path, no plain file, or this user may not read it",
            fix="give the file that the tracker has written",
        ) from None
    if count > CHANGES_MAX_BYTES:
        raise UsageError(
            "changes.too_large",
            f"the list of changed extents {path} has more than {CHANGES_MAX_BYTES} bytes",
            cause="so much has changed in so many places that comparing is no slower",
            fix="send without it, or have the tracker join neighbours",
        )
    return parse_changes(bytes(content[:count]), str(path), sizes)


class _Link:
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

    async def send(self, disks: Sequence[DiskToSend], changes: Changes | None) -> Outcome:
        """One try."""
        config = self._config
        self._identity = await _identity(config, self._workers, self._clock, self._files)
        if self._sender is None:
            state = PrivateDirectory(self._files, config.state)
            self._sender = Sender(
                self._dial,
                self._workers,
                AutoLevel() if config.level is None else FixedLevel(config.level),
                GroupMemory(state, self._identity.pin, config.group),
                config.streams,
                self._progress,
                self._tell,
            )
        outcome = await self._sender.send(config.group, disks, changes, settle=True)
        identities = Identities(PrivateDirectory(self._files, config.state))
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
