"""FAIL and what else a peer or a line does to us, as errors of ours, and the other way round.

Pure: texts and classes only. When a stream has failed is decided in ``stream.py``.
"""

from __future__ import annotations

from protocol.errors import PeerSilent, RemoteProtocolError, WireCode
from protocol.messages import Fail, Retry
from protocol.state import State
from replicator.errors import LinkError, PeerError, Remedy, ReplicatorError, TrustError

TEXT_MAX_BYTES = 2000
CODE_MAX_BYTES = 64


def to_fail(error: ReplicatorError) -> Fail:
    """The FAIL that tells the peer of ``error``; texts that are too long for it are cut."""
    retry = Retry.LATER if error.remedy is Remedy.RETRY else Retry.STOP
    return Fail(
        _cut(error.code, CODE_MAX_BYTES), retry, _cut(error.message), _cut(error.cause), _cut(error.fix)
    )


def from_fail(fail: Fail, peer: str) -> ReplicatorError:
    """The error that a peer's FAIL stands for: its own code and texts, our class."""
    if fail.code == WireCode.VERSION:
        return version_error(peer, fail.message)
    kind: type[ReplicatorError] = PeerError
    if fail.code.startswith(("join.", "identity.")):
        kind = TrustError
    elif fail.retry is Retry.LATER:
        kind = LinkError
    return kind(
        fail.code,
        fail.message,
        cause=fail.cause or "as the other side says",
        fix=fail.fix or f"look at the log of {peer}",
    )


def broken(error: RemoteProtocolError, peer: str) -> ReplicatorError:
    """The peer broke the protocol."""
    if error.code is WireCode.VERSION:
        return version_error(peer, error.reason)
    return PeerError(
        "peer.protocol",
        f"{peer} broke the protocol: {error}",
        cause="damage on the way that TLS did not see, or a defect on one side",
        fix="try again; if it comes back, report it with the logs of both sides",
    )


def version_error(peer: str, reason: str) -> PeerError:
    """The two sides have no version in common."""
    return PeerError(
        "peer.version",
        f"no common protocol version with {peer}: {reason}",
        cause="the two sides are of releases too far apart",
        fix="upgrade the older side",
    )


def unknown_conversation(peer: str, alpn: str | None) -> PeerError:
    """TLS is up, but for a conversation that we do not have."""
    return PeerError(
        "peer.alpn",
        f"{peer} speaks {alpn!r}",
        cause="it is no Replicator, or one of a version without a common protocol",
        fix="check address and port, and the versions of both sides",
    )


def lost(peer: str, what: str) -> LinkError:
    """The connection is gone."""
    return LinkError(
        "link.lost",
        f"connection with {peer} lost: {what}",
        cause="the network, or the process at the other end, went away",
        fix="run the same command again: it goes on safely",
    )


def closed_before_welcome(peer: str) -> TrustError:
    """The server ended the connection before it accepted us: how TLS 1.3 refuses a client's certificate."""
    return TrustError(
        "link.closed_before_welcome",
        f"{peer} closed the connection before it accepted us",
        cause="it does not know our certificate: it was installed anew, our certificate expired or was "
        "revoked, or the clocks differ; or it is stopping",
        fix="look at its log; if it was installed anew, join again with a new token",
    )


def silent(peer: str, state: State, error: PeerSilent) -> LinkError:
    """Nothing came from the peer for too long."""
    return LinkError(
        "link.silent",
        f"{peer} is silent: {error} (state {state})",
        cause="the network drops everything without a word, or the process at the other end hangs",
        fix="check the route and firewalls, then run the same command again: it goes on safely",
    )


def _cut(text: str, size: int = TEXT_MAX_BYTES) -> str:
    return text.encode(errors="replace")[:size].decode(errors="ignore")
