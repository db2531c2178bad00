"""The pool of credit: nothing is lost or made, nobody starves, and every growth is told."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from replicator.credit_pool import LARGEST_FRAME_BYTES, CreditPool, Share
from tests.replicator.pipeline import MIB

TOTALS = st.integers(2 * LARGEST_FRAME_BYTES, 200 * MIB)


def joined(pool: CreditPool) -> Share:
    """A share of a pool that has one."""
    share = pool.join()
    assert share is not None
    return share


class Session:
    """A share with what its sender was told and has used."""

    def __init__(self, share: Share) -> None:
        self.used = 0
        self.share = share
        self.share.announce = self._announce
        self.told = self.share.window.granted
        self.released = 0

    def _announce(self) -> None:
        assert self.share.window.granted > self.told, "announced without news"
        self.told = self.share.window.granted

    def receive(self, size: int) -> None:
        self.share.window.charge(size)
        self.used += size

    def release(self, size: int) -> None:
        self.used -= size
        self.released += size
        self.share.release(size)


class Pool(RuleBasedStateMachine):
    """Sessions come, receive, make durable and go, in any order."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.pool: CreditPool | None = None
        self.live: list[Session] = []
        self.total = 0

    @precondition(lambda self: self.pool is None)
    @rule(total=TOTALS)
    def begin(self, total: int) -> None:
        self.total, self.pool = total, CreditPool(total)

    @precondition(lambda self: self.pool is not None)
    @rule(target=sessions)
    def join(self) -> Session | None:
        assert self.pool is not None
        free = self.pool._free
        share = self.pool.join()
        assert (share is None) == (free < LARGEST_FRAME_BYTES)
        if share is None:
            return None
        made = Session(share)
        self.live.append(made)
        return made

    @rule(session=sessions, part=st.floats(0, 1))
    def receive(self, session: Session | None, part: float) -> None:
        if session is not None:
            room = session.share.window.granted - session.share.window.received
            session.receive(int(room * part))

    @rule(session=sessions, part=st.floats(0, 1))
    def release(self, session: Session | None, part: float) -> None:
        if session is not None:
            session.release(int(session.used * part))

    @rule(session=consumes(sessions))
    def leave(self, session: Session | None) -> None:
        if session is not None:
            assert self.pool is not None
            self.pool.leave(session.share)
            self.live.remove(session)

    @invariant()
    def nothing_is_lost_or_made(self) -> None:
        if self.pool is not None:
            held = [session.share.held for session in self.live]
            assert sum(held) + self.pool._free == self.total
            assert self.pool._free >= 0

    @invariant()
    def everybody_can_always_send_a_largest_frame_once_all_is_durable(self) -> None:
        for session in self.live:
            assert session.share.held >= LARGEST_FRAME_BYTES

    @invariant()
    def what_is_held_is_what_was_granted_and_is_not_durable(self) -> None:
        for session in self.live:
            assert session.share.held == session.share.window.granted - session.released
            assert session.share.held >= session.used
            assert session.told == session.share.window.granted


TestPool = Pool.TestCase


