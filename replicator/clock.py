"""Time as an argument: what needs the time takes a ``Clock``, and a test hands in its own."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class Clock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment; never goes back. For durations and deadlines."""
        return time.monotonic()

    def now(self) -> datetime:
        """The present time of day in UTC. For certificates, tokens and records."""
        return datetime.now(UTC)
