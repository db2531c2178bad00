"""What to measure, from the options that were given. Pure: it decides sizes, rounds and lines, and runs
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

from bench.errors import BenchError
from bench.link import LinkSpec

MIB, GIB = 1 << 20, 1 << 30
PARTS = ("full", "resync", "line", "log", "azure", "stages", "micro")
QUICK_PARTS = tuple(part for part in PARTS if part not in {"log", "azure"})  # a minute, and npm's emulator
SIZE_BYTES, QUICK_SIZE_BYTES = 4 * GIB, GIB
SIZE_MIN_BYTES = 32 * MIB
AZURE_BYTES = 256 * MIB  # what the emulator, which keeps it in memory, gives in some seconds
ROUNDS, QUICK_ROUNDS = 5, 1
SHARES, QUICK_SHARES = (0.01, 0.10), (0.01,)
FULL_S, SHARES_S = 320.0, (230.0, 150.0)  # so that the whole stays below 20 minutes
RATES_MBIT, ROUND_TRIPS_MS = (100, 1000), (0, 20, 100, 200)
QUICK_LINES = ((100, 100), (1000, 20))
LOSS, LOSSY_RATE_MBIT, LOSSY_ROUND_TRIP_MS = 0.01, 100, 20
# Five seconds of the line, or a little more, for the bytes of the image that are data.
LINE_BYTES = {100: 80 * MIB, 1000: 512 * MIB}
QUICK_LINE_BYTES = {100: 48 * MIB, 1000: 256 * MIB}
LOSSY_BYTES, LOSSY_CUBIC_BYTES = 48 * MIB, 16 * MIB  # cubic gets through six per cent of the line's rate


@dataclass(frozen=True, slots=True)
class LogSizes:
    """How much the part ``log`` measures with.

    Attributes:
        rounds: of each figure, fewer where more would most likely end after ``budget_s`` seconds.
        changed_shares: of the disk's blocks, known to the sender.
        applied_bytes: of redo in whole MiB. blocks_bytes: of redo in blocks of 4 KiB. base_bytes: of the
            image that they are applied to.
        vast_bytes: sizes of the sparse disks. changed_bytes: what changes on each.
        disks, disk_bytes: those that are sent at once.
        journal_bytes: of sealed epochs that are not applied when the master target starts.
    """

    rounds: int
    budget_s: float
    changed_shares: tuple[float, ...]
    applied_bytes: int
    blocks_bytes: int
    base_bytes: int
    vast_bytes: tuple[int, int]
    changed_bytes: int
    disks: int
    disk_bytes: int
    journal_bytes: int


LOG = LogSizes(
    rounds=3,
    budget_s=35.0,
    changed_shares=SHARES,
    applied_bytes=256 * MIB,
    blocks_bytes=64 * MIB,
    base_bytes=GIB,
    vast_bytes=(64 * GIB, 2048 * GIB),
    changed_bytes=GIB,
    disks=64,
    disk_bytes=64 * MIB,
    journal_bytes=10 * GIB,
)
QUICK_LOG = LogSizes(
    rounds=1,
    budget_s=5.0,
    changed_shares=QUICK_SHARES,
    applied_bytes=128 * MIB,
    blocks_bytes=16 * MIB,
    base_bytes=256 * MIB,
    vast_bytes=(64 * GIB, 2048 * GIB),
    changed_bytes=64 * MIB,
    disks=64,
    disk_bytes=4 * MIB,
    journal_bytes=GIB,
)


@dataclass(frozen=True, slots=True)
class Options:
    """As given.

    Attributes:
        size_bytes: of the disk for full and resync; None is 4 GiB, with ``quick`` 1 GiB.
        rounds: of full and resync; None is five, or as many as there is time for, with ``quick`` one.
        parts: of ``PARTS``. quick: less of everything. seed: of images, changes and losses.
        directory: for everything that is made and removed again; None is a new temporary one.
    """

    size_bytes: int | None = None
    rounds: int | None = None
    parts: tuple[str, ...] = PARTS
    quick: bool = False
    seed: int = 1
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A line to measure over, and the size of the disk that goes over it.

    Attributes:
        congestion: control algorithm of both ends; empty is what the machine has.
    """

    rate_mbit: int
    round_trip_ms: int
    size_bytes: int
    loss: float = 0.0
    congestion: str = ""

    @property
    def title(self) -> str:
        """For tables."""
        rate = f"{self.rate_mbit} Mbit/s" if self.rate_mbit < 1000 else f"{self.rate_mbit // 1000} Gbit/s"
        loss = f", {self.loss:.0%} loss" if self.loss else ""
        return f"{rate}, {self.round_trip_ms} ms{loss}" + (f", {self.congestion}" if self.congestion else "")

    @property
    def key(self) -> str:
        """For JSON."""
        words = [f"line-{self.rate_mbit}-{self.round_trip_ms}", "loss" if self.loss else "", self.congestion]
        return "-".join(word for word in words if word)

    def spec(self, seed: int) -> LinkSpec:
        """For ``link``."""
        return LinkSpec(
            self.rate_mbit * 1e6, self.round_trip_ms / 1e3, self.loss, seed, congestion=self.congestion
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        size_bytes: of the disk for full and resync. rounds: of these. shares: of its blocks that change, with
            the seconds after which no more rounds are begun. full_s: the same for full.
        lines: with one round each. log: sizes of that part. parts: see ``Options``.
    """

    size_bytes: int
    rounds: int
    full_s: float
    shares: tuple[tuple[float, float], ...]
    lines: tuple[Line, ...]
    log: LogSizes
    parts: tuple[str, ...]


def plan(options: Options, congestions: tuple[str, ...]) -> Plan:
    """What the options ask for; ``congestions``: the control algorithms of this machine, its default first.

    Raises:
        BenchError: they make no sense.
    """
    quick = options.quick
    size = options.size_bytes or (QUICK_SIZE_BYTES if quick else SIZE_BYTES)
    if size < SIZE_MIN_BYTES:
        raise BenchError(f"a disk of {size} bytes is too small: {SIZE_MIN_BYTES} at the least")
    if unknown := set(options.parts) - set(PARTS):
        raise BenchError(f"there is no part {', '.join(sorted(unknown))}, only {', '.join(PARTS)}")
    rounds = options.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    sizes = QUICK_LINE_BYTES if quick else LINE_BYTES
    pairs = QUICK_LINES if quick else [(rate, trip) for rate in RATES_MBIT for trip in ROUND_TRIPS_MS]
    lines = [Line(rate, trip, min(sizes[rate], size)) for rate, trip in pairs]
    if not quick:
        # With cubic, too: Linux's own default, whatever this machine is set to.
        others = ["cubic"] if "cubic" in congestions[1:] else []
        lines += [
            Line(
                LOSSY_RATE_MBIT,
                LOSSY_ROUND_TRIP_MS,
                min(_lossy_bytes(each or congestions[0]), size),
                LOSS,
                each,
            )
            for each in ("", *others)
        ]
    budgets = FULL_S, SHARES_S
    if options.rounds is not None or options.size_bytes is not None:  # who asks for something gets it
        budgets = inf, (inf, inf)
    shares = zip(QUICK_SHARES if quick else SHARES, budgets[1], strict=False)
    log = QUICK_LOG if quick else LOG
    return Plan(size, rounds, budgets[0], tuple(shares), tuple(lines), log, options.parts)


def _lossy_bytes(congestion: str) -> int:
    return LOSSY_CUBIC_BYTES if congestion == "cubic" else LOSSY_BYTES
