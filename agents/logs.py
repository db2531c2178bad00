"""How daemons log: lines of text or JSON on stderr, each with the ids of what is being done (``log_ids.py``).

Not here: what is logged.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from agents.config import LogConfig
from agents.log_ids import current


class JsonLines(logging.Formatter):
    """One JSON document a line: ``time`` (UTC), ``level``, ``logger``, ``message``, the ids, ``trace``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **current(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """A line for people, with the ids behind it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without a trace that may follow it."""
        told = "".join(f" {key}={value}" for key, value in current().items())
        return super().formatMessage(record) + told


def set_up(config: LogConfig) -> None:
    """Log as the configuration has it, from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if config.format == "json" else TextLines())
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
