"""What a send is told, and what it reports: values that the command line and the process server share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol.messages import NO_ID
from replicator.framing import Progress
from replicator.sender import Outcome
from replicator.transport.dial import Address


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """A disk to send. ``name``: at the target; ``source``: a path, or an address in Azure."""

    name: str
    source: str


@dataclass(frozen=True, slots=True)
class AzureConfig:
    """How disks in Azure are read.

    Attributes:
        credentials: file with a connection string or a shared access signature; None: by environment.
        trust_diff: believe Azure's word on what changed between two snapshots.
    """

    credentials: Path | None = None
    trust_diff: bool = True


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
        azure: for sources there.
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
    azure: AzureConfig = AzureConfig()

    @property
    def sources(self) -> str:
        """All of them, for messages."""
        return ", ".join(disk.source for disk in self.disks)

    @property
    def in_azure(self) -> bool:
        """Whether the sources are disks in Azure: all of them are, or none."""
        return in_azure(self.disks[0].source)


@dataclass(frozen=True, slots=True)
class SendReport:
    """A sealed send; byte counts as in ``Progress``, of all disks.

    ``disk``, ``vmdk``: of the first disk. ``fuzzy``: a source may have changed meanwhile. ``consistency``:
    what a recovery point of it is worth; ``recovery_point``: its id, None if the target made none.
    ``sealed_seconds``: of the last session, from OPEN to SEALED.
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
    sealed_seconds: float

    @classmethod
    def of(
        cls,
        config: SendConfig,
        first: Outcome,
        last: Outcome,
        passes: int,
        progress: Progress,
        seconds: float,
    ) -> SendReport:
        """What the passes of a send have come to."""
        point = last.recovery_point
        return cls(
            disk=config.disks[0].name,
            mode=first.mode.name.lower(),
            epoch=last.epoch.hex(),
            read_bytes=progress.read,
            matched_bytes=progress.matched,
            zero_bytes=progress.zero,
            sent_bytes=progress.sent,
            resent_bytes=progress.resent,
            seconds=round(seconds, 3),
            vmdk=f"{config.disks[0].name}.vmdk",
            fuzzy=last.changed or last.stale,
            passes=passes,
            group=config.group,
            disks=tuple(disk.name for disk in config.disks),
            consistency=last.consistency.name.lower().replace("_", "-"),
            recovery_point=point.hex() if point != NO_ID else None,
            sealed_seconds=round(last.sealed_s, 3),
        )


def in_azure(source: str) -> bool:
    """Whether a source is an address there, not a path."""
    return source.startswith(("azure://", "azure-disk://"))