@given(total=TOTALS)
def test_a_lone_session_gets_half(total: int) -> None:
    share = joined(CreditPool(total))
    assert share.window.granted == share.held == max(LARGEST_FRAME_BYTES, total // 2)


def test_several_newcomers_find_something_before_the_first_gives_anything_back() -> None:
    pool = CreditPool(96 * MIB)
    shares = [joined(pool) for _ in range(5)]
    assert all(share.held >= LARGEST_FRAME_BYTES for share in shares)
    assert shares[0].held == 48 * MIB


async def test_who_finds_no_credit_waits_and_the_first_is_served_first() -> None:
    pool = CreditPool(2 * LARGEST_FRAME_BYTES)
    first, second = await pool.enter(), await pool.enter()
    third, fourth = (asyncio.create_task(pool.enter()) for _ in range(2))
    await asyncio.sleep(0)
    assert not third.done()
    pool.leave(second)
    share = await third
    assert share.held == first.held == LARGEST_FRAME_BYTES and not fourth.done()
    pool.leave(first)
    assert (await fourth).held == LARGEST_FRAME_BYTES


async def crowded() -> tuple[CreditPool, list[Share], asyncio.Task[Share]]:
    """A pool that has nothing left for a newcomer, its shares, the largest first, and one who waits."""
    pool = CreditPool(96 * MIB)
    shares = []
    while (share := pool.join()) is not None:
        shares.append(share)
    waiting = asyncio.create_task(pool.enter())
    await asyncio.sleep(0)
    assert not waiting.done()
    return pool, shares, waiting


async def test_who_waits_comes_before_those_who_want_more() -> None:
    pool, shares, waiting = await crowded()
    held = [share.held for share in shares[1:]]
    while pool._free + MIB < LARGEST_FRAME_BYTES:
        shares[0].release(MIB)
        assert [share.held for share in shares[1:]] == held
    shares[0].release(MIB)
    assert (await waiting).held >= LARGEST_FRAME_BYTES


async def test_whom_nobody_waits_behind_any_more_gets_more() -> None:
    _, shares, waiting = await crowded()
    waiting.cancel()
    await asyncio.wait([waiting])
    before = shares[-1].held
    for _ in range(32):
        shares[0].release(MIB)
    assert shares[-1].held > before


@pytest.mark.parametrize("served", [False, True])
async def test_who_gives_up_waiting_leaves_nothing_behind(served: bool) -> None:
    pool = CreditPool(2 * LARGEST_FRAME_BYTES)
    shares = [await pool.enter(), await pool.enter()]
    gone, patient = (asyncio.create_task(pool.enter()) for _ in range(2))
    await asyncio.sleep(0)
    if served:  # its turn has come, and it has not heard of it
        pool.leave(shares.pop())
    gone.cancel()
    await asyncio.wait([gone])
    assert gone.cancelled()
    if not served:
        pool.leave(shares.pop())
    pool.leave(await patient)
    assert pool._free == LARGEST_FRAME_BYTES


@given(total=st.integers(96 * MIB, 200 * MIB), churn=st.integers(1, 5), seed=st.randoms())
def test_busy_sessions_end_up_with_equal_parts_and_leave_one_for_the_next(total, churn, seed) -> None:
    pool = CreditPool(total)
    shares = [joined(pool) for _ in range(churn)]
    for share in seed.sample(shares, len(shares) // 2):
        pool.leave(share)
        shares.remove(share)
    part = max(LARGEST_FRAME_BYTES, total // (len(shares) + 1))
    for _ in range(2):
        for share in shares:
            share.release(share.held)  # all that it had is durable
    assert {share.held for share in shares} == {part}
    assert pool._free == total - part * len(shares)


def test_a_session_does_not_starve_beside_ones_that_hold_and_do_nothing() -> None:
    pool = CreditPool(96 * MIB)
    idle = [joined(pool) for _ in range(4)]
    told: list[int] = []
    busy = joined(pool)
    busy.announce = lambda: told.append(busy.window.granted)
    received = 0
    for _ in range(1000):  # frames of a MiB: it gets its credit back again and again
        busy.window.charge(MIB)
        received += MIB
        busy.release(MIB)
        assert busy.window.granted - received >= LARGEST_FRAME_BYTES
    assert told[-1] == busy.window.granted
    assert all(share.held >= LARGEST_FRAME_BYTES for share in idle)


def test_those_who_leave_make_the_others_grow_and_it_is_told() -> None:
    pool = CreditPool(96 * MIB)
    told: list[str] = []
    first, second = joined(pool), joined(pool)
    first.announce = lambda: told.append("first")
    second.announce = lambda: told.append("second")
    assert second.held < 48 * MIB
    pool.leave(first)
    assert told == ["second"] and second.held == 48 * MIB
    assert first.held == 0


def test_a_pool_for_less_than_two_frames_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="cannot hold two frames"):
        CreditPool(2 * LARGEST_FRAME_BYTES - 1)
