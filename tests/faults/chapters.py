"""The story of one seed, taken apart: what lies in the files, and what the oracle knows, before each step.

So a state costs the run of a part of one step, not of all before it. Not here: what goes wrong in it.
"""

import copy
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from replicator.files import Files
from tests.faults.oracle import Oracle
from tests.faults.story import PLOTS, Machine, Plot, Story
from tests.faulty_files import FaultyFiles, PowerCut


class Chapter(NamedTuple):
    """One step of the story: where its beginning lies, and the kinds of the calls that it makes."""

    step: int
    start: Path
    before: Oracle
    calls: tuple[str, ...]


class Chapters:
    """The story of a seed in a folder.

    Attributes:
        all: its steps.
    """

    def __init__(self, folder: Path, seed: int, plots: Sequence[Plot] = PLOTS) -> None:
        self._seed = seed
        self._plots = plots
        self._folder = folder
        oracle = Oracle(seed)
        now = folder / "now"
        now.mkdir(parents=True)
        self.all: list[Chapter] = []
        machine = Machine(now, Files())
        for step in range(len(self._steps(machine, oracle, random.Random()))):
            start = folder / f"{step}"
            shutil.copytree(now, start)
            files = FaultyFiles()
            before = copy.deepcopy(oracle)
            self.run(step, self.copy(start), files, copy.deepcopy(oracle))
            files.let_go()
            self.all.append(Chapter(step, start, before, tuple(call.kind for call in files.calls)))
            self.run(step, now, Files(), oracle)
        machine.close()

    def run(self, step: int, path: Path, files: Files, oracle: Oracle) -> None:
        """Do one step there."""
        machine = Machine(path, files)
        rng = random.Random(f"{self._seed}/{step}")
        try:
            self._steps(machine, oracle, rng)[step]()
        finally:
            if not isinstance(files, FaultyFiles):
                machine.close()

    def _steps(self, machine: Machine, oracle: Oracle, rng: random.Random) -> list[Callable[[], None]]:
        return Story(machine, oracle, oracle.source, rng, self._plots).steps()

    def copy(self, start: Path) -> Path:
        """A copy of what lies there, times and all; the one before is gone."""
        path = self._folder / "copy"
        shutil.rmtree(path, ignore_errors=True)
        return Path(shutil.copytree(start, path))

    def places(self, kind: str = "") -> Iterator[tuple[Chapter, int]]:
        """Every call before which something may happen; of every kind: with the moment after the last one."""
        for chapter in self.all:
            for kth, called in enumerate((*chapter.calls, ""), 1):
                if kind in ("", called):
                    yield chapter, kth

    def cut(self, chapter: Chapter, kth: int, files: FaultyFiles) -> tuple[Path, Oracle]:
        """The power fails before the `kth` call of a step: what is left of it, and what the oracle heard."""
        path, oracle = self.copy(chapter.start), copy.deepcopy(chapter.before)
        files.cut_before(kth)
        with suppress(PowerCut):
            self.run(chapter.step, path, files, oracle)
        files.power_cut()
        return path, oracle
