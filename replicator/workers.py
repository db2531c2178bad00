"""The only executor of ours: CPU and disk work leaves the event loop through here.

A call costs some 20 microseconds of hand-over (``concurrent.futures`` wrapped for asyncio: 50): pass work the
size of a frame, never of a block, and several steps of it as one function.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_THREADS = max(2, min(8, os.cpu_count() or 2)) + 2  # some of them wait for disks while others compute


class Workers:
    """A bounded set of threads. Use as a context manager; leaving waits for what is under way."""

    def __init__(self, threads: int = DEFAULT_THREADS) -> None:
        self.threads = threads
        self._calls: SimpleQueue[_Call[Any] | _Aside | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._closed = False

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking function in a thread and return what it returns.

        Cancelling the caller does not stop a call that has begun: what it uses (buffers, descriptors) must
        stay alive until it ends. So a cancelled caller first waits for the end, however often it is cancelled
        meanwhile, then passes the cancellation on; what the call returned or raised is lost. A call that has
        not begun never begins.
        """
        if self._closed:
            raise RuntimeError("no call is taken after the end")
        if len(self._threads) < self.threads:
            self._start_thread()
        call = _Call(asyncio.get_running_loop(), partial(function, *args, **kwargs))
        self._calls.put(call)
        try:
            return await call.answer
        except asyncio.CancelledError:
            if not call.claim():
                while not call.ended.is_set():
                    # A further cancellation changes nothing: the first is passed on below.
                    with suppress(asyncio.CancelledError):
                        await call.ended.wait()
            raise

    def begin(self, function: Callable[[], object]) -> Callable[[], None]:
        """Have a function run beside whoever calls, who is in a thread of ours already.

        Returns what waits for its end and raises what it raised. A function that no thread has got to by then
        runs there: so threads that wait for one another's are never stuck.
        """
        aside = _Aside(function)
        self._calls.put(aside)
        return aside.wait

    def close(self) -> None:
        """Wait for what is under way and end the threads. Idempotent."""
        self._closed = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_thread(self) -> None:
        # A daemon: whoever forgot to close must still be able to end.
        thread = Thread(target=self._serve, name=f"worker-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            if call.claim():
                call.run()
            del call  # while this thread waits, nothing of the call stays alive


class _Call(Generic[T]):
    """A function on its way through a thread; whoever claims it first, thread or caller, decides its fate."""

    __slots__ = ("_claimed", "_function", "_loop", "answer", "ended")

    def __init__(self, loop: asyncio.AbstractEventLoop, function: Callable[[], T]) -> None:
        self.answer: asyncio.Future[T] = loop.create_future()
        self.ended = asyncio.Event()
        self._loop = loop
        self._function: Callable[[], T] | None = function
        self._claimed = Lock()

    def claim(self) -> bool:
        """True for the first who asks: the thread may then run it, or the caller forget it."""
        return self._claimed.acquire(blocking=False)

    def run(self) -> None:
        """Run it in this thread; the answer comes in the event loop's."""
        function, self._function = self._function, None
        assert function is not None  # noqa: S101 - it was claimed once
        try:
            settle = partial(self._settle, function(), None)
        except BaseException as error:  # whatever it is, it is the caller's
            settle = partial(self._settle, None, error)
        del function  # what it was given is the caller's again, before the caller hears of it
        with suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(settle)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        self.ended.set()
        if self.answer.done():  # its caller was cancelled
            return
        if error is None:
            self.answer.set_result(result)
        else:
            self.answer.set_exception(error)


class _Aside:
    """A function that a thread runs for another; whoever claims it first of the two runs it."""

    __slots__ = ("_claimed", "_ended", "_error", "_function")

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._claimed = Lock()
        self._ended = Event()
        self._error: BaseException | None = None

    def claim(self) -> bool:
        """True for the first who asks: it has to run it."""
        return self._claimed.acquire(blocking=False)

    def run(self) -> None:
        """Run it here."""
        try:
            self._function()
        except BaseException as error:  # whatever it is, it is that of whoever waits
            self._error = error
        self._ended.set()

    def wait(self) -> None:
        """Until it has ended; raises what it raised, each time."""
        if self.claim():
            self.run()
        self._ended.wait()
        if self._error is not None:
            raise self._error
