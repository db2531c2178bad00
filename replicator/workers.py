"""The only executor of ours: CPU and disk work leaves the event loop through here.

A call costs some 50 microseconds of hand-over: pass work the size of a frame, never of a block.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_THREADS = max(2, min(8, os.cpu_count() or 2)) + 2  # some of them wait for disks while others compute


class Workers:
    """A bounded set of threads. Use as a context manager; leaving waits for what is under way."""

    def __init__(self, threads: int = DEFAULT_THREADS) -> None:
        self.threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="worker")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking function in a thread and return what it returns.

        Cancelling the caller does not stop a call that has begun: what it uses (buffers, descriptors) must
        stay alive until it ends. So a cancelled caller first waits for the end, however often it is cancelled
        meanwhile, then passes the cancellation on; what the call returned or raised is lost. A call that has
        not begun never begins.
        """
        call = self._executor.submit(function, *args, **kwargs)
        try:
            return await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            # The future has passed the cancellation on: ``call`` is over if it had not begun.
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            call.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
            while not ended.is_set():
                # A further cancellation changes nothing: the first is passed on below.
                with suppress(asyncio.CancelledError):
                    await ended.wait()
            raise

    def close(self) -> None:
        """Wait for what is under way and end the threads."""
        self._executor.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
