"""Figures of runs and what is made of them: medians, spreads, ratios. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

MB, GB = 1e6, 1e9


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one contender.

    Attributes:
        round: from 0 on. seconds: of the whole commands, to the fdatasync.
        wire_bytes: both directions; out_bytes: to the receiver alone, 0 where only the sum is known.
        cpu_s, peak_bytes: by process, both ends.
        problem: why the figures do not count.
    """

    round: int
    seconds: float = 0.0
    wire_bytes: int = 0
    out_bytes: int = 0
    cpu_s: dict[str, float] | None = None
    peak_bytes: dict[str, int] | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """How a contender did in a scenario: medians of its runs.

    Attributes:
        name: its name. ours: it is Replicator.
        runs: all of them. problem: why it has no figures: one bad run is enough.
        seconds, seconds_min, seconds_max: of the whole commands.
        mb_s: bytes of disk per second, in MB (10^6).
        wire_bytes: both directions.
        cpu_s_per_gb: CPU seconds of all processes of both ends, by GB of disk (10^9).
        peak_bytes: by process.
        line_use: share of the line's rate that was used towards the receiver; None without a line.
        ratio: of its ``mb_s`` to that of the best peer; None where no peer has figures.
    """

    name: str
    ours: bool
    runs: tuple[Run, ...]
    problem: str | None
    seconds: float = 0.0
    seconds_min: float = 0.0
    seconds_max: float = 0.0
    mb_s: float = 0.0
    wire_bytes: int = 0
    cpu_s_per_gb: float = 0.0
    peak_bytes: dict[str, int] | None = None
    line_use: float | None = None
    ratio: float | None = None


def standing(
    name: str, runs: Sequence[Run], size: int, *, ours: bool = False, rate_bit_s: float = 0.0
) -> Standing:
    """The medians of a contender's runs over a disk of ``size`` bytes; without the ratio, see ``ranked``."""
    problem = next((run.problem for run in runs if run.problem is not None), None)
    if problem is not None or not runs:
        return Standing(name, ours, tuple(runs), problem or "not run")
    seconds = [run.seconds for run in runs]
    middle_s = median(seconds)
    names = {process for run in runs for process in run.peak_bytes or ()}
    return Standing(
        name,
        ours,
        tuple(runs),
        None,
        seconds=middle_s,
        seconds_min=min(seconds),
        seconds_max=max(seconds),
        mb_s=size / middle_s / MB,
        wire_bytes=round(median(run.wire_bytes for run in runs)),
        cpu_s_per_gb=median(sum((run.cpu_s or {}).values()) for run in runs) / (size / GB),
        peak_bytes={
            process: round(median((run.peak_bytes or {}).get(process, 0) for run in runs))
            for process in sorted(names)
        },
        line_use=median(run.out_bytes * 8 / run.seconds for run in runs) / rate_bit_s if rate_bit_s else None,
    )


def ranked(standings: Sequence[Standing]) -> list[Standing]:
    """With the ratios to the best peer filled in; the order stays."""
    best = max((each.mb_s for each in standings if not each.ours and each.problem is None), default=0.0)
    return [
        replace(each, ratio=each.mb_s / best) if best and each.problem is None else each for each in standings
    ]
