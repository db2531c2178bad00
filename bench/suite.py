"""The whole benchmark: makes the disks, runs every scenario of the plan, and gives one JSON document of all
of it.

The document is what tables (``report.py``) and plots (``plot.py``) are made from. Not here: how one run is
measured (``runs.py``), what is measured at all (``options.py``).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench import contenders, disk, machine, micro, ours, stages
from bench.errors import BenchError
from bench.log import part
from bench.namespaces import Namespace
from bench.options import AZURE_BYTES, Line, Options, Plan, plan
from bench.processes import CutOff, RunFailed
from bench.results import Run, ranked, standing
from bench.runs import Place, Scenario, loopback, over_line, rounds

Say = Callable[[str], None]

FORMAT = 1
LIMIT_S = 600.0
LINE_LIMIT_S = 150.0
NEEDED = 3.5  # times the disk's size, at the most: images, what is copied, and destinations
NO_NAMESPACE = "needs network namespaces: run it as root"
AUTO, RAW = "Replicator", "Replicator, not compressed"
COMPARING, KNOWING = "Replicator, digests compared", "Replicator, digest map"


def run(options: Options, say: Say) -> dict[str, Any]:
    """Run it all; ``say`` takes lines about what happens.

    Raises:
        BenchError: it cannot be run here.
    """
    began_s, spent = time.monotonic(), machine.CoreTime()
    wanted = plan(options, machine.congestions())
    parent = options.directory or (Path("/var/tmp") if Path("/var/tmp").is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="replicator-bench-", dir=parent) as name:
        suite = Suite(wanted, options.seed, Path(name), say)
        document = suite.run()
    stolen = spent.stolen_share()
    if stolen > machine.STOLEN_SHARE:
        document["remarks"].append(f"the hypervisor gave {stolen:.0%} of the cores' time to others")
    seconds = round(time.monotonic() - began_s, 1)
    return {**document, "quick": options.quick, "stolen_share": round(stolen, 4), "seconds": seconds}


class Suite:
    """A run of a plan in a folder of its own."""

    def __init__(self, wanted: Plan, seed: int, folder: Path, say: Say) -> None:
        self._plan = wanted
        self._seed = seed
        self._folder = folder
        self._say = say
        self._own = _can_make_namespaces()
        self._met: ours.Past | None = None
        self._images: dict[int, tuple[Path, disk.Content]] = {}

    def run(self) -> dict[str, Any]:
        """All parts of the plan."""
        described = machine.described(self._folder)
        remarks = self._remarks(described)
        parts = self._plan.parts
        self._check_space()
        work: list[Callable[[], dict[str, Any]]] = []
        if "full" in parts:
            work.append(self._full)
        if "resync" in parts:
            work += [partial(self._resync, share, budget_s) for share, budget_s in self._plan.shares]
        if "line" in parts:
            work += [partial(self._line, line) for line in self._plan.lines]
        # What depends on the product's inside comes first: if it breaks, it breaks early.
        rates = [asdict(rate) for rate in micro.measure()] if "micro" in parts else None
        allowed = self._stages() if "stages" in parts else None
        found: list[dict[str, Any]] = []
        failed: list[str] = []
        for one in work:
            try:
                found.append(one())
            except (BenchError, RunFailed, CutOff) as error:  # what others found shall not be lost
                failed.append(f"nothing came of scenario {len(found) + len(failed) + 1}: {error}")
                self._say(failed[-1])
        logged = self._log() if "log" in parts else None
        if logged is not None:
            failed += logged.pop("failed")
        reads = self._azure(remarks) if "azure" in parts else None
        return {
            "format": FORMAT,
            "machine": described,
            "remarks": remarks,
            "seed": self._seed,
            "scenarios": found,
            "failed": failed,
            "log": logged,
            "azure": reads,
            "stages": None if allowed is None else {**allowed, "shares": _shares(allowed, found)},
            "micro": rates,
        }

    def _remarks(self, described: dict[str, Any]) -> list[str]:
        found = []
        if not self._own:
            found.append("no network namespaces: bytes on the wire are those of everybody's loopback")
        if described["load"] > machine.BUSY_LOAD:
            found.append(f"the machine was busy when this began: load {described['load']:.1f}")
        for remark in found:
            self._say(remark)
        return found

    def _check_space(self) -> None:
        needed = round(self._plan.size_bytes * NEEDED)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise BenchError(
                f"{needed >> 30} GiB are needed where the disks are made, {free >> 30} GiB are free: "
                "give another directory, or a smaller size"
            )

    def _image(self, size: int) -> tuple[Path, disk.Content]:
        """The disk of this size; made when it is wanted first."""
        if size not in self._images:
            self._say(f"making a disk of {size >> 20} MiB from files of this machine")
            image = self._folder / f"disk-{size}.img"
            self._images[size] = image, disk.build(image, size, self._seed)
        return self._images[size]

    # -- scenarios -----

    def _full(self) -> dict[str, Any]:
        image, content = self._image(self._plan.size_bytes)
        with loopback(self._folder, own=self._own) as place:
            past = self._prepared(place, None)
            taking_part = [
                ours.replicator(AUTO, past, "full"),
                ours.replicator(RAW, past, "full", compression="off"),
                contenders.nbdcopy(),
                contenders.qemu_img(),
                contenders.zstd_pipe(),
                contenders.rsync("rsync, TLS", "--whole-file", "--sparse", tls=True),
                contenders.rsync("rsync, no TLS", "--whole-file", "--sparse"),
            ]
            scenario = Scenario(
                "full", "full send, loopback", "full", image, None, content.size, taking_part,
                self._plan.rounds, LIMIT_S, self._plan.full_s,
            )  # fmt: skip
            return self._done(scenario, content, place)

    def _resync(self, share: float, budget_s: float) -> dict[str, Any]:
        old, _ = self._image(self._plan.size_bytes)
        new = self._folder / "changed.img"
        with loopback(self._folder, own=self._own) as place:
            self._say(f"changing {share:.0%} of the disk's blocks, and sending the old disk once")
            disk.copy(old, new)
            disk.change(new, share, self._seed)
            past = self._prepared(place, old)
            inplace = ("--inplace", "--no-whole-file")
            taking_part = [
                ours.replicator(COMPARING, past, "resync", map_lost=True),
                ours.replicator(KNOWING, past, "incremental"),
                contenders.rsync("rsync --inplace, no TLS", *inplace),
                contenders.rsync("rsync --inplace -B 4096, no TLS", *inplace, "--block-size=4096"),
            ]
            content = disk.content(new)
            scenario = Scenario(
                f"resync-{share:.0%}", f"resync, {share:.0%} of the blocks changed, loopback", "resync", new,
                old, content.size, taking_part, self._plan.rounds, LIMIT_S, budget_s,
            )  # fmt: skip
            return self._done(scenario, content, place)

    def _line(self, line: Line) -> dict[str, Any]:
        image, content = self._image(line.size_bytes)
        spec = line.spec(self._seed)
        with loopback(self._folder, own=self._own) as place:
            past = self._prepared(place, None)
        taking_part = [
            ours.replicator(AUTO, past, "full"),
            contenders.nbdcopy(),
            contenders.zstd_pipe(),
            contenders.rsync("rsync, no TLS", "--whole-file", "--sparse"),
            contenders.rsync("rsync -z, no TLS", "--whole-file", "--sparse", "-z", "--compress-choice=zstd"),
        ]
        scenario = Scenario(
            line.key, line.title, "line", image, None, content.size, taking_part, 1, LINE_LIMIT_S, line=spec
        )
        if not self._own:
            return self._told(scenario, content, {})
        with over_line(self._folder, spec) as place:
            return self._done(scenario, content, place)

    def _done(self, scenario: Scenario, content: disk.Content, place: Place) -> dict[str, Any]:
        """Run a scenario."""
        return self._told(scenario, content, rounds(scenario, place, self._folder, self._say))

    def _prepared(self, place: Place, old: Path | None) -> ours.Past:
        """What Replicator's two ends hold before a scenario's runs. Runs copy it and leave it as it is."""
        folder = self._folder / ("past" if old else "met")
        if old is None and self._met is not None:
            return self._met
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        past = ours.prepare(folder, place.ends, old)
        if old is None:
            self._met = past
        return past

    def _told(self, scenario: Scenario, content: disk.Content, runs: dict[str, list[Run]]) -> dict[str, Any]:
        rate_bit_s = scenario.line.rate_bit_s if scenario.line else 0.0
        standings = [
            standing(each.name, runs.get(each.name, [Run(0, problem=NO_NAMESPACE)]), content.size,
                     ours=each.ours, rate_bit_s=rate_bit_s)
            for each in scenario.contenders
        ]  # fmt: skip
        return {
            "key": scenario.key,
            "title": scenario.title,
            "kind": scenario.kind,
            "size_bytes": content.size,
            "data_bytes": content.data,
            "rounds": max((len(each.runs) for each in standings), default=0),
            "line": asdict(scenario.line) if scenario.line else None,
            "standings": [asdict(each) for each in ranked(standings)],
        }

    def _log(self) -> dict[str, Any]:
        """What was wanted of the log, and what is."""

        def image() -> Path:
            return self._image(self._plan.size_bytes)[0]

        return part.measure(image, self._plan.log, self._seed, self._folder, self._say)

    def _azure(self, remarks: list[str]) -> dict[str, Any] | None:
        """Reads of a page blob, if there is an emulator to read it from."""
        from bench import azure  # the SDK costs half a second

        if (problem := azure.missing()) is not None:
            remarks.append(f"page blobs: {problem}")
            return None
        image, _ = self._image(min(AZURE_BYTES, self._plan.size_bytes))
        self._say("reading a page blob")
        return azure.measure(image, self._plan.rounds)

    def _stages(self) -> dict[str, Any]:
        """Rates of the stages with this disk's content, and what they allow."""
        image, content = self._image(self._plan.size_bytes)
        self._say("measuring the stages")
        taken = stages.sample(image)
        measured = stages.measure(taken, self._folder)
        ideals = stages.ideals(content, taken, measured, machine.cores())
        return {
            "rates": [asdict(stage) for stage in measured.stages],
            "zero_share": taken.zero_share,
            "write_bytes_s": measured.write_bytes_s,
            "cores": machine.cores(),
            "ideals": [asdict(ideal) for ideal in ideals],
        }


def _shares(allowed: dict[str, Any], scenarios: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What we reach of what the stages allow, where a full send was measured."""
    by_level = {ideal["level"]: ideal["mb_s"] for ideal in allowed["ideals"]}
    # Left to itself it picks the level, so it is held to the best that any of them allows.
    limits = {RAW: by_level[0], AUTO: max(by_level.values())}
    return {
        each["name"]: each["mb_s"] / limits[each["name"]]
        for scenario in scenarios
        for each in scenario["standings"]
        if scenario["kind"] == "full" and each["problem"] is None and each["name"] in limits
    }


def _can_make_namespaces() -> bool:
    try:
        with Namespace():
            return True
    except BenchError:
        return False
