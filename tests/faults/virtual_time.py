"""An event loop whose time is that of its timers: nobody waits for real, and a seed gives the same again.

With it, workers that do at once what they are given, after and before a while, and a clock of that time.
"""

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any, ParamSpec, TypeVar, cast

from replicator.clock import Clock
from tests.faulty_files import PowerCut

P = ParamSpec("P")
T = TypeVar("T")

BEGIN = datetime(2024, 1, 1, tzinfo=UTC)
TURN_S = 1e-6  # less, and a deadline that rounding has moved would never come
LIFE_MAX_S = 3600.0
WORK_S = 0.002  # a call takes about so long

Tasks = set["asyncio.Task[Any]"]
MACHINE: ContextVar[Tasks | None] = ContextVar("MACHINE", default=None)
"""Where the tasks of the machine that runs now are kept: they end with it."""


class _Jumping(selectors.DefaultSelector):
    """Instead of waiting, time passes; and a little with every turn of the loop, as it does."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing will ever happen again")
        self.now_s += timeout + TURN_S
        if self.now_s > LIFE_MAX_S:
            raise RuntimeError("it never ends")
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time begins at 0 and jumps to the next timer when nothing else is left to do."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)
        self.set_task_factory(cast(Any, _of_its_machine))

    def time(self) -> float:
        return self._jumping.now_s

    def end(self) -> None:
        """Nothing of what a failed test left goes on."""
        self._jumping.now_s = 0.0
        while tasks := asyncio.all_tasks(self):
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.wait(tasks, timeout=1.0))


def _of_its_machine(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T], context: Context | None = None
) -> "asyncio.Task[T]":
    task = asyncio.Task(coroutine, loop=loop, context=context)
    tasks = MACHINE.get() if context is None else context.get(MACHINE)
    if tasks is not None:
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    return task


class VirtualClock(Clock):
    """The time of the loop that runs."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=self.monotonic_s())


class VirtualWorkers:
    """`Workers` whose calls are done at once: some time after they were asked for, some before it is told.

    Attributes:
        off: set when the power was cut in one: it never ends, nor does any after it.
    """

    threads = 2

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.off = asyncio.Event()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        await asyncio.sleep(self._rng.expovariate(1 / WORK_S))
        try:
            done = function(*args, **kwargs)
        except PowerCut:
            self.off.set()
            await asyncio.get_running_loop().create_future()
            raise
        await asyncio.sleep(self._rng.expovariate(1 / WORK_S))
        return done

    def begin(self, function: Callable[[], object]) -> Callable[[], None]:
        function()
        return lambda: None
