"""Time as an argument: what needs the time takes a ``Clock``, and a test hands in its own."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Clock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment; never goes back. For durations and deadlines."""
        return time.monotonic()

    def now(self) -> datetime:
        """The present time of day in UTC. For certificates, tokens and records."""
        return datetime.now(UTC)

    def now_ns(self) -> int:
        """The same in ns since 1970, in steps of a microsecond. For records and the wire."""
        return (self.now() - _EPOCH) // _MICROSECOND * 1000
