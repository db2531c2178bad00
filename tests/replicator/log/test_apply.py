"""Applying: images equal the model and the undo log is the past, after any crash, too."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count as counting
from pathlib import Path
from typing import Any

import pytest

from protocol.constants import RAW_MAX_BYTES
from protocol.messages import Interval
from protocol.payload import Extent
from replicator.errors import ReplicatorError, SpaceError, StateError
from replicator.failpoints import NAMES
from replicator.files import Files
from replicator.images.device import RawImage
from replicator.images.flat_vmdk import FlatVmdk
from replicator.log import apply, history, workspace
from replicator.log.apply import ApplyCounts, apply_segment
from replicator.log.history import roll_back
from replicator.log.log import Kind, Log
from replicator.log.workspace import Begin, Workspace, at_once
from tests.conftest import ROOT
from tests.faulty_files import FaultyFiles, PowerCut
from tests.real_disks import run
from tests.replicator.log.batches import KIB, MIB, SEED, held
from tests.replicator.log.epochs import (
    SECTOR,
    Change,
    Models,
    change,
    changed,
    frame,
    group,
    image_path,
    make_images,
    moved,
    random_epoch,
    undone,
    untrue,
    write_redo,
)

ONE_SEGMENT = 256 * MIB


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace so small that a few MiB take many windows, and a window several commits."""
    monkeypatch.setattr(workspace, "SLOTS", 2)
    monkeypatch.setattr(workspace, "_TABLES_BYTES", 4 * KIB)
    monkeypatch.setattr(workspace, "_BODIES_BYTES", RAW_MAX_BYTES + MIB)


def redo_of(folder: Path, changes: list[Change], rng: random.Random) -> None:
    """The redo log of epoch 1, in one segment."""
    with group(folder) as here:
        write_redo(here.dir_fd, 1, changes, rng, ONE_SEGMENT)


# ------------------------------------------------------------------ what is applied


def apply_chain(folder: Path, rng: random.Random, epochs: int, memory: Workspace) -> None:
    before = make_images(folder, rng)
    with group(folder) as here:
        for epoch in range(1, epochs + 1):
            changes = random_epoch(rng, share=rng.random())
            write_redo(here.dir_fd, epoch, changes, rng)
            undo = here.apply(epoch, workspace=memory)
            assert undo is not None
            after = changed(before, changes)
            assert here.contents() == after
            assert undone(after, undo) == before
            before = after


@pytest.mark.parametrize("level", [None, 1])
def test_images_end_up_as_in_the_model_and_their_undo_is_the_past(
    tmp_path: Path, rng: random.Random, count: Callable[[int, int], int], level: int | None
) -> None:
    apply_chain(tmp_path, rng, count(12, 300), Workspace(level))


def in_a_thread(function: Callable[[], object]) -> Callable[[], None]:
    thread = ThreadPoolExecutor(1)
    answer = thread.submit(function)

    def wait() -> None:
        answer.result()
        thread.shutdown()

    return wait


def as_late_as_can_be(function: Callable[[], object]) -> Callable[[], None]:
    left = [function]

    def wait() -> None:
        while left:
            left.pop()()

    return wait


@pytest.mark.parametrize("begin", [at_once, in_a_thread, as_late_as_can_be])
def test_little_memory_makes_no_difference_nor_when_windows_are_written(
    tmp_path: Path, rng: random.Random, count: Callable[[int, int], int], cramped: None, begin: Begin
) -> None:
    apply_chain(tmp_path, rng, count(12, 300), Workspace(1, begin))


