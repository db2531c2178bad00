"""The master target as a daemon: that of ``receive``, with a configuration, health on its port, and a drain.

Not here: what a master target is (``master_target.py``) and how a daemon lives (``daemon.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import Metric

from agents.config import DaemonConfig, TargetDaemonConfig, load_target, needs_restart
from agents.daemon import Parts
from agents.master_target import MasterTarget, identify
from replicator import health
from replicator.health import Readiness, Told
from replicator.log.place import GroupDirectory
from replicator.private_directory import PrivateDirectory
from replicator.transport.web import WebServer


@dataclass(frozen=True, slots=True)
class _PointsOf:
    """The recovery points of a group: how many, and the moment that the newest shows, in ns since 1970."""

    group: str
    count: int
    newest_ns: int


class TargetDaemon:
    """A master target as a service.

    Args:
        path: of the configuration, to be read again.
    """

    def __init__(self, path: Path, config: TargetDaemonConfig, parts: Parts) -> None:
        self._path = path
        self._config = config
        self._parts = parts
        self._state = "starting"
        self._web = WebServer(health.application(Told(self.readiness, self.metrics), identify))
        self._target = MasterTarget(
            config.target, parts.workers, parts.clock, parts.files, self._web.protocol
        )

    async def start(self) -> Mapping[str, str]:
        """Listen. Raises as ``MasterTarget.start``."""
        await self._web.start()
        address, token = await self._target.start()
        await self._leave(token)
        self._state = "serving"
        told = {"listen": str(address), "directory": str(self._config.target.directory)}
        if self._config.token_file is not None:
            told["token_file"] = str(self._config.token_file)
        return told

    async def reload(self) -> DaemonConfig:
        """Leave a fresh join token; what is asked of the disks and the port is taken at the next start.

        Raises:
            UsageError: ``config.*``; ``config.needs_restart`` among them.
        """
        config = await self._parts.workers.run(load_target, self._parts.files, self._path)
        if config.target != self._config.target:
            raise needs_restart(self._path, "directory, retention, listen, limits, thin")
        self._config = config
        await self._leave(await self._target.fresh_token())
        return config.daemon

    async def drain(self) -> None:
        """Take no new connection; returns when the last has ended."""
        self._state = "draining"
        await self._target.drain()

    async def stop(self) -> None:
        """End all."""
        await self._target.stop()
        await self._web.stop()

    def status(self) -> str:
        """For systemd."""
        return f"{self._state}, {self._target.streams} data connections"

    def readiness(self) -> Readiness:
        """Whether process servers may come."""
        return Readiness(self._state == "serving", self._state)

    async def metrics(self) -> Iterable[Metric]:
        """What ``docs/operate.md`` lists for a master target."""
        found, free = await self._parts.workers.run(self._look)
        now_ns = self._parts.clock.now_ns()
        return [
            health.gauge("replicator_groups", "Groups that have a log here.", [({}, len(found))]),
            health.gauge(
                "replicator_group_recovery_points",
                "Recovery points that a group can go back to.",
                [({"group": each.group}, each.count) for each in found],
            ),
            health.gauge(
                "replicator_group_lag_seconds",
                "Age of what a group's newest recovery point shows.",
                [({"group": each.group}, (now_ns - each.newest_ns) / 1e9) for each in found if each.count],
            ),
            health.gauge("replicator_streams", "Data connections.", [({}, self._target.streams)]),
            health.gauge("replicator_web_connections", "HTTPS connections.", [({}, self._web.connections)]),
            health.gauge(
                "replicator_free_bytes",
                "Space that is left where a thing is written.",
                [({"of": of}, size) for of, size in free.items()],
            ),
            health.door(self._target.counts),
        ]

    def _look(self) -> tuple[list[_PointsOf], dict[str, int]]:
        """What the disks tell. Blocks."""
        target = self._config.target
        place = PrivateDirectory(self._parts.files, target.retention)
        found = []
        for name in GroupDirectory.names(place):
            times = [epoch.time_ns for epoch in GroupDirectory(place, name).load().epochs if epoch.is_point]
            found.append(_PointsOf(name, len(times), max(times, default=0)))
        folders = {"datastore": target.directory, "retention": target.retention}
        return found, {of: free_bytes(folder) for of, folder in folders.items()}

    async def _leave(self, token: str) -> None:
        path = self._config.token_file
        if path is not None:
            await self._parts.workers.run(self._write, path, token)

    def _write(self, path: Path, token: str) -> None:
        with PrivateDirectory(self._parts.files, path.parent).held() as held:
            held.replace(path.name, token.encode() + b"\n")


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write there. Blocks."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
