"""A line between two hosts of our own: two network namespaces, a TUN device in each, a forwarder between
them.

Use it as a context manager, or from a shell until Ctrl-C or the end of its input::

    with link(LinkSpec(rate_bit_s=100e6, round_trip_s=0.02)) as line:
        subprocess.run((*line.near.prefix, "ping", "-c1", line.far_address))

    python -m bench.link --rate-mbit 100 --round-trip-ms 20 --loss 0.01

Nothing outside the two namespaces is touched, and everything goes away with the forwarder's process, even if
it is killed: the devices with their descriptors, the namespaces with the processes that hold them (which end
when the forwarder does). Not here: how packets are timed (``forwarder.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError
from bench.forwarder import Counters, Forwarder, LineSpec, open_tun
from bench.namespaces import Namespace, Network

NEAR_ADDRESS, FAR_ADDRESS = "10.213.77.1", "10.213.77.2"
QUEUE_MIN_BYTES = 512 * 1024  # several bursts of 64 KiB, whatever the rate
UNLIMITED_QUEUE_BYTES = 64 * 1024 * 1024
TRANSMIT_QUEUE_PACKETS = 10_000  # of the devices: what is dropped shall be dropped by the model
START_S = 20.0


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """What the line is like.

    Attributes:
        rate_bit_s: each way; 0 is as fast as the forwarder.
        round_trip_s: half of it is spent each way.
        loss: chance of each packet to be lost, each way; switches segmentation offload off.
        seed: of the losses.
        mtu: of the devices, bytes.
        queue_bytes: what may wait before each transmitter; 0 is one bandwidth-delay product, but 512 KiB at
            least.
        congestion: default TCP congestion control of both ends; empty is the machine's.
    """

    rate_bit_s: float = 0.0
    round_trip_s: float = 0.0
    loss: float = 0.0
    seed: int = 1
    mtu: int = 1500
    queue_bytes: int = 0
    congestion: str = ""

    def direction(self, number: int) -> LineSpec:
        """One of the two directions, 0 or 1; their losses are independent."""
        rate = self.rate_bit_s / 8
        room = max(QUEUE_MIN_BYTES, round(rate * self.round_trip_s)) if rate else UNLIMITED_QUEUE_BYTES
        return LineSpec(
            rate, self.round_trip_s / 2, self.queue_bytes or room, self.loss, 2 * self.seed + number
        )


@dataclass(frozen=True, slots=True)
class LinkCounters:
    """Both directions, from near to far and back."""

    out: Counters
    back: Counters


class Link:
    """A line that is up.

    Attributes:
        near, far: the two network stacks. near_address, far_address: theirs on the line.
        device: the near end's. pids: of the processes that hold the namespaces. forwarder_pid: of the line.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        told = _line(process)
        self.near, self.far = (
            Network(told[side], ("nsenter", f"--net=/proc/{told[side]}/ns/net", "--"))
            for side in ("near", "far")
        )
        self.near_address, self.far_address = NEAR_ADDRESS, FAR_ADDRESS
        self.device: str = told["device"]
        self.pids: tuple[int, int] = (told["near"], told["far"])
        self.forwarder_pid = process.pid
        self._process = process

    def counters(self) -> LinkCounters:
        """What the line has carried so far."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"stats\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError("the line's forwarder has ended") from None
        told = _line(self._process)
        return LinkCounters(Counters(**told["out"]), Counters(**told["back"]))


@contextmanager
def link(spec: LinkSpec) -> Iterator[Link]:
    """A line for the time of a block.

    Raises:
        BenchError: it cannot be made: it takes root, /dev/net/tun, util-linux and iproute2.
    """
    arguments = [
        "--rate-mbit", str(spec.rate_bit_s / 1e6), "--round-trip-ms", str(spec.round_trip_s * 1e3),
        "--loss", str(spec.loss), "--seed", str(spec.seed), "--mtu", str(spec.mtu),
        "--queue-bytes", str(spec.queue_bytes), "--congestion", spec.congestion,
    ]  # fmt: skip
    command = (sys.executable, "-m", "bench.link", *arguments)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Link(process)
        finally:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()


def _line(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], START_S)[0]:
        raise BenchError(f"the line's forwarder has said nothing for {START_S:.0f} s")
    try:
        told: dict[str, Any] = json.loads(process.stdout.readline())
    except ValueError:
        raise BenchError("the line's forwarder has ended; its reason stands above") from None
    if "error" in told:
        raise BenchError(told["error"])
    return told


# ------------------------------------------------------------------ the forwarder's process


def main() -> None:
    """``python -m bench.link``: the first line on stdout says in JSON where the two ends are."""
    spec = _parsed(sys.argv[1:])
    signal.signal(signal.SIGTERM, _stop)
    with suppress(KeyboardInterrupt):
        try:
            _serve(spec)
        except (BenchError, OSError) as error:
            _say({"error": f"no line can be made: {error}"})
            sys.exit(1)


def _serve(spec: LinkSpec) -> None:
    # The names are unique by our process id; each is seen in its own namespace, and for a moment in ours.
    names = (f"line{os.getpid()}n", f"line{os.getpid()}f")
    with Namespace() as near, Namespace() as far:
        tuns = [_device(name, side, spec) for name, side in zip(names, (near, far), strict=True)]
        try:
            _address(near, names[0], NEAR_ADDRESS, FAR_ADDRESS, spec.congestion)
            _address(far, names[1], FAR_ADDRESS, NEAR_ADDRESS, spec.congestion)
            _say({"near": near.pid, "far": far.pid, "device": names[0], "near_address": NEAR_ADDRESS,
                  "far_address": FAR_ADDRESS, "far_device": names[1]})  # fmt: skip
            Forwarder(tuns[0], tuns[1], spec.direction(0), spec.direction(1)).run(sys.stdin.fileno(), _say)
        finally:
            for tun in tuns:
                os.close(tun)


def _device(name: str, side: Namespace, spec: LinkSpec) -> int:
    """A TUN device in the namespace, up."""
    tun = open_tun(name, offload=not spec.loss)
    try:
        done = subprocess.run(
            ("ip", "link", "set", name, "netns", str(side.pid)), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchError(done.stderr.strip())
        # Without IPv6 nothing but what is sent takes part in the seeded losses.
        side.run("ip", "link", "set", name, "addrgenmode", "none", "mtu", str(spec.mtu),
                 "txqueuelen", str(TRANSMIT_QUEUE_PACKETS), "up")  # fmt: skip
    except BenchError:
        os.close(tun)
        raise
    return tun


def _address(side: Namespace, device: str, own: str, other: str, congestion: str) -> None:
    side.run("ip", "address", "add", own, "peer", other, "dev", device)
    if congestion:
        # By route: the setting of a namespace takes only those that the machine allows to all users.
        side.run("ip", "route", "replace", other, "dev", device, "src", own, "congctl", congestion)


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _parsed(arguments: list[str]) -> LinkSpec:
    parser = argparse.ArgumentParser(prog="python -m bench.link", description=__doc__.partition("\n")[0])
    parser.add_argument("--rate-mbit", type=float, default=0.0, help="each way; 0: no limit")
    parser.add_argument("--round-trip-ms", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0, help="chance of each packet, 0 to 1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--queue-bytes", type=int, default=0, help="0: one bandwidth-delay product")
    parser.add_argument("--congestion", default="", help="of TCP at both ends; empty: the machine's")
    given = parser.parse_args(arguments)
    return LinkSpec(
        given.rate_mbit * 1e6, given.round_trip_ms / 1e3, given.loss, given.seed, given.mtu,
        given.queue_bytes, given.congestion,
    )  # fmt: skip


if __name__ == "__main__":
    main()
