"""Whether the size of a disk costs anything: as much changed on two sparse disks, one of them vast.

Whole commands. The same stretches of a MiB are written anew before each send, at random places of each disk,
so that both disks hold as much data as change, before and after. Once the sender is told what changed, once
it finds that out with the digest map of the epoch before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

from bench import disk, ours
from bench.contenders import Ends, Job
from bench.errors import BenchError
from bench.log.figures import Figure, Unit
from bench.log.known import listed
from bench.options import GIB, MIB, LogSizes
from bench.processes import Crowd

LIMIT_S = 600.0
WANTED = 1.2
LISTED, MAPPED = "known", "by digest map"
CONTENT_BYTES = 32 * MIB


@dataclass(slots=True)
class Vast:
    """A sparse disk. ``places``: of its stretches, in MiB; ``epoch``: of its last send."""

    name: str
    job: Job
    places: Sequence[int]
    epoch: str = ""


def measure(sizes: LogSizes, seed: int, folder: Path, ends: Ends, say: Callable[[str], None]) -> list[Figure]:
    """The figures, one for each way to find what changed.

    Raises:
        BenchError, RunFailed: it does not work.
    """
    job = ours.new(folder, ends)
    content = Random(seed).randbytes(CONTENT_BYTES)
    vast = [_made(job, size, sizes.changed_bytes, seed) for size in sizes.vast_bytes]
    runs: dict[str, dict[str, list[float]]] = {
        way: {each.name: [] for each in vast} for way in (LISTED, MAPPED)
    }
    # What is kept of the past is not measured here, and takes space: a GiB for every send.
    with Crowd(folder, LIMIT_S) as crowd:
        ours.receive(job, crowd, "--retention-hours", "0")
        crowd.begin()
        for each in vast:
            _write(each, content, 0)
            each.epoch = ours.send(each.job, crowd, name=each.name)["epoch"]
        began_s = time.monotonic()
        for number in range(sizes.rounds):
            if number and (time.monotonic() - began_s) * (number + 1) / number > sizes.budget_s:
                break
            for turn, way in enumerate(runs):
                for each in vast if (number + turn) % 2 else vast[::-1]:
                    _write(each, content, 1 + 2 * number + turn)
                    seconds = _sent(each, way, crowd)
                    runs[way][each.name].append(seconds)
                    say(f"{sizes.changed_bytes >> 20} MiB changed on {each.name}, {way}: {seconds:.2f} s")
    _check(vast, folder)
    return list(_figures(runs, sizes))


def _figures(runs: dict[str, dict[str, list[float]]], sizes: LogSizes) -> Iterator[Figure]:
    changed = f"{sizes.changed_bytes >> 20} MiB changed"
    for way, by_disk in runs.items():
        less, more = by_disk
        ratio = median(by_disk[more]) / median(by_disk[less])
        seconds = {f"{name}, s": each for name, each in by_disk.items()}
        # Either may be the slower one.
        title = f"{changed}, {way}: on {more}, by {less}"
        yield Figure(title, max(ratio, 1 / ratio), Unit.RATIO, WANTED, runs=seconds)


def _made(job: Job, size: int, changed_bytes: int, seed: int) -> Vast:
    name = f"{size // GIB}G"
    source = job.room / f"{name}.img"
    try:
        with source.open("wb") as file:
            file.truncate(size)
    except OSError as error:
        raise BenchError(f"a sparse file of {name} cannot be made here: {error.strerror}") from None
    places = Random(seed).sample(range(size // MIB), changed_bytes // MIB)
    return Vast(name, replace(job, source=source), sorted(places))


def _write(each: Vast, content: bytes, number: int) -> None:
    """Other content at the same places, written out before anything is measured."""
    view = memoryview(content)
    with each.job.source.open("r+b") as file:
        for at, place in enumerate(each.places):
            start = ((at * MIB) + number * disk.BLOCK_BYTES) % (len(content) - MIB)
            os.pwrite(file.fileno(), view[start : start + MIB], place * MIB)
    os.sync()


def _sent(each: Vast, way: str, crowd: Crowd) -> float:
    """Seconds of the whole command, which leaves the epoch in the target's images."""
    options: list[str | Path] = []
    if way == LISTED:
        ranges = [(place * MIB, (place + 1) * MIB) for place in each.places]
        options = ["--changed-extents", listed(each.job.room, each.epoch, {each.name: ranges})]
    began_s = time.perf_counter()
    report = ours.send(each.job, crowd, *options, name=each.name)
    seconds = time.perf_counter() - began_s
    if report["mode"] != "incremental":
        raise BenchError(f"the send of {each.name} was a {report['mode']}")
    each.epoch = report["epoch"]
    return seconds


def _check(vast: Sequence[Vast], folder: Path) -> None:
    for each in vast:
        problem = disk.difference(each.job.source, ours.flat(folder, each.name))
        if problem is not None:
            raise BenchError(f"the sends of {each.name} left another disk: {problem}")
