"""Many disks at once through one pair of processes: what memory that takes, and whether all are served."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from agents.config import AT_ONCE
from bench import disk, ours
from bench.contenders import Ends, Job
from bench.errors import BenchError
from bench.log.figures import Figure, Unit
from bench.micro import sample_frames
from bench.options import MIB, LogSizes
from bench.processes import Costs, Crowd

LIMIT_S = 300.0
SENDERS, RECEIVER = "senders", "replicator receive"
WANTED_BYTES = 512 * MIB
WANTED_SPREAD = 3.0


def measure(sizes: LogSizes, seed: int, folder: Path, ends: Ends, say: Callable[[str], None]) -> list[Figure]:
    """The figures, of disks that are all due at the same moment: memory of each side, and the slowest disk
    beside the median. Once so many are sent at a time as a process server takes by itself, once all of them.

    Raises:
        BenchError, RunFailed: it does not work.
    """
    folder.mkdir()
    sources = list(_sources(folder, sizes, seed))
    figures: list[Figure] = []
    for at_once in (AT_ONCE, len(sources)):
        room = folder / f"{at_once}-at-once"
        found, costs = _sent(ours.new(room, ends), sources, at_once)
        what = f"{len(sources)} disks due, {at_once} at a time"
        last_s = max(found["seconds"])
        say(f"{what}: {last_s:.1f} s; {len(found['waits'])} times one was refused and tried again")
        figures += _figures(what, found, costs)
        shutil.rmtree(room)
    return figures


def _sent(job: Job, sources: Sequence[Path], at_once: int) -> tuple[dict[str, Any], Costs]:
    """What the senders tell, and what it cost."""
    ends = job.ends
    said = job.room / "senders.json"
    os.sync()
    with Crowd(job.room, LIMIT_S) as crowd:
        ours.receive(job, crowd)
        crowd.begin()
        ours.send(job, crowd, name=ours.FIRST_DISK)  # joins: of many at once, one alone could use the token
        command: list[str | Path] = [
            sys.executable, "-m", "bench.log.senders", str(at_once), f"{ends.address}:{ends.port}",
            job.room / ours.STATE, job.room / ours.TOKEN, *sources,
        ]  # fmt: skip
        with said.open("wb") as output:
            crowd.finish(crowd.start(SENDERS, command, stdout=output))
        costs = crowd.costs()
    for source in sources:
        problem = disk.difference(source, ours.flat(job.room, source.stem))
        if problem is not None:
            raise BenchError(f"{source.stem} came over as another disk: {problem}")
    found: dict[str, Any] = json.loads(said.read_bytes())
    return found, costs


def _figures(what: str, found: dict[str, Any], costs: Costs) -> Iterator[Figure]:
    for side, name in (("sending", SENDERS), ("receiving", RECEIVER)):
        peak = costs.peak_bytes[name]
        yield Figure(f"{what}: peak memory, {side}", peak, Unit.BYTES, WANTED_BYTES)
    seconds = sorted(found["seconds"])
    runs = {"done after, s": seconds, "refused": [len(found["waits"])]}
    spread = seconds[-1] / median(seconds)
    yield Figure(f"{what}: slowest, by the median", spread, Unit.RATIO, WANTED_SPREAD, runs=runs)
    yield Figure(f"{what}: the last one done after", seconds[-1], Unit.SECONDS)


def _sources(folder: Path, sizes: LogSizes, seed: int) -> Iterator[Path]:
    """Disks full of content that can be compressed, no two of them alike."""
    frames = sample_frames()
    random = Random(seed)
    for number in range(sizes.disks):
        path = folder / f"disk{number:02d}.img"
        with path.open("wb") as file:
            for _ in range(sizes.disk_bytes // MIB):
                file.write(random.choice(frames))
        yield path
