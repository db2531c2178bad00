"""A line between two machines in one process: connections with latency, stalls, resets at any byte.

Each connection keeps its order and has its own latency, so that streams overtake one another. Not here: TLS;
who is at the ends is told as TLS would tell it.
"""

import asyncio
import random
import socket
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from protocol.state import Role
from replicator.errors import LinkError
from replicator.transport.stream import Stream
from replicator.transport.tls import ALPN_DATA
from tests.faults.oracle import Violation
from tests.faults.virtual_machine import Machine
from tests.faults.virtual_time import VirtualClock

CONNECT_S = 10.0
SILENCE_MAX_S = 16.5  # 15 s, and a tick
FIN, RST = b"FIN", b"RST"


class Parcel(NamedTuple):
    """Bytes that arrive not before `at_s`; or `FIN` or `RST` itself, which end the connection."""

    at_s: float
    data: bytes


class Shown:
    """What a peer shows in TLS."""

    def selected_alpn_protocol(self) -> str:
        return ALPN_DATA

    def getpeercert(self, binary_form: bool) -> bytes:
        return b"certificate"


class End(asyncio.Transport):
    """One end of a connection: what is written here arrives at `other`."""

    def __init__(self, line: "Line", protocol: Stream, latency_s: float) -> None:
        super().__init__()
        self.other: End = self
        self.over = False
        self.heard_s = line.loop.time()
        self._line = line
        self._protocol = protocol
        self._latency_s = latency_s
        self._parcels: deque[Parcel] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._under_way, self._high = 0, 1 << 16
        self._paused = self._closing = False
        self._reading = True

    # -- what a protocol calls ----

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"ssl_object": Shown(), "peername": ("line", 0), "socket": self._line.socket}.get(name)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high or self._high

    def get_write_buffer_size(self) -> int:
        return self._under_way

    def is_closing(self) -> bool:
        return self._closing

    def writelines(self, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        data = b"".join(pieces)
        if self._closing or not data:
            return
        self._under_way += len(data)
        for part in self._line.sliced(data):
            self._post(part)
        if self._under_way > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self.other._deliver()

    def close(self) -> None:
        if not self._closing:
            self._begin_to_close()
            self._post(FIN)

    def abort(self) -> None:
        if not self.over:
            self._parcels.clear()
            self._post(RST)
            self.lose(None)

    # -- what happens to it ----

    def lose(self, error: Exception | None) -> None:
        """It is over for this end."""
        if self.over:
            return
        if not self._closing:
            self._begin_to_close()
        self.over = True
        self._line.loop.call_soon(self._protocol.connection_lost, error)

    def _begin_to_close(self) -> None:
        self._closing = True
        if self._line.loop.time() - self.heard_s > SILENCE_MAX_S:
            self._line.violations.append(Violation(f"I6: silent since {self.heard_s:.1f} s, and not noticed"))

    def dead(self) -> None:
        """Nothing gets out any more, not even the end."""
        self._parcels.clear()
        self._line.ends.discard(self)

    def _post(self, data: bytes) -> None:
        if self in self._line.ends:
            last_s = self._parcels[-1].at_s if self._parcels else 0.0
            at_s = max(last_s, self._line.loop.time() + self._latency_s)
            self._parcels.append(Parcel(at_s, data))
            if len(self._parcels) == 1:
                self._deliver()

    def _deliver(self) -> None:
        """Hand over what has arrived, and come again for what has not."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._parcels and self.other._reading and not self.other.over:
            at_s, data = self._parcels[0]
            at_s = max(at_s, self._line.silent_until_s)
            if at_s > self._line.loop.time():
                self._timer = self._line.loop.call_at(at_s, self._deliver)
                return
            self._parcels.popleft()
            if data is FIN or data is RST:
                self.other.lose(ConnectionResetError() if data is RST else None)
                self.lose(None)
                return
            self._under_way -= len(data)
            self._hand_over(data)
            if self._paused and self._under_way <= self._high // 4 and not self.over:
                self._paused = False
                self._protocol.resume_writing()

    def _hand_over(self, data: bytes) -> None:
        passing = self._line.passing(len(data))
        rest = memoryview(data)[:passing]
        self.other.heard_s = self._line.loop.time()
        while rest and not self.other.over:
            into = self.other._protocol.get_buffer(-1)
            size = min(len(into), len(rest))
            into[:size] = rest[:size]
            self.other._protocol.buffer_updated(size)
            rest = rest[size:]
        if passing < len(data):
            self._line.cut()


class Line:
    """What lies between a sender and a machine.

    Attributes:
        ends: of the connections that are there.
        silent_until_s: nothing arrives before.
        breaks: so often it was cut or silent.
        violations: found at its ends.
    """

    def __init__(self, rng: random.Random, sock: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        self.socket = sock
        self.ends: set[End] = set()
        self.silent_until_s = 0.0
        self.violations: list[Violation] = []
        self.machine: Machine | None = None
        self._rng = rng
        self._cut_in: int | None = None

    async def dial(self) -> Stream:
        """A connection with the machine, if it is on and the line is there."""
        latency_s = self._rng.uniform(0.001, 0.1)
        await asyncio.sleep(2 * latency_s)
        if self.silent_until_s > self.loop.time():
            wait_s = self.silent_until_s - self.loop.time()
            await asyncio.sleep(min(wait_s, CONNECT_S))
            if wait_s > CONNECT_S:
                raise unreachable("link.unreachable")
        if self.machine is None or not self.machine.on:
            raise unreachable("link.refused")
        near = Stream(lambda _: Role.SENDER, VirtualClock())
        far = Stream(lambda _: Role.RECEIVER, VirtualClock(), self.machine.receiver.allocate)
        here, there = End(self, near, latency_s), End(self, far, latency_s)
        here.other, there.other = there, here
        self.ends |= {here, there}
        near.connection_made(here)
        far.connection_made(there)
        self.machine.accept(far)
        return near

    def cut_after(self, size: int) -> None:
        """Reset all connections in the middle of what passes, after so many bytes."""
        self._cut_in = size

    def cut(self) -> None:
        """Reset them now."""
        self._cut_in = None
        ends, self.ends = self.ends, set()
        for end in ends:
            end.lose(ConnectionResetError())

    def die(self) -> None:
        """The machine is off: of its connections nothing is heard any more."""
        for end in tuple(self.ends):
            end.dead()

    def sliced(self, data: bytes) -> list[bytes]:
        """In two pieces, anywhere."""
        at = self._rng.randrange(len(data))
        return [part for part in (data[:at], data[at:]) if part]

    def passing(self, size: int) -> int:
        """How many of the next bytes pass before the line is cut."""
        if self._cut_in is None:
            return size
        passing = min(size, self._cut_in)
        self._cut_in -= passing
        return passing


def unreachable(code: str) -> LinkError:
    return LinkError(code, "nobody is there", cause="the machine is off, or the line", fix="wait")
