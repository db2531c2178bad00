"""The process server as a daemon: its groups, each with its own task and timer, and health on its port.

The groups come from the configuration, or from the kept document where that names none. Not here: a group's
cycles (``group_cycles.py``), joining (``membership.py``), and how a daemon lives (``daemon.py``).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prometheus_client.core import Metric

from agents import desired_state, process_metrics
from agents.config import DaemonConfig, ProcessDaemonConfig, load_process_server, needs_restart
from agents.daemon import Parts
from agents.group_cycles import Cycling, GroupCycles
from agents.master_target import identify
from agents.membership import Membership, ShownIdentity
from agents.process_server import send
from agents.send_config import SendConfig, SendReport
from agents.target_daemon import free_bytes
from replicator import health
from replicator.desired import Desired, Group
from replicator.errors import TrustError
from replicator.framing import Progress
from replicator.health import Readiness, Told
from replicator.private_directory import PrivateDirectory
from replicator.transport.accept import Acceptor
from replicator.transport.dial import Address
from replicator.transport.web import WebServer


class ProcessDaemon:
    """A process server as a service.

    Args:
        path: of the configuration, to be read again.
    """

    def __init__(self, path: Path, config: ProcessDaemonConfig, parts: Parts) -> None:
        self._path = path
        self._config = config
        self._parts = parts
        self._desired = Desired(0)
        self._state = "starting"
        self._shown = ShownIdentity()
        self._web = WebServer(health.application(Told(self.readiness, self.metrics), self._identify))
        self._acceptor = Acceptor(self._context, {}, parts.clock, web=self._web.protocol)
        self._members: dict[Address, Membership] = {}
        self._groups: dict[str, GroupCycles] = {}
        self._tasks: dict[Membership | GroupCycles, asyncio.Task[None]] = {}
        self._cycling = Cycling(self._send, parts.clock, asyncio.Semaphore(config.at_once), asyncio.Event())

    async def start(self) -> Mapping[str, str]:
        """Listen, and begin with the groups.

        Raises:
            StateError: the state directory, or the document in it, cannot be used. TargetError: ``listen.*``.
        """
        desired = await self._parts.workers.run(self._look, self._config)
        await self._web.start()
        address = await self._acceptor.start(self._config.daemon.listen)
        self._state = "serving"
        await self._converge(self._config, desired)
        return {"listen": str(address), "state": str(self._config.state)}

    async def reload(self) -> DaemonConfig:
        """Serve the groups that the configuration has now; those that are as they were are not disturbed.

        Raises:
            UsageError: ``config.*``. StateError: as ``start``.
        """
        config = await self._parts.workers.run(load_process_server, self._parts.files, self._path)
        if _fixed(config) != _fixed(self._config):
            raise needs_restart(self._path, "listen, state, at_once, azure")
        await self._converge(config, await self._parts.workers.run(self._look, config))
        return config.daemon

    async def drain(self) -> None:
        """Begin no cycle; returns when the last has ended."""
        self._state = "draining"
        self._cycling.draining.set()
        if self._groups:
            await asyncio.wait([self._tasks[cycles] for cycles in self._groups.values()])

    async def stop(self) -> None:
        """End all."""
        await self._end(list(self._tasks))
        await self._acceptor.stop()
        await self._web.stop()

    def status(self) -> str:
        """For systemd."""
        return f"{self._state}, {len(self._groups)} groups, {len(self._problems())} problems"

    def readiness(self) -> Readiness:
        """Whether the groups are being replicated: a group that fails is told, and is no reason to send
        others away.
        """
        return Readiness(self._state == "serving", self._state, self._problems())

    async def metrics(self) -> Iterable[Metric]:
        """What ``docs/operate.md`` lists for a process server."""
        figures = {name: cycles.figures for name, cycles in self._groups.items()}
        free = await self._parts.workers.run(free_bytes, self._config.state)
        return [
            *process_metrics.of_groups(figures, self._parts.clock.now()),
            *process_metrics.of_members(self._members.values()),
            health.gauge(
                "replicator_free_bytes",
                "Space that is left where a thing is written.",
                [({"of": "state"}, free)],
            ),
            health.gauge("replicator_web_connections", "HTTPS connections.", [({}, self._web.connections)]),
            health.door(self._acceptor.counts),
        ]

    def _problems(self) -> tuple[health.Problem, ...]:
        found = [member.problem for member in self._members.values()]
        found += [cycles.figures.problem for cycles in self._groups.values()]
        return tuple(problem for problem in found if problem is not None)

    def _look(self, config: ProcessDaemonConfig) -> Desired:
        """What is to be done. Blocks."""
        if config.groups is not None:
            return Desired(0, config.groups)
        return desired_state.load(PrivateDirectory(self._parts.files, config.state))

    async def _converge(self, config: ProcessDaemonConfig, desired: Desired) -> None:
        """End what is no longer wanted or wanted otherwise, begin what is new; leave the rest alone."""
        self._config, self._desired = config, desired
        wanted = {group.name: group for group in desired.groups}
        tokens = {target_of(group): config.tokens.get(group.peer.address) for group in desired.groups}
        over = {
            address
            for address, member in self._members.items()
            # One that could not join is begun anew: perhaps there is another token in the file now.
            if address not in tokens or tokens[address] != member.token_file or member.problem is not None
        }
        gone = [
            name
            for name, cycles in self._groups.items()
            if wanted.get(name) != cycles.group or target_of(cycles.group) in over
        ]
        await self._end(self._groups.pop(name) for name in gone)
        await self._end(self._members.pop(address) for address in over)
        state = PrivateDirectory(self._parts.files, config.state)
        for address in tokens.keys() - self._members.keys():
            self._members[address] = Membership(address, tokens[address], state, self._parts)
            self._begin(self._members[address])
        for name in wanted.keys() - self._groups.keys():
            group = wanted[name]
            self._groups[name] = GroupCycles(group, config, self._members[target_of(group)], self._cycling)
            self._begin(self._groups[name])

    def _begin(self, what: Membership | GroupCycles) -> None:
        self._tasks[what] = asyncio.create_task(what.run())

    async def _end(self, these: Iterable[Membership | GroupCycles]) -> None:
        tasks = [self._tasks.pop(what) for what in these]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _send(self, config: SendConfig, progress: Progress, tell: Callable[[str], None]) -> SendReport:
        return await send(config, progress, self._parts.clock, self._parts.files, tell)

    def _context(self) -> ssl.SSLContext:
        """What our port shows: the first of our identities."""
        identities = (member.identity for member in self._members.values())
        return self._shown.context(next((identity for identity in identities if identity is not None), None))

    def _identify(self, certificate: bytes) -> str:
        server = identify(certificate)
        if server in self._desired.revoked:
            raise TrustError(
                "identity.revoked",
                f"the identity {server} is revoked",
                cause="an operator has withdrawn it",
                fix="ask the operator why",
            )
        return server


def target_of(group: Group) -> Address:
    """The address of its master target."""
    return Address.parse(group.peer.address)


def _fixed(config: ProcessDaemonConfig) -> tuple[object, ...]:
    """What only a start can change."""
    return config.daemon.listen, config.state, config.at_once, config.azure
