"""What the receiver refuses, in words: one function an error, so that the pipeline stays readable.

Not here: what images and directories refuse; they say it themselves.
"""

from __future__ import annotations

from protocol.constants import STREAMS_MAX
from protocol.errors import RemoteProtocolError, WireCode
from protocol.messages import Interval
from replicator.errors import LinkError, PeerError, TrustError


def no_certificate() -> TrustError:
    """DATA from somebody who has not joined."""
    return TrustError(
        "identity.required",
        "a certificate is needed to send data",
        cause="this process server has not joined",
        fix="join with a token first",
    )


def unsupported(what: str) -> PeerError:
    """The sender asks for what this release does not do."""
    return PeerError(
        "peer.unsupported",
        f"{what} is not supported by this release",
        cause="the sender is of a newer release",
        fix="upgrade this master target",
    )


def busy(group: str) -> LinkError:
    """Another identity has a session of this group."""
    return LinkError(
        "group.busy",
        f"group {group!r} is being received from another process server",
        cause="two process servers send the same group",
        fix="stop one of them",
    )


def replaced() -> PeerError:
    """The same identity opened the group again."""
    return PeerError(
        "session.replaced",
        "this process server has opened the group anew over another connection",
        cause="two sends of the same disk run at once, or this one was thought to be dead",
        fix="let one of them finish",
    )


def unknown_session() -> LinkError:
    """ATTACH to a session that is not there, or not the asker's."""
    return LinkError(
        "session.unknown",
        "there is no such session",
        cause="it ended while this stream was being connected",
        fix="open it again",
    )


def too_many_streams() -> PeerError:
    """ATTACH to a session that has all its streams."""
    return PeerError(
        "session.too_many_streams",
        f"a session has at most {STREAMS_MAX} data streams",
        cause="the sender attached one more",
        fix="lower --streams",
    )


def bad_coverage(reason: str) -> PeerError:
    """A frame for a place that is not open, or partly told of already."""
    return PeerError(
        WireCode.COVERAGE,
        reason,
        cause="a defect in the sender, or two senders in one session",
        fix="report it with the logs of both sides",
    )


def damaged(disk: int, error: RemoteProtocolError) -> PeerError:
    """A frame that passed its transport check and is not what was read."""
    return PeerError(
        error.code,
        f"disk {disk}: {error.reason}",
        cause="it was damaged between being read and being written, or the sender is defective",
        fix="try again; if it comes back, check the memory of both machines",
    )


def incomplete(disk: int, missing: Interval | None) -> PeerError:
    """SEAL of an epoch of which something is missing; None: of another epoch."""
    return PeerError(
        "seal.incomplete",
        f"disk {disk} is not whole: [{missing.start}, {missing.end}) is missing"
        if missing
        else "SEAL names another epoch",
        cause="a defect in the sender: it seals what was not acknowledged",
        fix="send again; report it with the logs of both sides",
    )


def bad_question(disk: int, block: int) -> PeerError:
    """Digests are asked for that nobody could give, or too many at once."""
    return PeerError(
        "peer.protocol",
        f"digests of disk {disk} in blocks of {block} were asked for that it does not have",
        cause="a defect in the sender",
        fix="report it with the logs of both sides",
    )


def unusable_epoch(group: str, epoch: bytes) -> PeerError:
    """An epoch that is over, or none."""
    return PeerError(
        "epoch.unusable",
        f"epoch {epoch.hex()} of group {group!r} cannot be begun or gone on with",
        cause="the process server's state is older than what it has sent since: it was restored from a copy",
        fix="remove that group's directory below its --state: the next send compares both sides",
    )
