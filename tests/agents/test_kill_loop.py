"""kill -9 of either side in the middle of a send: it goes on, and sends again no more than the window.

What passes is counted by a proxy. What a kill has cost is known exactly: bytes that had passed, less those
that the target's journal or log of the epoch holds.
"""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from replicator.extents import Coverage
from tests.agents.harness import MIB, Process, Target, identical, make_disk, receiving, send, sending
from tests.agents.proxy import Proxy, proxy
from tests.agents.retention import durable

pytestmark = pytest.mark.peer("qemu-img")

WINDOW_BYTES = 48 * MIB
CONNECTING_BYTES = 128 * 1024  # handshakes and greetings of five streams: some 20 KiB; and what was in hand
ENVELOPE = 1.01  # TLS and frame headers


class Pair:
    """Both sides of a send, each of which can be killed and started again."""

    def __init__(self, folder: Path, source: Path, stack: ExitStack) -> None:
        self.source, self.state, self.directory = source, folder / "state", folder / "target"
        self._stack = stack
        self.target = self._receive("127.0.0.1:0")
        self.line: Proxy = stack.enter_context(proxy(self.target.port))
        self.sender: Process | None = None

    def start(self) -> Process:
        options = ("--compression", "off")
        token = self.target.token
        process = sending(
            self.source, self.line.address, self.state, *options, token=token, give_up_after_s=None
        )
        self.sender = self._stack.enter_context(process)
        return self.sender

    def kill_sender(self) -> None:
        assert self.sender is not None
        self.sender.signal(signal.SIGKILL)
        assert self.sender.wait().status == -signal.SIGKILL

    def kill_target(self) -> None:
        """Kill it, and start it again at the same address."""
        self.target.process.signal(signal.SIGKILL)
        assert self.target.process.wait().status == -signal.SIGKILL

    def start_target(self) -> None:
        self.target = self._receive(self.target.address)

    def _receive(self, listen: str) -> Target:
        return self._stack.enter_context(receiving(self.directory, listen=listen))

    def durable(self) -> Coverage:
        """What of the epoch under way is there after any crash."""
        return durable(self.directory / ".replicator", "disk")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    with ExitStack() as stack:
        yield lambda source: Pair(tmp_path, source, stack)


def finish(pair: Pair) -> dict:
    assert pair.sender is not None
    done = pair.sender.wait().ok
    assert done["fuzzy"] is False
    assert identical(pair.source, pair.directory / "disk.vmdk")
    return done


@pytest.mark.timeout(600)
def test_random_kills_of_either_side_cost_a_window_each_at_the_most(
    pair: Callable[..., Pair], tmp_path: Path, seed: int, count: Callable
) -> None:
    kills, size = count((20, 256 * MIB), (1000, 1024 * MIB))
    rng = random.Random(seed)
    print(f"seed {seed:#x}")
    both = pair(make_disk(tmp_path / "disk.img", size))
    both.start()
    lost = []
    for _ in range(kills):
        begun, held = both.line.passed, both.durable().covered_bytes
        more = rng.randrange(MIB // 16, size // kills)
        both.line.wait_passed(begun + more)
        if rng.random() < 0.5:
            both.kill_sender()
            passed = both.line.passed - begun
            both.start()
        else:
            both.kill_target()
            passed = both.line.passed - begun
            both.start_target()
        lost.append(max(0, passed - (both.durable().covered_bytes - held)))
        assert lost[-1] <= WINDOW_BYTES * ENVELOPE + CONNECTING_BYTES, lost
    finish(both)
    print(f"lost by each kill, KiB: {[each // 1024 for each in lost]}; passed in all: {both.line.passed}")
    assert both.line.passed <= size * ENVELOPE + sum(lost) + (kills + 1) * CONNECTING_BYTES


@pytest.mark.parametrize("side", ["sender", "target"])
@pytest.mark.parametrize("after", [32 * MIB, 150 * MIB, 250 * MIB])
def test_a_kill_costs_no_more_than_what_was_under_way(
    side: str, after: int, pair: Callable[..., Pair], tmp_path: Path
) -> None:
    """Exactly so many bytes have passed when it comes."""
    both = pair(make_disk(tmp_path / "disk.img", 256 * MIB))
    both.line.hold_after(after)
    both.start()
    both.line.wait_passed(after)
    if side == "sender":
        both.kill_sender()
        both.line.reset()  # what was held must not pass after all
        both.line.heal()
        both.start()
    else:
        both.kill_target()
        both.line.reset()
        both.line.heal()
        both.start_target()
    done = finish(both)
    again = both.line.passed - 256 * MIB * ENVELOPE
    print(f"{side} killed after {after // MIB} MiB: {again / MIB:.1f} MiB passed again")
    assert again <= min(after, WINDOW_BYTES) + 2 * CONNECTING_BYTES
    assert done["resent_bytes"] <= WINDOW_BYTES
    assert done["mode"] == "full"


@contextmanager
def equal_half(pair: Pair, size: int) -> Iterator[None]:
    """The disk is at the target, the sender has forgotten that, and the second half is another one now."""
    assert send(pair.source, pair.target.address, pair.state, token=pair.target.token).ok
    shutil.rmtree(pair.state / "groups")
    with pair.source.open("r+b") as file:
        file.seek(size // 2)
        for _ in range(size // 2 // MIB):
            file.write(random.randbytes(MIB))
    yield


@pytest.mark.parametrize("side", ["sender", "target"])
def test_a_resync_that_is_killed_does_not_compare_again_what_was_matched(
    side: str, pair: Callable[..., Pair], tmp_path: Path
) -> None:
    size, half = 384 * MIB, 192 * MIB
    both = pair(make_disk(tmp_path / "disk.img", size))
    with equal_half(both, size):
        both.line.hold_after(96 * MIB)
        both.start()
        both.line.wait_passed(96 * MIB)
        compared = both.line.answered
        (both.kill_sender if side == "sender" else both.kill_target)()
        held = both.durable()
        matched = half - sum(end - start for start, end in held.gaps(0, half))
        both.line.reset()
        both.line.heal()
        answered = both.line.answered
        if side == "sender":
            both.start()
        else:
            both.start_target()
        done = finish(both)
    written = WINDOW_BYTES  # and not noted in the journal yet: equal by now, in the other half
    # Of 192 MiB that are equal, the digests are 48 KiB.
    again = both.line.answered - answered
    print(f"matched before: {matched}, after: {done['matched_bytes']}; answers {compared}, then {again}")
    assert matched >= 0.9 * half
    if side == "sender":
        assert done["matched_bytes"] <= half - matched + written
    else:  # the same process: its counters are of both sessions
        assert done["matched_bytes"] <= half + (half - matched) + written
    assert again <= compared - 16 * 1024
    assert done["mode"] == "resync"
