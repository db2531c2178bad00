"""Every error that an operator can meet, in one tree.

::

    ReplicatorError
    ├── UsageError       the command or configuration is wrong    operator   stop
    ├── SourceError      the disk to be read is wrong or failing  source     stop
    ├── TargetError      the place to write to is wrong or failing target    stop
    ├── SpaceError       the place to write to is full            target     retry
    ├── LinkError        the network between the two              network    retry
    ├── PeerError        the other side refused or misbehaved     peer       stop
    ├── TrustError       identities, tokens, certificates         trust      stop
    ├── StateError       our own files on disk cannot be used     state      stop
    └── Interrupted      somebody asked the process to end        operator   retry

Each leaf says who is to blame and what helps; each instance carries a stable ``code``, the message (what
failed, on which thing), its cause and the fix. ``docs/errors.md`` lists the codes. Nothing here knows about
exit statuses or wire formats: ``agents/cli/output.py`` and ``transport`` translate.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Remedy(StrEnum):
    """What helps against an error: trying again, or somebody changing something first."""

    RETRY = "retry"
    STOP = "stop"


class ReplicatorError(Exception):
    """Root of the tree.

    Args:
        code: stable dotted name, the key of ``docs/errors.md``.
        message: what failed, on which thing.
        cause: why it most likely failed.
        fix: what to do about it.
    """

    blame: ClassVar[str] = "replicator"
    remedy: ClassVar[Remedy] = Remedy.STOP

    def __init__(self, code: str, message: str, *, cause: str, fix: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} ({self.code}). Cause: {self.cause}. Fix: {self.fix}."


class UsageError(ReplicatorError):
    """The command line or a configuration is wrong; nothing was tried."""

    blame = "operator"


class SourceError(ReplicatorError):
    """The disk to be read is missing, unsuitable, failing or changing under us."""

    blame = "source"


class TargetError(ReplicatorError):
    """The place to write to is missing, unsuitable or failing."""

    blame = "target"


class SpaceError(ReplicatorError):
    """The place to write to is full; goes on once there is space."""

    blame = "target"
    remedy = Remedy.RETRY


class LinkError(ReplicatorError):
    """The network between the two sides failed; the next try may succeed."""

    blame = "network"
    remedy = Remedy.RETRY


class PeerError(ReplicatorError):
    """The other side refused the request or broke the protocol."""

    blame = "peer"


class TrustError(ReplicatorError):
    """An identity, token or certificate is not accepted."""

    blame = "trust"


class StateError(ReplicatorError):
    """One of our own files is damaged or cannot be used."""

    blame = "state"


class Interrupted(ReplicatorError):
    """A signal asked the process to end, and it did so in order."""

    blame = "operator"
    remedy = Remedy.RETRY


def cause_of(group: BaseExceptionGroup) -> BaseException:
    """The one error that tells the story of a failed TaskGroup.

    What an operator can act upon comes before a lost connection, which is often only its consequence; any
    other exception is a defect and comes first.
    """
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(cause_of(error) if isinstance(error, BaseExceptionGroup) else error)
    return min(leaves, key=_rank)


def _rank(error: BaseException) -> int:
    if not isinstance(error, ReplicatorError):
        return 0
    return 2 if isinstance(error, LinkError) else 1
