"""One scenario: every contender, round after round, measured alike.

Before each run the destination is laid anew, everything dirty is written out, and source and destination are
read into the page cache. The clock runs from the start of the sending command to the end of all that has to
end and an fdatasync of the destination. Afterwards, untimed, the destination is compared with the source.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path

from bench import certificates, disk
from bench.contenders import Contender, Ends, Job
from bench.link import LinkSpec, link
from bench.namespaces import HostNetwork, Namespace, Network, free_port
from bench.processes import Crowd, CutOff, RunFailed
from bench.results import Run

PORT = 9443
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Place:
    """Where runs happen.

    Attributes:
        ends: the two ends. keys: certificates for them.
        wire: bytes carried so far: (both directions, towards the receiver or 0).
    """

    ends: Ends
    keys: Path
    wire: Callable[[], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is measured.

    Attributes:
        key: short name, in JSON. title: for tables. kind: full, resync or line.
        source, old: images, see ``Job``. size: of the source, bytes.
        contenders: who takes part. rounds: how often each. limit_s: for one run. budget_s: for all of it: no
            round is begun that would most likely end later, but the first.
        line: what the line is like; None is loopback.
    """

    key: str
    title: str
    kind: str
    source: Path
    old: Path | None
    size: int
    contenders: Sequence[Contender]
    rounds: int
    limit_s: float
    budget_s: float = inf
    line: LinkSpec | None = None


@contextmanager
def loopback(folder: Path, *, own: bool) -> Iterator[Place]:
    """The loopback of a namespace of its own, or (when that cannot be had) everybody's."""
    with ExitStack() as stack:
        network = stack.enter_context(Namespace()) if own else HostNetwork()
        ends = Ends(network, network, LOOPBACK, PORT if own else free_port())
        keys = certificates.make(folder / "keys", LOOPBACK)
        stack.callback(shutil.rmtree, keys)
        yield Place(ends, keys, _counted(network, ends.port))


def _counted(network: Network, port: int) -> Callable[[], tuple[int, int]]:
    """What a port carries on a loopback. Without nftables, what the loopback does: too much for those who
    also use it between their own processes (stunnel).
    """
    if network.own and shutil.which("nft") is not None:
        counters = network.count_port(port)
        return lambda: (sum(counters()), counters()[0])
    return lambda: (network.sent_bytes("lo"), 0)


@contextmanager
def over_line(folder: Path, spec: LinkSpec) -> Iterator[Place]:
    """A line between two namespaces."""
    with link(spec) as line:
        keys = certificates.make(folder / "keys", line.far_address)

        def wire() -> tuple[int, int]:
            counted = line.counters()
            return counted.out.bytes + counted.back.bytes, counted.out.bytes

        try:
            yield Place(Ends(line.near, line.far, line.far_address, PORT), keys, wire)
        finally:
            shutil.rmtree(keys)


def order(count: int, number: int) -> list[int]:
    """In which order ``count`` contenders run in round ``number``: each is first in its turn."""
    return [(number + place) % count for place in range(count)]


def rounds(
    scenario: Scenario, place: Place, folder: Path, say: Callable[[str], None]
) -> dict[str, list[Run]]:
    """All rounds: the runs of each contender, by its name. Who fails is not run again."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in scenario.contenders}
    began_s = time.monotonic()
    for number in range(scenario.rounds):
        spent_s = time.monotonic() - began_s
        if number and spent_s * (number + 1) / number > scenario.budget_s:
            say(f"{scenario.title}: {number} rounds have taken {spent_s:.0f} s: that must do")
            break
        for index in order(len(scenario.contenders), number):
            contender = scenario.contenders[index]
            done = runs[contender.name]
            if done and done[-1].problem is not None:
                continue
            done.append(measured(scenario, contender, place, folder, number))
            told = done[-1].problem or f"{done[-1].seconds:.2f} s"
            say(f"{scenario.title}, round {number + 1} of {scenario.rounds}: {contender.name}: {told}")
    return runs


def measured(scenario: Scenario, contender: Contender, place: Place, folder: Path, number: int) -> Run:
    """One run."""
    missing = contender.missing()
    if missing:
        return Run(number, problem=f"not installed: {', '.join(missing)}")
    room = folder / "room"
    room.mkdir()
    job = Job(scenario.source, scenario.old, room, place.ends, place.keys)
    try:
        return _run(scenario, contender, place, job, number)
    except RunFailed as error:
        return Run(number, problem=f"failed: {error}")
    except CutOff as error:
        return Run(number, problem=f"stopped: {error}")
    finally:
        shutil.rmtree(room)


def _run(scenario: Scenario, contender: Contender, place: Place, job: Job, number: int) -> Run:
    copy = contender.lay(job)
    os.sync()  # nobody shall pay for what another left dirty
    disk.warm(job.source)
    if job.old is not None:
        disk.warm(copy)
    with Crowd(job.room, scenario.limit_s) as crowd:
        contender.serve(job, crowd)
        wire, out = place.wire()
        crowd.begin()
        began_s = time.perf_counter()
        contender.send(job, crowd)
        _synced(copy)
        seconds = time.perf_counter() - began_s
        crowd.settle()
        wire_after, out_after = place.wire()
        costs = crowd.costs()
    problem = contender.check(job)
    different = disk.difference(job.source, copy)
    if different is not None:
        problem = f"wrong data: {different}"
    return Run(
        number, round(seconds, 4), wire_after - wire, out_after - out, costs.cpu_s, costs.peak_bytes, problem
    )


def _synced(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