@pytest.mark.parametrize("begin", [at_once, in_a_thread, as_late_as_can_be])
def test_a_window_that_cannot_be_written_is_told_and_written_again(
    tmp_path: Path, rng: random.Random, cramped: None, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make_images(tmp_path, rng)
    changes = random_epoch(rng)
    with group(tmp_path) as here:
        write_redo(here.dir_fd, 1, changes, rng)
        memory, write, left = Workspace(1, begin), apply._write, 0

        def fails(*given: Any) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise SpaceError("target.full", "no space", cause="", fix="")
            write(*given)

        monkeypatch.setattr(apply, "_write", fails)
        with pytest.raises(SpaceError):
            here.apply(1, workspace=memory)
        undo = here.apply(1, workspace=memory)
        assert undo is not None
        assert here.contents() == changed(before, changes)
        assert undone(changed(before, changes), undo) == before


def test_without_undo_only_the_images_change(tmp_path: Path, rng: random.Random) -> None:
    before = make_images(tmp_path, rng)
    changes = random_epoch(rng)
    with group(tmp_path) as here:
        write_redo(here.dir_fd, 1, changes, rng)
        here.apply(1, undo=False)
        assert here.contents() == changed(before, changes)
        assert os.listdir(tmp_path / "logs") == []


def test_what_was_done_is_counted(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng)
    extents = (Extent(0, 8 * SECTOR), Extent(8 * SECTOR, SECTOR, True), Extent(MIB, SECTOR))
    redo_of(tmp_path, [change(rng, 1, extents), change(rng, 4, [Extent(0, SECTOR)])], rng)
    with group(tmp_path) as here:
        counts = apply_segment(here.log(Kind.REDO, 1), 1, here.bases, here.log(Kind.UNDO, 1), SEED)
    assert counts == ApplyCounts(records=2, data_bytes=10 * SECTOR, kept_bytes=11 * SECTOR)


def test_an_image_that_was_made_just_now_gets_its_zeros(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng, {})
    image = RawImage.create(Files(), image_path(tmp_path, 1), MIB)
    image.write([Extent(0, MIB)], memoryview(bytearray(rng.randbytes(MIB))))
    redo_of(tmp_path, [change(rng, 1, [Extent(0, MIB, True)])], rng)
    with group(tmp_path) as here:
        apply_segment(here.log(Kind.REDO, 1), 1, {1: image}, here.log(Kind.UNDO, 1), SEED)
    image.close()
    assert not any(image_path(tmp_path, 1).read_bytes())


@pytest.mark.peer("qemu-img")
def test_another_reader_finds_the_vmdk_changed_and_then_back_again(
    tmp_path: Path, rng: random.Random
) -> None:
    before = make_images(tmp_path / "model", rng, {1: 3 * MIB})
    changes = random_epoch(rng, {1: 3 * MIB})
    (tmp_path / "before.raw").write_bytes(before[1])
    (tmp_path / "after.raw").write_bytes(changed(before, changes)[1])
    with group(tmp_path / "model") as here:
        place = os.open(tmp_path, os.O_RDONLY)
        image = FlatVmdk.create(Files(), place, "disk", 3 * MIB)
        image.write([Extent(0, 3 * MIB)], memoryview(bytearray(before[1])))
        image.publish(cid=1)
        compare = ("qemu-img", "compare", "-f", "vmdk", "-F", "raw", tmp_path / "disk.vmdk")
        write_redo(here.dir_fd, 1, changes, rng)
        redo, undo = here.log(Kind.REDO, 1), here.log(Kind.UNDO, 1)
        run(*compare, tmp_path / "before.raw")
        for segment in redo.segments():
            apply_segment(redo, segment, {1: image}, undo, SEED)
        run(*compare, tmp_path / "after.raw")
        roll_back(undo, {1: image}, SEED)
        run(*compare, tmp_path / "before.raw")
        image.close()
        os.close(place)


# ------------------------------------------------------------------ what is kept


def test_holes_that_are_filled_take_no_space_in_the_history(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng, {})
    data = rng.randbytes(64 * KIB)
    with open(image_path(tmp_path, 1), "wb") as file:
        file.truncate(8 * MIB)
        file.seek(MIB)
        file.write(data)
    pages = tuple(Extent(offset, 4 * KIB) for offset in range(5 * MIB, 6 * MIB, 8 * KIB))
    redo_of(tmp_path, [change(rng, 1, [Extent(0, 4 * MIB)]), change(rng, 1, pages)], rng)
    with group(tmp_path) as here:
        undo = here.apply(1)
        assert undo is not None
        assert sum(header.raw_len for header, _ in held(undo)) == len(data)


def test_a_record_of_the_history_is_small_enough_to_be_read_for_one_sector(
    tmp_path: Path, rng: random.Random
) -> None:
    make_images(tmp_path, rng, {})
    before = rng.randbytes(16 * MIB)
    image_path(tmp_path, 1).write_bytes(before)
    scattered = tuple(Extent(offset, SECTOR) for offset in range(8 * MIB, 12 * MIB, 2 * SECTOR))
    redo_of(tmp_path, [change(rng, 1, [Extent(0, 8 * MIB, True)]), change(rng, 1, scattered)], rng)
    with group(tmp_path) as here:
        undo = here.apply(1)
        assert undo is not None
        headers = [header for header, _ in held(undo)]
        assert max(header.raw_len for header in headers) == MIB
        assert max(header.table_len // 16 for header in headers) == 1024
        assert undone(here.contents(), undo) == {1: before}


def test_neighbours_are_kept_as_one(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng, {1: 2 * MIB})
    extents = [Extent(offset, SECTOR) for offset in range(0, MIB, SECTOR)]
    redo_of(tmp_path, [change(rng, 1, extents[:1000]), change(rng, 1, extents[1000:])], rng)
    with group(tmp_path) as here:
        undo = here.apply(1)
        assert undo is not None
        assert [header.cover_end for header, _ in held(undo)] == [MIB]
        assert held(undo)[0][0].table_len < 16 * 40  # holes of the image part it, our extents do not


# ------------------------------------------------------------------ what cannot be applied


def test_nothing_is_touched_when_a_disk_is_missing(tmp_path: Path, rng: random.Random) -> None:
    before = make_images(tmp_path, rng)
    redo_of(tmp_path, [*random_epoch(rng, {1: MIB}), change(rng, 4, [Extent(0, SECTOR)])], rng)
    with group(tmp_path) as here:
        redo, undo = here.log(Kind.REDO, 1), here.log(Kind.UNDO, 1)
        with pytest.raises(StateError, match="disk 4") as caught:
            apply_segment(redo, 1, {1: here.bases[1]}, undo, SEED)
        assert caught.value.code == "log.disk_missing"
        assert (redo.segments(), held(undo)) == ((1,), [])
        assert here.contents() == before


@pytest.mark.parametrize("level", [None, 1])
def test_a_record_that_is_not_what_was_read_is_not_applied(
    tmp_path: Path, rng: random.Random, level: int | None
) -> None:
    before = make_images(tmp_path, rng)
    header, body = frame(Change(1, Interval(0, MIB), (Extent(0, MIB),), b"data" * (MIB // 4)), 1, level)
    with group(tmp_path) as here:
        redo, undo = here.log(Kind.REDO, 1), here.log(Kind.UNDO, 1)
        redo.write([(replace(header, raw_hash=header.raw_hash ^ 1), body)])
        redo.finish()
        with pytest.raises(StateError, match="content does not match the hash") as caught:
            apply_segment(redo, 1, here.bases, undo, SEED)
        assert caught.value.code == "log.damaged"
        assert here.contents() == before
        assert redo.segments() == (1,)


def test_without_space_for_the_past_the_images_stay_as_they_are(tmp_path: Path, rng: random.Random) -> None:
    before = make_images(tmp_path, rng)
    changes = random_epoch(rng)
    redo_of(tmp_path, changes, rng)
    files = FaultyFiles()
    with group(tmp_path, files) as here:
        redo, undo = here.log(Kind.REDO, 1), here.log(Kind.UNDO, 1)
        files.fail("pwritev", 1, errno.ENOSPC)
        with pytest.raises(SpaceError):
            apply_segment(redo, 1, here.bases, undo, SEED)
        assert here.contents() == before
        undo.close()
        undo = here.log(Kind.UNDO, 1)
        apply_segment(redo, 1, here.bases, undo, SEED)
        assert here.contents() == changed(before, changes)
        assert undone(here.contents(), undo) == before


# ------------------------------------------------------------------ crashes


def check(folder: Path, before: Models, changes: list[Change]) -> None:
    """Whatever is there leads to the new content, and from it back to the old."""
    after = changed(before, changes)
    with group(folder) as here:
        undo = here.apply(1)
        assert undo is not None
        assert here.contents() == after
        assert undone(after, undo) == before
        wrong = untrue(undo, before)
        assert not wrong, f"not the past: {wrong[:3]}"
        roll_back(undo, here.bases, SEED)
        assert here.contents() == before


APPLY = """
import sys
from pathlib import Path
from typing import Any
from replicator.log import history, workspace
from tests.replicator.log.epochs import group
workspace.FRAME_BYTES = history.FRAME_BYTES = 256 * 1024
workspace.SLOTS = 2
with group(Path(sys.argv[1])) as here:
    here.apply(1)
"""
PLACES = (
    "apply.before_undo",
    "apply.undo_kept",
    "apply.before_base",
    "apply.base_written",
    "apply.base_synced",
    "apply.dropped",
    "image.before_sync",
    "image.synced",
    "log.before_create",
    "log.created",
    "log.before_write",
    "log.written",
    "log.before_drop",
    "log.dropped",
)


def test_every_place_of_applying_is_among_those_where_it_is_killed() -> None:
    assert {name for name in NAMES if name.startswith("apply.")} <= set(PLACES) <= NAMES


@pytest.mark.parametrize("name", PLACES)
def test_killed_and_applied_again_nothing_is_wrong(
    tmp_path: Path, rng: random.Random, name: str, count: Callable[[int, int], int]
) -> None:
    before = make_images(tmp_path / "start", rng)
    changes = random_epoch(rng, share=1)
    with group(tmp_path / "start") as here:
        write_redo(here.dir_fd, 1, changes, rng)
    for nth in range(1, count(3, 40)):
        folder = shutil.copytree(tmp_path / "start", tmp_path / f"{nth}")
        environment = {**os.environ, "FAILPOINT": f"{name}:{nth}"}
        done = subprocess.run([sys.executable, "-c", APPLY, folder], env=environment, cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL or (nth > 1 and done.returncode == 0)
        check(folder, before, changes)
        if done.returncode == 0:
            break


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames, commits and windows of a few KiB, so that an epoch of little data has many of each."""
    for module in (workspace, history):
        monkeypatch.setattr(module, "FRAME_BYTES", 64 * KIB)
    monkeypatch.setattr(workspace, "SLOTS", 2)


@dataclass
class PowerCuts:
    """One epoch, applied again and again in copies of one folder, the power cut somewhere else each time."""

    folder: Path
    seed: int

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.before = make_images(self.folder / "start", rng, {1: 500 * KIB, 4: 100 * KIB})
        zeros = change(rng, 1, [Extent(0, 300 * KIB, True)])
        rest = random_epoch(rng, {4: 100 * KIB}, share=1)
        page = change(rng, 1, [Extent(400 * KIB + number * KIB, SECTOR) for number in range(20)])
        self.changes = [zeros, page, *rest]
        with group(self.folder / "start") as here:
            write_redo(here.dir_fd, 1, self.changes, rng)

    def cut(self, kth: int) -> Path | None:
        """What is left after a power cut before the `kth` call; None if there are not that many."""
        folder = shutil.copytree(self.folder / "start", self.folder / "cut", dirs_exist_ok=True)
        files = FaultyFiles(self.seed + kth)
        files.cut_before(kth)
        cut = False
        try:
            with group(folder, files) as here:
                here.apply(1)
        except PowerCut:
            cut = True
        files.power_cut()
        return folder if cut else None

    def all(self) -> Iterator[Path]:
        for kth in counting(1):
            folder = self.cut(kth)
            if folder is None:
                return
            yield folder
            shutil.rmtree(folder)


def state(folder: Path, before: Models) -> str:
    """How far it came."""
    with group(folder) as here:
        undo = here.log(Kind.UNDO, 1)
        kept = "whole" if undo.notes() else "partly" if held(undo) else "not"
        return f"past {kept} kept, images {'as before' if here.contents() == before else 'changed'}"


def test_wherever_the_power_is_cut_the_past_is_kept_once(in_memory: Path, seed: int, tiny: None) -> None:
    cuts = PowerCuts(in_memory, seed)
    seen = set()
    for folder in cuts.all():
        seen.add(state(folder, cuts.before))
        check(folder, cuts.before, cuts.changes)
    assert seen == {
        "past not kept, images as before",
        "past partly kept, images as before",
        "past whole kept, images as before",
        "past whole kept, images changed",
    }


def test_a_build_that_keeps_the_past_twice_is_caught(
    in_memory: Path, seed: int, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what is half-written for the past. That the first record counts would still save it."""
    monkeypatch.setattr(apply, "_kept", lambda undo, segment: 0)
    cuts = PowerCuts(in_memory, seed)
    with pytest.raises(AssertionError, match="not the past"):
        for folder in cuts.all():
            check(folder, cuts.before, cuts.changes)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("pwritev", errno.ENOSPC),
        ("pwrite", errno.ENOSPC),
        ("fallocate", errno.EIO),
        ("preadv", errno.EIO),
        ("fdatasync", errno.EIO),
        ("fsync", errno.EIO),
        ("unlink", errno.EIO),
    ],
)
def test_whatever_fails_is_told_and_can_be_done_again(
    in_memory: Path, seed: int, tiny: None, kind: str, error: int
) -> None:
    cuts = PowerCuts(in_memory, seed)
    for kth in counting(1):
        folder = shutil.copytree(in_memory / "start", in_memory / f"{kth}")
        files = FaultyFiles(seed + kth)
        files.fail(kind, kth, error)
        failed = False
        try:
            with group(folder, files) as here:
                here.apply(1)
        except ReplicatorError:
            failed = True
        files.power_cut()  # what was never made durable may be lost on top
        check(folder, cuts.before, cuts.changes)
        shutil.rmtree(folder)
        if not failed:
            break
    assert kth > 1


# ------------------------------------------------------------------ memory

WITHIN = """
import re, sys
from pathlib import Path
from typing import Any
from tests.replicator.log.epochs import group

def peak_kib():
    return int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

with group(Path(sys.argv[1])) as here:
    before = peak_kib()
    here.apply(1)
    print(peak_kib() - before)
"""


def test_memory_is_bounded_whatever_a_segment_holds(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng, {1: 192 * MIB})
    dense = Change(1, Interval(0, 4 * MIB), (Extent(0, 4 * MIB),), bytes(range(256)) * (4 * MIB // 256))
    zeros = tuple(Extent(offset, SECTOR, True) for offset in range(0, 16 * MIB, 2 * SECTOR))
    sparse = Change(1, Interval(0, 16 * MIB), zeros, b"")
    changes = [moved(dense, number * 4 * MIB) for number in range(16)]
    changes += [moved(sparse, (4 + number) * 16 * MIB) for number in range(8)]
    with group(tmp_path) as here:
        log = Log.create(Files(), here.dir_fd, Kind.REDO, 1, SEED)
        for each in changes:
            log.write([frame(each, 1, 1)])
        log.finish()
        log.close()
    done = subprocess.run(
        [sys.executable, "-c", WITHIN, tmp_path], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 48 * KIB
