"""Byte credit of a session: how much DATA may be under way, whatever the number of streams.

Both sides count header and body of every DATA frame since OPENED. The receiver grants a running total that
never goes down (as QUIC's MAX_DATA, RFC 9000 section 4.1), so a grant may be repeated or overtaken without
harm. It grants anew only what is durable: what a break makes the sender send again is at most what was
granted and not acknowledged.
"""

from __future__ import annotations

from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode


class SendWindow:
    """The sender's side: ``sent`` of ``limit`` bytes are used."""

    __slots__ = ("limit", "sent")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sent = 0

    @property
    def room(self) -> int:
        """Bytes that may be sent now."""
        return self.limit - self.sent

    def take(self, size: int) -> None:
        """Use credit for a frame of ``size`` bytes."""
        if size > self.room:
            raise LocalProtocolError(f"a frame of {size} bytes with credit for {self.room}")
        self.sent += size

    def raise_to(self, limit: int) -> None:
        """Take note of a grant; an older one that comes late changes nothing."""
        self.limit = max(self.limit, limit)


class ReceiveWindow:
    """The receiver's side: ``received`` of ``granted`` bytes have come."""

    __slots__ = ("granted", "received")

    def __init__(self, granted: int) -> None:
        self.granted = granted
        self.received = 0

    def charge(self, size: int) -> None:
        """Account for an announced frame, before memory is given to it."""
        if self.received + size > self.granted:
            raise RemoteProtocolError(
                WireCode.CREDIT, f"a frame of {size} bytes with credit for {self.granted - self.received}"
            )
        self.received += size

    def grant(self, size: int) -> int:
        """Allow ``size`` bytes more; returns the running total for ACK."""
        self.granted += size
        return self.granted
