"""Runs a coroutine as a process: uvloop, and signals that end it in order."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

from agents.cli.output import stopped_by

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end.

    Raises:
        Interrupted: SIGINT or SIGTERM came; ``main`` was cancelled and has cleaned up.
    """
    return uvloop.run(_until_signal(main))


async def _until_signal(main: Coroutine[Any, Any, T]) -> T:
    # Else the collector walks what imports left behind, again and again: a fifth of a receiver's time.
    gc.freeze()
    loop = asyncio.get_running_loop()
    task = loop.create_task(main)
    received: list[str] = []

    def stop(number: signal.Signals) -> None:
        received.append(number.name)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        raise stopped_by(received[0]) from None
