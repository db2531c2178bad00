"""What commands print and how they end.

With ``--json`` stdout gets one JSON document and nothing else; progress, logs and reasons go to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from replicator.errors import Interrupted, ReplicatorError, UsageError

DONE, FAILED, WRONG_USAGE = 0, 1, 2
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def document(content: Mapping[str, object]) -> None:
    """Print one JSON document on stdout, on one line, at once."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Tell a person something, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def report(error: ReplicatorError, *, as_json: bool) -> int:
    """Print an error; returns the exit status."""
    if as_json:
        told = {"code": error.code, "message": error.message, "cause": error.cause, "fix": error.fix}
        document({"error": told})
    say(f"error: {error}")
    return WRONG_USAGE if isinstance(error, UsageError) else FAILED


def stopped_by(signal_name: str) -> Interrupted:
    """The end that a signal asked for."""
    return Interrupted(
        "interrupted",
        f"stopped by {signal_name}",
        cause="somebody asked for it",
        fix="run the same command again: it goes on safely",
    )


def in_units(size: float) -> str:
    """A number of bytes for people: ``1.4 GiB``."""
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.0f} {UNITS[0]}" if not unit else f"{size:.1f} {UNITS[unit]}"
