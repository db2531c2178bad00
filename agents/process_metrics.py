"""The metrics of a process server, made of what its groups and memberships know.

``docs/operate.md`` lists them all. Not here: how they are served (``replicator/health.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime

from prometheus_client.core import Metric

from agents.group_cycles import COUNTED, GroupFigures
from agents.membership import Membership
from replicator.health import counter, gauge


def of_groups(groups: Mapping[str, GroupFigures], now: datetime) -> list[Metric]:
    """Metrics of groups, by name."""
    states = Counter(figures.state for figures in groups.values())
    return [
        gauge(
            "replicator_groups",
            "Groups of this process server, by state.",
            [({"state": state}, number) for state, number in states.items()],
        ),
        gauge(
            "replicator_group_lag_seconds",
            "Age of what the target has of a group: since the newest sealed cycle began.",
            [
                ({"group": name}, (now - figures.shown_at).total_seconds())
                for name, figures in groups.items()
                if figures.shown_at is not None
            ],
        ),
        counter(
            "replicator_cycles",
            "Cycles that ended, by result.",
            [
                ({"group": name, "result": result}, number)
                for name, figures in groups.items()
                for result, number in figures.cycles.items()
            ],
        ),
        counter(
            "replicator_bytes",
            "Bytes of sources read, found zero, found equal; bytes sent, and of them sent again.",
            [
                ({"group": name, "kind": kind}, figures.bytes_of(kind))
                for name, figures in groups.items()
                for kind in COUNTED
            ],
        ),
        gauge(
            "replicator_cycle_size_bytes",
            "Size of what the cycle under way has to bring over; 0 between cycles.",
            [({"group": name}, figures.progress.size) for name, figures in groups.items()],
        ),
        gauge(
            "replicator_cycle_done_bytes",
            "Of it, what is durable at the target or was found equal.",
            [({"group": name}, figures.progress.done) for name, figures in groups.items()],
        ),
    ]


def of_members(members: Iterable[Membership]) -> list[Metric]:
    """Metrics of our identities."""
    return [
        gauge(
            "replicator_certificate_expires_timestamp_seconds",
            "When our certificate at a master target expires.",
            [
                ({"target": str(member.address)}, member.identity.expires.timestamp())
                for member in members
                if member.identity is not None
            ],
        )
    ]
