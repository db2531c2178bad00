"""What can go wrong in a conversation.

::

    ProtocolError
    ├── LocalProtocolError    our side asked for something the conversation does not allow: our bug
    ├── RemoteProtocolError   the peer sent something it may not send; ``code`` goes into FAIL
    └── PeerSilent            the peer sent nothing for too long; nobody's fault, the connection is dead
"""

from __future__ import annotations

from enum import StrEnum


class WireCode(StrEnum):
    """Codes of FAIL that the protocol itself raises. Applications add theirs; unknown ones are shown."""

    MAGIC = "protocol.magic"
    HEADER_HASH = "protocol.header_hash"
    HEADER = "protocol.header"
    VERSION = "protocol.version"
    STATE = "protocol.state"
    LIMIT = "protocol.limit"
    BODY_HASH = "protocol.body_hash"
    MESSAGE = "protocol.message"
    TABLE = "protocol.table"
    PAYLOAD = "protocol.payload"
    RAW_HASH = "protocol.raw_hash"
    CREDIT = "protocol.credit"
    COVERAGE = "protocol.coverage"
    SLOW = "protocol.slow"


ACCIDENTS = frozenset({WireCode.HEADER_HASH, WireCode.BODY_HASH, WireCode.RAW_HASH, WireCode.SLOW})
"""Damage and stalls: nobody broke a rule, another try may well succeed. All other codes will come again."""


class ProtocolError(Exception):
    """Root of the tree."""


class LocalProtocolError(ProtocolError):
    """Our side broke the rules; nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the rules; the connection is closed after a FAIL with ``code``."""

    def __init__(self, code: WireCode, reason: str) -> None:
        super().__init__(f"{reason} ({code})")
        self.code = code
        self.reason = reason


class PeerSilent(ProtocolError):
    """Nothing came from the peer for ``silent_s`` seconds."""

    def __init__(self, silent_s: float, awaited: str) -> None:
        super().__init__(f"nothing received for {silent_s:.0f} s while waiting for {awaited}")
        self.silent_s = silent_s
        self.awaited = awaited
