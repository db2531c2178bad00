"""What a process server remembers: whatever happens to it, it believes the sealed epoch's maps or none."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from protocol.messages import NO_ID
from replicator.digest import Digester
from replicator.digest_map import PAGE_SPAN_BYTES
from replicator.errors import StateError
from replicator.files import Files
from replicator.private_directory import PrivateDirectory
from replicator.sender_state import FILE, GroupMemory, GroupRecord

PIN, OTHER_PIN = b"p" * 32, b"q" * 32
SEED = 7
SIZE = 2 * PAGE_SPAN_BYTES + 512
SIZES = {"system": SIZE, "data": 512}
FIRST, SECOND = b"1" * 16, b"2" * 16
SOURCES = {"system": "1 2 3", "data": "4 5 6"}

SEAL = """
import random, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from tests.replicator.test_sender_state import *
memory = memory_in(Path(sys.argv[1]))
seal(memory, SECOND)
"""
STEPS = [
    "epoch.before_begin",
    "epoch.begun",
    "epoch.before_publish",
    "epoch.published",
    *(
        f"replace.{step}:{nth}"
        for step in ("before_write", "before_fsync", "before_rename")
        for nth in (1, 2)
    ),
    *(f"replace.{step}:{nth}" for step in ("before_fsync_dir", "done") for nth in (1, 2)),
]


def memory_in(path: Path, pin: bytes = PIN, group: str = "web") -> GroupMemory:
    return GroupMemory(PrivateDirectory(Files(), path), pin, group)


def row_of(epoch: bytes, disk: str) -> bytes:
    blocks = -(-SIZES[disk] // (64 * 1024))
    return random.Random(epoch + disk.encode()).randbytes(16 * blocks)


def seal(memory: GroupMemory, epoch: bytes, without: Sequence[str] = ()) -> None:
    """An epoch from its beginning to its end."""
    memory.begin(epoch, SOURCES)
    builders = {}
    for number, (disk, size) in enumerate(SIZES.items(), 1):
        builder = memory.build(epoch, number, size, SEED)
        told = Digester(SEED)
        if disk not in without:
            told.rows.append((0, row_of(epoch, disk)))
        builder.take(told)
        builders[disk] = (builder, size)
    memory.publish(epoch, builders)


def believed(memory: GroupMemory, sizes: dict[str, int] | None = None, seed: int = SEED) -> bytes | None:
    """The epoch whose maps are believed; they must be exactly its own."""
    record = memory.load()
    maps = memory.open_maps(record, SIZES if sizes is None else sizes, seed)
    if not maps:
        return None
    assert maps.keys() == SIZES.keys()
    for disk, opened in maps.items():
        assert opened.digests(0, SIZES[disk]) == row_of(record.sealed, disk)
        opened.close()
    return record.sealed


def folder_of(path: Path) -> Path:
    (found,) = (path / "groups").iterdir()
    return found


def test_what_was_sealed_is_believed_and_only_its_maps_are_kept(tmp_path: Path) -> None:
    assert memory_in(tmp_path).load() == GroupRecord()
    for epoch in (FIRST, SECOND):
        seal(memory_in(tmp_path), epoch)
        assert believed(memory_in(tmp_path)) == epoch
        assert memory_in(tmp_path).load().under_way == NO_ID
        assert len(list(folder_of(tmp_path).glob("*.map"))) == len(SIZES)


def test_an_epoch_under_way_is_remembered_and_its_maps_are_not_believed(tmp_path: Path) -> None:
    seal(memory_in(tmp_path), FIRST)
    memory = memory_in(tmp_path)
    memory.begin(SECOND, SOURCES)
    builder = memory.build(SECOND, 1, SIZE, SEED)
    builder.record(0, row_of(SECOND, "system"))
    builder.finish()
    record = memory_in(tmp_path).load()
    assert (record.under_way, record.sources, record.sealed) == (SECOND, SOURCES, FIRST)
    assert believed(memory_in(tmp_path)) == FIRST


def test_one_incomplete_map_makes_all_of_them_none(tmp_path: Path) -> None:
    seal(memory_in(tmp_path), FIRST)
    seal(memory_in(tmp_path), SECOND, without=["system"])
    assert memory_in(tmp_path).load().sealed == SECOND
    assert believed(memory_in(tmp_path)) is None


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_the_old_or_the_new_map_or_none_is_believed(tmp_path: Path, step: str) -> None:
    seal(memory_in(tmp_path), FIRST)
    root = str(Path(__file__).resolve().parents[2])
    killed = subprocess.run(
        [sys.executable, "-c", SEAL, str(tmp_path), root],
        env=os.environ | {"FAILPOINT": step},
        cwd=root,
        check=False,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    memory = memory_in(tmp_path)
    record = memory.load()
    second_is_durable = step == "epoch.published" or step in {"replace.before_fsync_dir:2", "replace.done:2"}
    assert believed(memory) == (SECOND if second_is_durable else FIRST)
    assert record.under_way in ({NO_ID} if second_is_durable else {NO_ID, SECOND})
    if step in {"epoch.begun", "epoch.before_publish"}:
        assert (record.under_way, record.sources) == (SECOND, SOURCES)
    seal(memory, b"3" * 16)
    assert believed(memory_in(tmp_path)) == b"3" * 16
    assert len(list(folder_of(tmp_path).glob("*.map"))) == len(SIZES)


def test_maps_of_another_target_group_size_or_seed_are_not_believed(tmp_path: Path) -> None:
    seal(memory_in(tmp_path), FIRST)
    assert believed(memory_in(tmp_path, pin=OTHER_PIN)) is None
    assert believed(memory_in(tmp_path, group="db")) is None
    assert believed(memory_in(tmp_path), sizes=SIZES | {"data": 1024}) is None
    assert believed(memory_in(tmp_path), sizes={"system": SIZE}) is None
    assert believed(memory_in(tmp_path), sizes=SIZES | {"third": 512}) is None
    assert believed(memory_in(tmp_path), seed=SEED + 1) is None
    assert believed(memory_in(tmp_path)) == FIRST


def test_files_moved_over_from_another_group_are_not_believed(tmp_path: Path) -> None:
    seal(memory_in(tmp_path), FIRST)
    mine = folder_of(tmp_path)
    other = memory_in(tmp_path, pin=OTHER_PIN, group="db")
    seal(other, SECOND)
    (theirs,) = set((tmp_path / "groups").iterdir()) - {mine}
    record = (mine / FILE).read_bytes()
    (mine / FILE).write_bytes((theirs / FILE).read_bytes())
    assert memory_in(tmp_path).load() == GroupRecord()
    (mine / FILE).write_bytes(record)
    for number in (1, 2):
        target = mine / f"{FIRST.hex()}-{number}.map"
        kept = target.read_bytes()
        target.write_bytes((theirs / f"{SECOND.hex()}-{number}.map").read_bytes())
        assert believed(memory_in(tmp_path)) is None
        target.write_bytes(kept)
    first, second = (mine / f"{FIRST.hex()}-{number}.map" for number in (1, 2))
    first.rename(mine / "spare")
    second.rename(first)
    (mine / "spare").rename(second)
    assert believed(memory_in(tmp_path)) is None


def test_an_old_record_with_the_maps_of_a_newer_epoch_believes_nothing(tmp_path: Path) -> None:
    seal(memory_in(tmp_path), FIRST)
    old = (folder_of(tmp_path) / FILE).read_bytes()
    seal(memory_in(tmp_path), SECOND)
    (folder_of(tmp_path) / FILE).write_bytes(old)
    assert believed(memory_in(tmp_path)) is None


def test_no_damaged_record_leads_to_a_map_that_is_not_its_own(tmp_path: Path, seed: int, count) -> None:
    seal(memory_in(tmp_path), FIRST)
    memory_in(tmp_path).begin(SECOND, SOURCES)
    path, rng = folder_of(tmp_path) / FILE, random.Random(seed)
    good = path.read_bytes()
    damaged = [good[:cut] for cut in range(0, len(good) - 1, 7)]
    for _ in range(count(150, 5_000)):
        content = bytearray(good)
        content[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(content))
    damaged += [b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, good.replace(b"1, ", b'"1", ')]
    for spoilt in damaged:
        path.write_bytes(spoilt)
        memory = memory_in(tmp_path)
        record = memory.load()
        maps = memory.open_maps(record, SIZES, SEED)
        for disk, opened in maps.items():  # a flip may name another epoch: the target then knows no such
            assert opened.digests(0, SIZES[disk]) == row_of(FIRST, disk)
            opened.close()
        assert record == GroupRecord() or record.sealed == FIRST or len(record.sealed) == 16


def test_nothing_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    seal(memory_in(tmp_path), FIRST)
    believed(memory_in(tmp_path))
    (folder_of(tmp_path) / f"{FIRST.hex()}-2.map").write_bytes(b"x" * 4096)
    assert believed(memory_in(tmp_path)) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_map_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    memory = memory_in(tmp_path)
    memory.begin(FIRST, SOURCES)
    (folder_of(tmp_path) / f"{FIRST.hex()}-1.map").mkdir()
    with pytest.raises(StateError, match="cannot be written"):
        memory.build(FIRST, 1, SIZE, SEED)
