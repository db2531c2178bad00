"""I7: what the daemons hold of memory, descriptors and threads stays what it was, however many sessions,
breaks and epochs there have been.

Tasks can only be counted in the loop's own process: `tests/faults/test_virtual_time.py`.
"""

import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.agents.daemons import Running, Site
from tests.agents.harness import MIB, Process, identical, make_disk
from tests.agents.proxy import Proxy, proxy
from tests.agents.test_daemons import SEALED

pytestmark = pytest.mark.peer("qemu-img")

GROUPS = 8
DISK_BYTES = 2 * MIB
WRITTEN_BYTES = MIB // 2
KEPT = 2  # recovery points of a group: those that are kept take what they take
BROKEN_EVERY = 20  # epochs
WARM_EPOCHS = 4 * GROUPS
GROWTH_MAX_BYTES = 16 * MIB


class Replicating:
    """Two daemons, the line between them, and disks that change."""

    def __init__(self, sources: list[Path], target: Running, server: Running, line: Proxy, seed: int) -> None:
        self.processes = (target.process, server.process)
        self._sources, self._line, self._server = sources, line, server
        self._rng = random.Random(seed)

    @property
    def epochs(self) -> int:
        """That were sealed so far."""
        return self._server.heard.count(SEALED)

    def go_on(self, epochs: int) -> None:
        """So many more, with breaks among them."""
        end = self.epochs + epochs
        while self.epochs < end:
            for source in self._sources:
                with source.open("r+b") as file:
                    file.seek(self._rng.randrange(DISK_BYTES - WRITTEN_BYTES))
                    file.write(self._rng.randbytes(WRITTEN_BYTES))
            self._line.wait_passed(self._line.passed + self._rng.randrange(1, WRITTEN_BYTES))
            self._line.reset()
            self._server.process.said(SEALED, times=self.epochs + BROKEN_EVERY)

    def peaks(self) -> list[int]:
        """The most memory that each has held, in bytes."""
        return [process.peak_bytes() for process in self.processes]

    def fewest(self) -> list[tuple[int, int]]:
        """Descriptors and threads of each, at rest: the fewest of each, as sessions come and go."""
        found = [(held(process, "fd"), held(process, "task")) for process in self.processes]
        end = self.epochs + GROUPS

        def seen() -> bool:
            for number, process in enumerate(self.processes):
                fds, threads = found[number]
                found[number] = min(fds, held(process, "fd")), min(threads, held(process, "task"))
            return self.epochs >= end

        self._server.process.until(seen)
        return found

    def comes_back_to(self, fewest: Sequence[tuple[int, int]]) -> None:
        """Wait until no more of any is held again: of what is kept for ever there will always be more."""
        for process, (fds, threads) in zip(self.processes, fewest, strict=True):
            self._server.process.until(partial(_at_most, process, "fd", fds))
            self._server.process.until(partial(_at_most, process, "task", threads))


def _at_most(process: Process, what: str, most: int) -> bool:
    return held(process, what) <= most


def held(process: Process, what: str) -> int:
    """How many a process has, by the folder in which the kernel lists them."""
    return len(os.listdir(f"/proc/{process.pid}/{what}"))


@pytest.mark.timeout(0)
def test_what_the_daemons_hold_does_not_grow_with_sessions_breaks_and_epochs(
    tmp_path: Path, seed: int, count: Callable[[int, int], int]
) -> None:
    site = Site(tmp_path)
    sources = [make_disk(tmp_path / f"disk{number}.img", DISK_BYTES) for number in range(GROUPS)]
    with site.target(more={"limits": {"keep_count": KEPT}}) as target, proxy(target.address.port) as line:
        site.address = site.address._replace(port=int(line.address.rpartition(":")[2]))
        groups = [site.group(source.stem, source, quiesced=True) for source in sources]
        with site.process_server(groups) as server:
            made = Replicating(sources, target, server, line, seed)
            made.go_on(WARM_EPOCHS)
            before, peaks = made.fewest(), made.peaks()
            made.go_on(count(48, 20_000))
            made.comes_back_to(before)
            grown = [now - then for then, now in zip(peaks, made.peaks(), strict=True)]
            print(f"{made.epochs} epochs, {server.heard.count('trying again in')} breaks")
            print(f"descriptors and threads {before}; KiB {[peak // 1024 for peak in peaks]}")
            print(f"grown by {[size // 1024 for size in grown]} KiB")
            assert max(grown) <= GROWTH_MAX_BYTES
            server.process.until(
                lambda: all(identical(s, site.directory / f"{s.stem}.vmdk") for s in sources)
            )
