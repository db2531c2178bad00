"""What all daemons share: a life under systemd, from READY to a drained end.

SIGTERM (or SIGINT) drains: what is under way may go on until the deadline, a second signal ends it at once.
SIGHUP reads the configuration again. The watchdog is fed from the event loop: where that hangs, systemd
starts the daemon anew. Not here: what a daemon does (``target_daemon.py``, ``process_daemon.py``).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import sdnotify  # type: ignore[import-untyped]
import uvloop

from agents.config import DaemonConfig
from agents.logs import set_up
from replicator.clock import Clock
from replicator.errors import ReplicatorError
from replicator.files import Files
from replicator.workers import Workers

log = logging.getLogger(__name__)

BEAT_S = 5.0  # how often systemd is told how it goes, unless its watchdog wants to hear more often
STOP_S = 15.0  # for what comes after the drain: nobody waits for a peer longer than a few seconds
STOPS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a daemon is made of."""

    workers: Workers
    clock: Clock
    files: Files


class Daemon(Protocol):
    """What runs. ``stop`` is called once, whatever happened before."""

    async def start(self) -> Mapping[str, str]:
        """Listen, begin to work; returns what is told on stdout."""

    async def reload(self) -> DaemonConfig:
        """Read the configuration again and do as it says; where that cannot be, raise ReplicatorError and go
        on as before.
        """

    async def drain(self) -> None:
        """Begin nothing new; returns when nothing is under way any more."""

    async def stop(self) -> None:
        """End what is under way, let go of everything."""

    def status(self) -> str:
        """How it goes, in a few words."""


class Notify:
    """What the service manager is told; nothing, where there is none."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier() if os.environ.get("NOTIFY_SOCKET") else None
        watched_by_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_us = int(os.environ.get("WATCHDOG_USEC", "0")) if watched_by_us else 0
        self.beat_s = min(BEAT_S, watchdog_us / 2 / 1e6) if watchdog_us else BEAT_S

    def tell(self, *lines: str) -> None:
        """Send these lines, as sd_notify(3) has them."""
        if self._notifier is not None:
            self._notifier.notify("\n".join(lines))


def run(
    make: Callable[[Parts], Daemon], config: DaemonConfig, announce: Callable[[Mapping[str, str]], None]
) -> None:
    """Run a daemon until it is told to end, which is an end as good as any.

    Raises:
        ReplicatorError: it could not start.
    """
    uvloop.run(_main(make, config, announce))


async def _main(
    make: Callable[[Parts], Daemon], config: DaemonConfig, announce: Callable[[Mapping[str, str]], None]
) -> None:
    gc.freeze()  # as lifecycle.py has it
    set_up(config.log)
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (*STOPS, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    with Workers() as workers:
        await serve(make(Parts(workers, Clock(), Files())), config, signals, Notify(), announce)


async def serve(
    daemon: Daemon,
    config: DaemonConfig,
    signals: asyncio.Queue[signal.Signals],
    notify: Notify,
    announce: Callable[[Mapping[str, str]], None],
) -> None:
    """A daemon's life, ruled by the signals that come."""
    beating: asyncio.Task[None] | None = None
    try:
        announce(await daemon.start())
        notify.tell("READY=1", f"STATUS={daemon.status()}")
        beating = asyncio.create_task(_beat(daemon, notify), name="watchdog")
        while await signals.get() not in STOPS:
            notify.tell("RELOADING=1")
            config = await _reload(daemon, config)
            notify.tell("READY=1", f"STATUS={daemon.status()}")
        longest_us = int((config.drain_s + STOP_S) * 1e6)
        notify.tell("STOPPING=1", "STATUS=draining", f"EXTEND_TIMEOUT_USEC={longest_us}")
        log.info("draining: what is under way has %g s", config.drain_s)
        await _drain(daemon, config.drain_s, signals)
    finally:
        await daemon.stop()
        if beating is not None:
            beating.cancel()
            await asyncio.wait([beating])
    log.info("stopped: everything that was acknowledged is durable")


async def _reload(daemon: Daemon, config: DaemonConfig) -> DaemonConfig:
    try:
        config = await daemon.reload()
    except ReplicatorError as error:
        log.error("the configuration stays as it was: %s", error)
        return config
    set_up(config.log)
    log.info("the configuration was read again: %s", daemon.status())
    return config


async def _drain(daemon: Daemon, within_s: float, signals: asyncio.Queue[signal.Signals]) -> None:
    """Until nothing is under way, the time is over or a second signal says that it is."""
    draining = asyncio.create_task(daemon.drain())
    ending = asyncio.create_task(_another_stop(signals))
    try:
        done, _ = await asyncio.wait(
            (draining, ending), timeout=within_s, return_when=asyncio.FIRST_COMPLETED
        )
        if draining in done:
            draining.result()
        else:
            log.warning("what is still under way is ended; it goes on after the next start")
    finally:
        for task in (draining, ending):
            task.cancel()
        await asyncio.wait((draining, ending))


async def _another_stop(signals: asyncio.Queue[signal.Signals]) -> None:
    while await signals.get() not in STOPS:
        log.info("draining: the configuration is not read again")


async def _beat(daemon: Daemon, notify: Notify) -> None:
    while True:
        notify.tell("WATCHDOG=1", f"STATUS={daemon.status()}")
        await asyncio.sleep(notify.beat_s)
