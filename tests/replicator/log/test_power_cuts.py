"""The power fails before any call, and any of what was not synced is lost: no acknowledged batch ever is.

A random script writes, rolls, drops, reopens and finishes a log, and is killed and begins again, on files
that forget unsynced sectors, sizes and names. What is found then must be what was acknowledged or found
before, and at most the step that was under way besides.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from replicator.errors import StateError
from replicator.files import Files
from replicator.log.gather import Frame
from replicator.log.log import Kind, Log
from tests.faulty_files import FaultyFiles, PowerCut
from tests.replicator.log.batches import EPOCH, KIB, PAGE, SEED, Content, directory, frame, held, plain

SEGMENT_BYTES = 48 * KIB
SIZES = (0, 512, PAGE, PAGE + 512, 20 * KIB)
STEPS = 14


class Killed(BaseException):
    """The process is gone. No part of the product may catch this."""


class Machine(FaultyFiles):
    """One on which a process may be killed, too: what it did is there, unsynced."""

    _left, _deadly = 0, "any"

    def kill_before(self, kth: int, kind: str = "any") -> None:
        """Raise Killed instead of the `kth` call of `kind` from now on; 0: not at all."""
        self._left, self._deadly = kth, kind

    def _step(self, kind: str, name: str, offset: int = 0, length: int = 0) -> int:
        if self._deadly in (kind, "any"):
            self._left -= 1
            if self._left == 0:
                raise Killed
        return super()._step(kind, name, offset, length)


@dataclass
class Model:
    """What a log was told. Batches by their note; the segments in which they are; what is under way."""

    batches: dict[int, list[Frame]] = field(default_factory=dict)
    segments: dict[int, list[int]] = field(default_factory=dict)
    created: bool = False
    finished: bool = False
    writing: int = 0
    dropping: int = 0
    finishing: bool = False
    killed: Counter[str] = field(default_factory=Counter)

    def dropped(self) -> dict[int, list[int]]:
        return {number: notes for number, notes in self.segments.items() if number != self.dropping}

    def allows(self, log: Log | None) -> bool:
        """Whether this is what may be found."""
        if log is None:
            return not self.created or (self.finished and not self.dropped())
        if log.finished not in {self.finished, self.finished or self.finishing}:
            return False
        possible = []
        for segments in (self.segments, self.dropped()):
            notes = [note for number in sorted(segments) for note in segments[number]]
            possible += [notes, [*notes, self.writing]] if self.writing else [notes]
        return (log.notes(), held(log)) in [(frozenset(notes), self.content(notes)) for notes in possible]

    def content(self, notes: list[int]) -> Content:
        return plain([self.batches[note] for note in notes])

    def settle(self, log: Log) -> None:
        """A log was opened after a kill: what was under way happened, or it did not, for good."""
        newest = log.segments()[-1]
        if self.writing:
            kept = self.writing in log.notes()
            self.killed["kept" if kept else "lost"] += 1
            if kept:
                self.segments.setdefault(newest, []).append(self.writing)
        if self.dropping and self.dropping not in log.segments():
            self.segments.pop(self.dropping, None)
        self.created, self.finished = True, log.finished
        self.writing = self.dropping = 0
        self.finishing = False


class Script:
    """Uses a log in any way that is allowed, telling the model before and after each step."""

    def __init__(self, files: Machine, dir_fd: int, rng: random.Random, model: Model) -> None:
        self.files, self.dir_fd, self.rng, self.model = files, dir_fd, rng, model
        self.log: Log | None = None

    def run(self) -> None:
        for note in range(1, STEPS + 1):
            if self.rng.random() < 0.15:
                self.files.kill_before(self.rng.randint(1, 14))
            try:
                self.step(note)
            except Killed:
                self.log = self.open()
                assert self.model.allows(self.log), "after a kill"
                if self.log is not None:
                    self.model.settle(self.log)
            self.files.kill_before(0)
        if self.log is not None:
            if self.rng.random() < 0.5:
                self.finish(self.log)
            self.log.close()

    def step(self, note: int) -> None:
        if self.log is None:
            self.log = Log.create(
                self.files, self.dir_fd, Kind.REDO, EPOCH, SEED, segment_bytes=SEGMENT_BYTES
            )
            self.model.created = True
        step = self.rng.choices(("write", "roll", "drop", "reopen"), (12, 1, 2, 1))[0]
        if step == "write":
            self.write(self.log, note)
        elif step == "roll":
            self.log.roll()
        elif step == "drop":
            self.drop(self.log)
        else:
            self.log.close()
            self.log = self.open()

    def open(self) -> Log | None:
        return Log.open(self.files, self.dir_fd, Kind.REDO, EPOCH, SEED, segment_bytes=SEGMENT_BYTES)

    def write(self, log: Log, note: int) -> None:
        model, rng = self.model, self.rng
        model.batches[note] = [frame(rng, rng.choice(SIZES)) for _ in range(rng.randint(0, 2))]
        model.writing = note
        log.write(model.batches[note], note)
        model.writing = 0
        model.segments.setdefault(log.segments()[-1], []).append(note)

    def drop(self, log: Log) -> None:
        oldest = log.segments()[0]
        if log.closed(oldest):
            self.model.dropping = oldest
            log.drop(oldest)
            self.model.segments.pop(oldest, None)
            self.model.dropping = 0

    def finish(self, log: Log) -> None:
        self.model.finishing = True
        log.finish()
        self.model.finished = True
        while log.segments() and self.rng.random() < 0.5:
            self.drop(log)


def script(files: Machine, dir_fd: int, rng: random.Random, model: Model) -> None:
    Script(files, dir_fd, rng, model).run()


def check(path: Path, model: Model, files: FaultyFiles, rng: random.Random) -> str:
    """What is found is allowed, stays, and can be gone on with. Says what became of the batch in flight."""
    with directory(path) as dir_fd:
        log = Log.open(files, dir_fd, Kind.REDO, EPOCH, SEED, segment_bytes=SEGMENT_BYTES)
        assert model.allows(log)
        if log is None:
            return "no log"
        found = log.notes(), held(log)
        in_flight = (
            "nothing in flight" if not model.writing else "kept" if model.writing in found[0] else "lost"
        )
        if not log.finished:
            more = [frame(rng, 512)]
            log.write(more)
            found = found[0], [*found[1], *plain([more])]
        log.close()
        files.power_cut()  # what was found once is durable
        log = Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        assert log is not None
        assert (log.notes(), held(log)) == found
        log.close()
        return in_flight


def cut(path: Path, files: Machine, action: Callable[[int], None]) -> bool:
    """Do something to the directory until the power fails; whether it did."""
    was_cut = False
    with directory(path) as dir_fd:
        try:
            action(dir_fd)
        except PowerCut:
            was_cut = True
        files.power_cut()
    return was_cut


def power_cuts(
    folder: Path,
    seed: int,
    make: Callable[[int], Machine],
    *,
    most: int,
    stride: int = 1,
    recoveries: int = 0,
) -> Counter[str]:
    """Run one script, with the power failing before every `stride`-th of its calls; counts what is seen.

    `most`: states. `recoveries`: how often the power fails again while the log is being opened.
    """
    seen: Counter[str] = Counter()
    for kth in range(1 + seed % stride, 1 + most * stride, stride):
        path = folder / "log"
        shutil.rmtree(path, ignore_errors=True)
        model, rng, files = Model(), random.Random(seed + kth), make(seed + kth)
        files.cut_before(kth)
        was_cut = cut(path, files, partial(script, files, rng=random.Random(seed), model=model))
        for _ in range(recoveries):
            files = make(rng.getrandbits(64))
            files.cut_before(rng.randint(1, 25))
            cut(path, files, partial(open_and_close, files))
        try:
            seen[check(path, model, FaultyFiles(seed), rng)] += 1
            seen += Counter({f"killed and {kind}": times for kind, times in model.killed.items()})
            seen["states"] += 1
        except (AssertionError, StateError) as error:
            raise AssertionError(f"script {seed}, power failed before call {kth}: {error}") from error
        if not was_cut:
            break
    return seen


def open_and_close(files: Files, dir_fd: int) -> None:
    log = Log.open(files, dir_fd, Kind.REDO, EPOCH, SEED)
    if log is not None:
        log.close()


@pytest.mark.parametrize("recoveries", [0, 2])
def test_whenever_the_power_fails_every_acknowledged_batch_is_found(
    in_memory: Path, seed: int, count, recoveries: int
) -> None:
    wanted, stride = count((1_000, 500)[recoveries // 2], 500_000), 1
    seen: Counter[str] = Counter()
    while seen["states"] < wanted:
        most = wanted - seen["states"]
        seen += power_cuts(in_memory, seed, Machine, most=most, stride=stride, recoveries=recoveries)
        seed, stride = seed + 1_000_003, 11
    for kind in ("no log", "nothing in flight", "lost", "killed and lost"):
        assert seen[kind] > 0, seen
    assert seen["kept"] + seen["killed and kept"] > 0, seen


def test_a_batch_that_a_killed_process_left_unsynced_is_kept_or_lost_but_never_told_as_damage(
    in_memory: Path, seed: int, count
) -> None:
    """Whoever finds it whole and closes its segment says with the index that it is durable: it must be."""
    seen: Counter[bool] = Counter()
    for number in range(count(150, 10_000)):
        path, rng, files = in_memory / f"{number}", random.Random(seed + number), Machine(seed + number)
        batches = [[frame(rng, 512)], [frame(rng, PAGE)]]
        with directory(path) as dir_fd:
            log = Log.create(files, dir_fd, Kind.REDO, EPOCH, SEED, segment_bytes=SEGMENT_BYTES)
            log.write(batches[0], 1)
            files.kill_before(1, "fdatasync")
            with pytest.raises(Killed):
                log.write(batches[1], 2)
        files.cut_before(rng.randint(8, 20))
        cut(path, files, partial(open_and_close, files))
        with directory(path) as dir_fd:
            found = Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
            assert found is not None
            assert found.notes() in ({1}, {1, 2})
            assert held(found) == plain(batches[: len(found.notes())])
            seen[2 in found.notes()] += 1
            found.close()
        shutil.rmtree(path)
    assert seen[True] > 0 and seen[False] > 0, seen


def test_a_segment_that_a_killed_process_removed_stays_removed_once_that_was_seen(
    in_memory: Path, seed: int
) -> None:
    for number in range(20):
        path, files = in_memory / f"{number}", Machine(seed + number)
        with directory(path) as dir_fd:
            log = Log.create(files, dir_fd, Kind.REDO, EPOCH, SEED, segment_bytes=SEGMENT_BYTES)
            log.write([], 1)
            log.roll()
            log.write([], 2)
            files.kill_before(1, "fsync")
            with pytest.raises(Killed):
                log.drop(1)
            found = Log.open(files, dir_fd, Kind.REDO, EPOCH, SEED)
            assert found is not None and found.segments() == (2,)
            files.power_cut()
            found = Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
            assert found is not None and found.segments() == (2,)
            found.close()


# ------------------------------------------------------------------ the test would see it


class NoDataSync(Machine):
    """A disk that says "durable" and is not: acknowledged before it is synced."""

    def fdatasync(self, fd: int) -> None:
        self._step("fdatasync", self._name(fd))


class NoDirectorySync(Machine):
    """New names are not made durable."""

    def fsync(self, fd: int) -> None:
        if self._name(fd).endswith(".seg"):
            super().fsync(fd)
        else:
            self._step("fsync", self._name(fd))


@pytest.mark.parametrize("broken", [NoDataSync, NoDirectorySync])
def test_a_log_that_does_not_sync_is_caught(in_memory: Path, broken: type[Machine]) -> None:
    caught = 0
    for seed in range(6):
        try:
            power_cuts(in_memory, seed, broken, most=1_000)
        except AssertionError:
            caught += 1
    assert caught >= 3
