"""How soon an epoch of known changes is sealed, beside a process that only reads, compresses and syncs.

Both work on the same source and the same list of extents, one after the other, the first by turns. Every
round changes other blocks and sends them as the epoch after the last, as an operator with a tracker would.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench import disk, ours
from bench.contenders import Ends, Job
from bench.errors import BenchError
from bench.log.figures import Figure, Unit
from bench.options import LogSizes
from bench.processes import Crowd

LIMIT_S = 600.0
WANTED = 2.0
OURS, RIVAL = "OPEN to SEALED, s", "pipelined, s"


def measure(
    image: Path, sizes: LogSizes, seed: int, folder: Path, ends: Ends, say: Callable[[str], None]
) -> list[Figure]:
    """The figures, one for each share of the blocks of ``image``, which is not changed.

    Raises:
        BenchError, RunFailed: it does not work.
    """
    job = ours.new(folder, ends)
    source = folder / "source.img"
    disk.copy(image, source)
    job = replace(job, source=source)
    found: dict[float, dict[str, list[float]]] = {
        share: {OURS: [], RIVAL: []} for share in sizes.changed_shares
    }
    with Crowd(folder, LIMIT_S) as crowd:
        ours.receive(job, crowd)
        crowd.begin()
        epoch = ours.send(job, crowd)["epoch"]
        began_s = time.monotonic()
        for number in range(sizes.rounds):
            if number and (time.monotonic() - began_s) * (number + 1) / number > sizes.budget_s:
                break
            for place, (share, runs) in enumerate(found.items()):
                changes = _changed(job, share, seed + number * len(found) + place, epoch)
                order = (_pipelined, _sealed) if number % 2 else (_sealed, _pipelined)
                for contender in order:
                    os.sync()
                    seconds, epoch = contender(job, changes, crowd, epoch)
                    runs[OURS if contender is _sealed else RIVAL].append(seconds)
                say(f"{share:.0%} changed, known: {runs[OURS][-1]:.2f} s, pipelined {runs[RIVAL][-1]:.2f} s")
    problem = disk.difference(source, ours.flat(folder))
    if problem is not None:
        raise BenchError(f"the sends of what was known to have changed left another disk: {problem}")
    return [_figure(share, runs) for share, runs in found.items()]


def _figure(share: float, runs: dict[str, list[float]]) -> Figure:
    ratio = median(runs[OURS]) / median(runs[RIVAL])
    title = f"{share:.0%} of the blocks changed, known: OPEN to SEALED, by a pipelined process"
    return Figure(title, ratio, Unit.RATIO, WANTED, runs=runs)


def _changed(job: Job, share: float, seed: int, epoch: str) -> Path:
    """Change the source; the list of that."""
    blocks = disk.any_blocks(job.source.stat().st_size, share, seed)
    disk.overwrite(job.source, blocks, seed)
    ranges = [(block * disk.BLOCK_BYTES, (block + 1) * disk.BLOCK_BYTES) for block in blocks]
    return listed(job.room, epoch, {ours.DISK: list(disk.joined(ranges))})


def listed(folder: Path, epoch: str, ranges: dict[str, Sequence[tuple[int, int]]]) -> Path:
    """A list of changed extents, of [start, end) by disk, since an epoch."""
    path = folder / "changes.json"
    disks = {name: [[start, end - start] for start, end in each] for name, each in ranges.items()}
    path.write_text(json.dumps({"since": epoch, "disks": disks}))
    return path


def _sealed(job: Job, changes: Path, crowd: Crowd, _: str) -> tuple[float, str]:
    report = ours.send(job, crowd, "--changed-extents", changes)
    return report["sealed_seconds"], report["epoch"]


def _pipelined(job: Job, changes: Path, crowd: Crowd, epoch: str) -> tuple[float, str]:
    target, said = job.room / "pipelined.zst", job.room / "pipelined.json"
    command = (sys.executable, "-m", "bench.log.pipelined", job.source, changes, target)
    with said.open("wb") as output:
        crowd.finish(crowd.start("pipelined", command, stdout=output))
    target.unlink()
    return json.loads(said.read_bytes())["seconds"], epoch
