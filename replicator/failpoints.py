"""Named places at which a test may end the process as a power cut would.

``FAILPOINT=name`` ends the process when the named place is reached; ``FAILPOINT=name:3`` at the third time.
There is one on each side of every durable step. Not for errors that code is to handle: those come through
the I/O seam (``files.py``).
"""

from __future__ import annotations

import os
import signal
from itertools import count

NAMES = frozenset(
    {
        "replace.before_write",
        "replace.before_fsync",
        "replace.before_rename",
        "replace.before_fsync_dir",
        "replace.done",
        "image.before_create",
        "image.created",
        "image.before_sync",
        "image.synced",
        "image.before_publish",
        "image.published",
        "send.acknowledged",
        "epoch.before_begin",
        "epoch.begun",
        "epoch.before_publish",
        "epoch.published",
        "coverage.before_append",
        "coverage.appended",
        "log.before_create",
        "log.created",
        "log.before_write",
        "log.written",
        "log.before_finish",
        "log.finished",
        "log.before_drop",
        "log.dropped",
        "sidecar.before_mark",
        "sidecar.marked",
        "authority.before_store",
        "authority.stored",
        "token.bound",
        "join.before_answer",
        "join.key_stored",
        "join.answered",
        "join.received",
        "join.stored",
        "seal.before_record",
        "seal.recorded",
        "session.before_ack",
        "session.acked",
        "session.before_sealed",
        "session.sealed",
        "apply.before_undo",
        "apply.undo_kept",
        "apply.before_base",
        "apply.base_written",
        "apply.base_synced",
        "apply.dropped",
        "back.before_begin",
        "back.begun",
        "back.before_seal",
        "back.sealed",
        "desired.before_keep",
        "desired.kept",
        "snapshot.before_take",
        "snapshot.taken",
        "snapshot.before_delete",
        "snapshot.deleted",
    }
)


def parse(setting: str) -> tuple[str | None, int]:
    """Which failpoint is armed, if any, and the how-manieth time counts.

    Raises:
        ValueError: no such failpoint, or no such number: a test must not believe that it ended a process.
    """
    name, _, times = setting.partition(":")
    nth = int(times or "1")
    if setting and (name not in NAMES or nth < 1):
        raise ValueError(f"FAILPOINT={setting}: want a name from replicator.failpoints.NAMES, and :1 or more")
    return name or None, nth


_armed, _nth = parse(os.environ.get("FAILPOINT", ""))
_left = count(_nth - 1, -1)


def reach(name: str) -> None:
    """End the process with SIGKILL if ``name`` is the armed failpoint and its count has run out."""
    if name == _armed and next(_left) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
