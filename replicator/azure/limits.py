"""What Azure allows of snapshots, and what follows for the next one. Pure.

The figures are those of the vendor's pages on incremental snapshots, on blob scalability and on VM restore
points. Who plans a cycle asks here first: a request that Azure refuses costs a cycle, one that waits costs
minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.constants import MIB

NS_PER_S = 1_000_000_000
TIB = 1024 * 1024 * MIB

SAS_PER_FAMILY = 5  # incremental snapshots of one disk that may be open for export at the same time
DIFF_BOUNDARY_BYTES = 4 * TIB  # a disk that was resized across it has no diff over the resize


@dataclass(frozen=True, slots=True)
class SnapshotLimits:
    """How often, and how many.

    Attributes:
        name: of what is limited, for messages.
        count: at most so many are taken in any ``window_s`` seconds.
        held: at most so many exist; those of others count, too.
    """

    name: str
    count: int
    window_s: int
    held: int


PREMIUM_BLOB = SnapshotLimits("snapshots of a premium page blob", count=1, window_s=600, held=100)
INCREMENTAL = SnapshotLimits("incremental snapshots of a managed disk", count=7, window_s=300, held=500)
CRASH_POINT = SnapshotLimits("crash-consistent restore points of a VM", count=1, window_s=3600, held=500)
APPLICATION_POINT = SnapshotLimits(
    "application-consistent restore points of a VM", count=1, window_s=3 * 3600, held=500
)


def wait_s(limits: SnapshotLimits, taken_ns: Sequence[int], now_ns: int) -> float:
    """Seconds until one more may be taken; 0: now.

    Args:
        limits: of the kind.
        taken_ns: the moments of those that were taken, in any order, in ns since 1970.
        now_ns: the present.
    """
    recent = sorted(taken_ns)[-limits.count :]
    if len(recent) < limits.count:
        return 0.0
    return max(0.0, (recent[0] + limits.window_s * NS_PER_S - now_ns) / NS_PER_S)


def has_room(limits: SnapshotLimits, held: int) -> bool:
    """Whether one more may exist beside ``held`` others."""
    return held < limits.held


def diffable(before_bytes: int, after_bytes: int) -> bool:
    """Whether Azure can tell what changed between snapshots of a disk that had these sizes."""
    smaller, larger = sorted((before_bytes, after_bytes))
    return not smaller <= DIFF_BOUNDARY_BYTES < larger
