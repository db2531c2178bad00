"""A cancelled caller waits for its call, however often it is cancelled; results and errors come through."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from replicator.workers import Workers


class Held:
    """A blocking call that says when it began and ends when it is let."""

    def __init__(self, outcome: Callable[[], object] = lambda: None) -> None:
        self.begun = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.let = threading.Event()
        self.ended = False
        self.outcome = outcome

    def __call__(self) -> object:
        self.loop.call_soon_threadsafe(self.begun.set)
        assert self.let.wait(60)
        self.ended = True
        return self.outcome()


async def turns(number: int = 20) -> None:
    """Let everything that is ready run."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_call_returns_what_the_function_returns_from_another_thread() -> None:
    with Workers(1) as workers:
        assert await workers.run(divmod, 7, 2) == (3, 1)
        assert await workers.run(sorted, [1, 2], reverse=True) == [2, 1]
        assert await workers.run(threading.get_ident) != threading.get_ident()


async def test_an_exception_passes_as_it_is() -> None:
    with Workers(1) as workers:
        with pytest.raises(FileNotFoundError) as caught:
            await workers.run(open, "/nonexistent/file")
        assert caught.value.filename == "/nonexistent/file"


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_a_cancelled_caller_waits_until_its_call_has_ended(times: int) -> None:
    with Workers(1) as workers:
        held = Held()
        caller = asyncio.create_task(workers.run(held))
        await held.begun.wait()
        for _ in range(times):
            caller.cancel()
            await turns()
            assert not caller.done()
        held.let.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert held.ended
        assert caller.cancelling() == times


async def test_the_exception_of_an_abandoned_call_is_neither_raised_nor_complained_about() -> None:
    complaints: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    with Workers(1) as workers:
        held = Held(lambda: 1 // 0)
        caller = asyncio.create_task(workers.run(held))
        await held.begun.wait()
        caller.cancel()
        await turns()
        held.let.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        del caller
        await turns()
    assert complaints == []


async def test_a_call_that_has_not_begun_never_begins_once_its_caller_is_cancelled() -> None:
    with Workers(1) as workers:
        first, never = Held(), Held()
        running = asyncio.create_task(workers.run(first))
        await first.begun.wait()
        waiting = asyncio.create_task(workers.run(never))
        await turns()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not running.done()
        first.let.set()
        await running
        await workers.run(int)
        assert not never.begun.is_set()


async def test_a_timeout_around_a_call_is_told_as_a_timeout_after_the_call() -> None:
    with Workers(1) as workers:
        held = Held()
        task = asyncio.create_task(workers.run(held))
        await held.begun.wait()
        asyncio.get_running_loop().call_later(0.02, held.let.set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await task
        assert held.ended


async def test_no_more_calls_run_at_once_than_there_are_threads() -> None:
    with Workers(2) as workers:
        held = [Held() for _ in range(3)]
        callers = [asyncio.create_task(workers.run(one)) for one in held]
        await held[0].begun.wait()
        await held[1].begun.wait()
        await turns()
        assert not held[2].begun.is_set()
        held[0].let.set()
        await held[2].begun.wait()
        for one in held:
            one.let.set()
        await asyncio.gather(*callers)


async def test_leaving_waits_for_what_is_under_way() -> None:
    held = Held()
    with Workers(1) as workers:
        caller = asyncio.create_task(workers.run(held))
        await held.begun.wait()
        threading.Timer(0.02, held.let.set).start()
    assert held.ended
    await caller


async def test_nothing_is_taken_after_the_end() -> None:
    workers = Workers(1)
    workers.close()
    workers.close()
    with pytest.raises(RuntimeError):
        await workers.run(int)


async def test_what_is_begun_in_a_thread_runs_beside_it() -> None:
    def both(workers: Workers) -> int:
        met = threading.Barrier(2, timeout=60)
        other: list[int] = []

        def aside() -> None:
            met.wait()
            other.append(threading.get_ident())

        wait = workers.begin(aside)
        met.wait()
        wait()
        return other[0]

    with Workers(2) as workers:
        held = Held()
        busy = asyncio.create_task(workers.run(held))
        await held.begun.wait()
        held.let.set()
        await busy  # there are two threads from now on
        assert await workers.run(both, workers) != threading.get_ident()


async def test_threads_that_begin_something_are_never_stuck() -> None:
    """There is one thread, and it waits: it runs what it waits for."""
    with Workers(1) as workers:
        ran = threading.Event()

        def both() -> None:
            workers.begin(ran.set)()

        await workers.run(both)
        assert ran.is_set()


async def test_what_was_raised_beside_is_raised_for_whoever_waits() -> None:
    def fails(workers: Workers) -> None:
        wait = workers.begin(lambda: 1 // 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                wait()

    with Workers(1) as workers:
        await workers.run(fails, workers)
