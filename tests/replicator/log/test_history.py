"""Rolling back gives the old content, from whatever state; two histories merged say what they said apart."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count as counting
from pathlib import Path

import pytest

from protocol.constants import EXTENT_BYTES
from protocol.messages import Interval
from protocol.payload import Extent
from replicator.errors import StateError
from replicator.files import Files
from replicator.log import history, workspace
from replicator.log.history import merge, roll_back
from replicator.log.log import Kind, Log
from replicator.log.workspace import Workspace
from tests.faulty_files import FaultyFiles, PowerCut
from tests.replicator.log.batches import KIB, MIB, SEED, held
from tests.replicator.log.epochs import (
    SECTOR,
    Change,
    Group,
    Models,
    change,
    changed,
    frame,
    group,
    image_path,
    make_images,
    random_epoch,
    said,
    undone,
    write_redo,
)


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


# ------------------------------------------------------------------ rolling back


def test_an_epoch_that_was_applied_in_part_is_undone(
    tmp_path: Path, rng: random.Random, count: Callable[[int, int], int]
) -> None:
    for number in range(count(5, 100)):
        before = make_images(tmp_path / f"{number}", rng)
        with group(tmp_path / f"{number}") as here:
            write_redo(here.dir_fd, 1, random_epoch(rng), rng)
            undo = here.apply(1, segments=rng.randrange(4))
            assert undo is not None
            for _ in range(2):
                roll_back(undo, here.bases, SEED)
                assert here.contents() == before


def test_an_epoch_that_was_given_up_can_be_followed_by_another(tmp_path: Path, rng: random.Random) -> None:
    before = make_images(tmp_path, rng)
    changes = random_epoch(rng)
    with group(tmp_path) as here:
        write_redo(here.dir_fd, 1, random_epoch(rng), rng)
        given_up = here.apply(1, segments=1)
        assert given_up is not None
        roll_back(given_up, here.bases, SEED)
        write_redo(here.dir_fd, 2, changes, rng)
        undo = here.apply(2)
        assert undo is not None
        assert here.contents() == changed(before, changes)
        assert undone(here.contents(), undo) == before


def test_of_two_records_about_a_byte_the_first_is_put_back_last(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng)
    first, second = (change(rng, 4, [Extent(0, 2 * SECTOR)]) for _ in range(2))
    with group(tmp_path) as here:
        undo = here.log(Kind.UNDO, 1)
        undo.write([frame(first, 1, None), frame(second, 1, None)])
        undo.roll()
        undo.write([frame(second, 1, None)])
        roll_back(undo, here.bases, SEED)
        assert here.contents()[4][: 2 * SECTOR] == first.raw


def test_a_thin_image_is_as_thin_as_before(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng, {})
    with open(image_path(tmp_path, 1), "wb") as file:
        file.truncate(16 * MIB)
    with group(tmp_path) as here:
        write_redo(
            here.dir_fd,
            1,
            [Change(1, Interval(0, 4 * MIB), (Extent(0, 4 * MIB),), rng.randbytes(4 * MIB))],
            rng,
        )
        undo = here.apply(1)
        assert undo is not None
        assert image_path(tmp_path, 1).stat().st_blocks * 512 >= 4 * MIB
        roll_back(undo, here.bases, SEED)
        assert image_path(tmp_path, 1).stat().st_blocks == 0


def test_nothing_is_put_back_when_a_disk_is_missing(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng)
    with group(tmp_path) as here:
        write_redo(here.dir_fd, 1, [change(rng, disk, [Extent(0, SECTOR)]) for disk in (1, 4)], rng)
        undo = here.apply(1)
        assert undo is not None
        after = here.contents()
        with pytest.raises(StateError, match="disk 4") as caught:
            roll_back(undo, {1: here.bases[1]}, SEED)
        assert caught.value.code == "log.disk_missing"
        assert here.contents() == after


def test_a_rolling_back_that_the_power_cut_is_done_again(in_memory: Path, seed: int) -> None:
    rng = random.Random(seed)
    before = make_images(in_memory / "start", rng, {1: 300 * KIB})
    with group(in_memory / "start") as here:
        write_redo(here.dir_fd, 1, random_epoch(rng, {1: 300 * KIB}, share=1), rng)
        here.apply(1)
    for kth in counting(1):
        folder = shutil.copytree(in_memory / "start", in_memory / "cut")
        files = FaultyFiles(seed + kth)
        files.cut_before(kth)
        cut = False
        try:
            with group(folder, files) as here:
                roll_back(here.log(Kind.UNDO, 1), here.bases, SEED)
        except PowerCut:
            cut = True
        files.power_cut()
        with group(folder) as here:
            if cut:
                roll_back(here.log(Kind.UNDO, 1), here.bases, SEED)
            assert here.contents() == before, f"cut before call {kth}"
        shutil.rmtree(folder)
        if not cut:
            break


# ------------------------------------------------------------------ merging


def two_histories(here: Group, before: Models, rng: random.Random) -> tuple[Log, Log]:
    """Apply epochs 1 and 2; their undo."""
    logs = []
    for epoch in (1, 2):
        write_redo(here.dir_fd, epoch, random_epoch(rng, share=0.8), rng)
        undo = here.apply(epoch, workspace=Workspace(rng.choice((None, 1))))
        assert undo is not None
        undo.finish()
        logs.append(undo)
    return logs[0], logs[1]


def test_merged_they_lead_to_where_they_led_one_after_the_other(
    tmp_path: Path, rng: random.Random, count: Callable[[int, int], int]
) -> None:
    for number in range(count(5, 200)):
        before = make_images(tmp_path / f"{number}", rng)
        with group(tmp_path / f"{number}") as here:
            older, newer = two_histories(here, before, rng)
            into = here.log(Kind.UNDO, 100)
            merge(older, newer, into, SEED, Workspace(rng.choice((None, 1))))
            assert into.finished
            assert undone(here.contents(), older, newer) == before
            assert undone(here.contents(), into) == before
            roll_back(into, here.bases, SEED)
            assert here.contents() == before


def test_merged_they_hold_every_byte_once(tmp_path: Path, rng: random.Random) -> None:
    before = make_images(tmp_path, rng)
    with group(tmp_path) as here:
        older, newer = two_histories(here, before, rng)
        into = here.log(Kind.UNDO, 100)
        merge(older, newer, into, SEED)
        merged = sectors(into)
        assert len(merged) == len(set(merged))
        assert set(merged) == {*sectors(older), *sectors(newer)}
        assert {header.epoch for header, _ in held(into)} == {100}


def sectors(log: Log) -> list[tuple[int, int]]:
    """Disk and offset of every sector that it says something of."""
    return [
        (disk, position)
        for disk, extent, _ in said(log)
        for position in range(extent.offset, extent.end, SECTOR)
    ]


def undo_log(here: Group, epoch: int, *changes: Change) -> Log:
    """An undo log that says this."""
    log = here.log(Kind.UNDO, epoch)
    log.write([frame(each, epoch, None) for each in changes])
    log.finish()
    return log


def test_long_zeros_over_scattered_sectors_stay_zeros_between_them(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_STEP_BYTES", 64 * KIB)
    monkeypatch.setattr(workspace, "SLOTS", 3)
    make_images(tmp_path, rng)
    scattered = [Extent(offset, SECTOR) for offset in range(SECTOR, 3 * MIB, 2 * SECTOR)]
    data = [change(rng, 1, scattered[at : at + 1000]) for at in range(0, len(scattered), 1000)]
    with group(tmp_path) as here:
        older = undo_log(here, 1, *data)
        newer = undo_log(here, 2, Change(1, Interval(0, 3 * MIB), (Extent(0, 3 * MIB, True),), b""))
        into = here.log(Kind.UNDO, 3)
        merge(older, newer, into, SEED)
        content = {1: b"x" * (3 * MIB)}
        assert undone(content, into) == undone(content, older, newer) != content
        assert max(header.table_len for header, _ in held(into)) <= 1024 * EXTENT_BYTES


def test_a_log_is_merged_with_an_empty_one_to_itself(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng)
    some = [change(rng, 1, [Extent(offset, 3 * SECTOR)]) for offset in (0, MIB)]
    with group(tmp_path) as here:
        full, empty = undo_log(here, 1, *some), undo_log(here, 2)
        for number, pair in ((3, (full, empty)), (4, (empty, full))):
            into = here.log(Kind.UNDO, number)
            merge(*pair, into, SEED)
            assert said(into) == said(full)


def test_a_record_that_was_damaged_before_it_was_written_is_told(tmp_path: Path, rng: random.Random) -> None:
    make_images(tmp_path, rng)
    with group(tmp_path) as here:
        older = undo_log(here, 1, change(rng, 1, [Extent(0, SECTOR)]))
        header, body = frame(change(rng, 1, [Extent(0, 2 * SECTOR)]), 2, None)
        newer = Log.create(Files(), here.dir_fd, Kind.UNDO, 2, SEED)
        newer.write([(replace(header, raw_hash=1), body)])
        with pytest.raises(StateError) as caught:
            merge(older, newer, here.log(Kind.UNDO, 3), SEED)
        assert caught.value.code == "log.damaged"
        newer.close()
