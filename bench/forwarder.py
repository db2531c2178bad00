"""The line itself: packets from one TUN device to the other, after the time that a real line would take.

``LineModel`` decides (pure: time comes in), ``Forwarder`` moves packets. Each direction is a transmitter of a
fixed rate behind a queue of bounded size (tail drop), then a fixed delay. Seeded loss hits packets one by
one, independently, as they leave the queue. What arrives late because this process was late is not corrected;
the rate is exact over time all the same, since it is counted and not slept.

With segmentation offload the kernel hands over up to 64 KiB of one TCP connection at once, as it does to a
network card; rate and counters charge for every segment's headers. Loss and offload exclude one another: a
lost packet shall be one segment.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from random import Random
from typing import Final

TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
IFF_TUN_NO_PI: Final = 0x1001
IFF_VNET_HDR: Final = 0x4000
OFFLOADS: Final = 0x01 | 0x02  # TUN_F_CSUM | TUN_F_TSO4
VNET_HEADER: Final = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
READ_BYTES: Final = VNET_HEADER.size + 65536
A_TURN: Final = 64  # packets read from one side before the other is looked at


@dataclass(slots=True)
class Counters:
    """One direction of a line: bytes and packets that were put on it (headers of every segment counted),
    those of it that were lost by the seeded loss, and the packets for which the queue had no room.
    """

    bytes: int = 0
    packets: int = 0
    lost: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class LineSpec:
    """One direction.

    Attributes:
        rate_bytes_s: of the transmitter; 0 is without limit.
        delay_s: from the end of sending to arrival.
        queue_bytes: what may wait for the transmitter; more is dropped.
        loss: chance of a packet to be lost. seed: of that chance.
    """

    rate_bytes_s: float
    delay_s: float
    queue_bytes: int
    loss: float = 0.0
    seed: int = 0


class LineModel:
    """When each packet arrives, if it does."""

    def __init__(self, spec: LineSpec) -> None:
        self.counters = Counters()
        self._spec = spec
        self._random = Random(spec.seed)
        self._free_at_s = 0.0

    def offer(self, size: int, packets: int, now_s: float) -> float | None:
        """A packet of ``size`` bytes on the wire comes; when it arrives, or None when it never does."""
        spec, counters = self._spec, self.counters
        waiting_s = max(0.0, self._free_at_s - now_s)
        if waiting_s * spec.rate_bytes_s + size > spec.queue_bytes:
            counters.dropped += packets
            return None
        if spec.rate_bytes_s:
            self._free_at_s = now_s + waiting_s + size / spec.rate_bytes_s
        counters.bytes += size
        counters.packets += packets
        if spec.loss and self._random.random() < spec.loss:
            counters.lost += packets
            return None
        return max(now_s, self._free_at_s) + spec.delay_s


def wire_size(packet: bytes) -> tuple[int, int]:
    """(bytes on the wire, segments) of what a TUN device with a vnet header gave us."""
    _, kind, _, segment_bytes, tcp_at, _ = VNET_HEADER.unpack_from(packet)
    size = len(packet) - VNET_HEADER.size
    if not kind or not segment_bytes:
        return size, 1
    headers = tcp_at + (packet[VNET_HEADER.size + tcp_at + 12] >> 4) * 4
    segments = -(-(size - headers) // segment_bytes)
    return size + (segments - 1) * headers, segments


def open_tun(name: str, *, offload: bool) -> int:
    """A TUN device of our network namespace; gone when the descriptor is closed. ``OSError``."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS if offload else 0)
    except OSError:
        os.close(fd)
        raise
    return fd


class _Direction:
    """Packets under way from one device to the other."""

    def __init__(self, source: int, target: int, model: LineModel) -> None:
        self.source = source
        self._target = target
        self._model = model
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self, now_s: Callable[[], float]) -> None:
        for _ in range(A_TURN):
            try:
                packet = os.read(self.source, READ_BYTES)
            except BlockingIOError:
                return
            arrives_s = self._model.offer(*wire_size(packet), now_s())
            if arrives_s is not None:
                self._under_way.append((arrives_s, packet))

    def give(self, now_s: float) -> float | None:
        """Deliver what is due; seconds until the next packet is."""
        under_way = self._under_way
        while under_way and under_way[0][0] <= now_s:
            _, packet = under_way.popleft()
            with suppress(OSError):  # the other end is down: lost, as on a line
                os.write(self._target, packet)
        return under_way[0][0] - now_s if under_way else None


class Forwarder:
    """Moves packets between two TUN devices, ``near`` and ``far``, until ``control`` reaches its end.

    A line ``stats`` on ``control`` is answered by ``answer`` with the counters of both directions.
    """

    def __init__(self, near: int, far: int, out: LineSpec, back: LineSpec) -> None:
        self._out, self._back = LineModel(out), LineModel(back)
        self._directions = (_Direction(near, far, self._out), _Direction(far, near, self._back))

    def run(self, control: int, answer: Callable[[dict[str, dict[str, int]]], None]) -> None:
        """Forward. Blocks until the end of ``control``."""
        by_source = {direction.source: direction for direction in self._directions}
        clock = time.monotonic
        while True:
            due = [left for direction in self._directions if (left := direction.give(clock())) is not None]
            readable, _, _ = select.select((control, *by_source), (), (), max(0.0, min(due)) if due else None)
            for fd in readable:
                if fd != control:
                    by_source[fd].take(clock)
                    continue
                asked = os.read(control, 4096)
                if not asked:
                    return
                for _ in range(asked.count(b"\n")):
                    answer({"out": asdict(self._out.counters), "back": asdict(self._back.counters)})
