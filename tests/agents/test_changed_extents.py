"""`send --changed-extents`: a tracker's list spares the reading of the whole disk, and is never believed
too far.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.agents.harness import MIB, Done, Target, identical, make_disk, send

pytestmark = pytest.mark.peer("qemu-img")

SIZE = 64 * MIB
GIB = 1024 * MIB
BLOCK = 4096


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SIZE)


def scribble(path: Path, seed: int, blocks: int) -> list[list[int]]:
    """Write to so many blocks of 4 KiB; the extents that a tracker would list, in no order."""
    rng = random.Random(seed)
    numbers = rng.sample(range(path.stat().st_size // BLOCK), blocks)
    with path.open("r+b") as file:
        for number in numbers:
            file.seek(number * BLOCK)
            file.write(rng.randbytes(BLOCK))
    return [[number * BLOCK, BLOCK] for number in numbers]


def list_file(folder: Path, since: str, **disks: Any) -> str:
    path = folder / "changes.json"
    path.write_text(json.dumps({"since": since, "disks": disks}))
    return str(path)


def sent_with(source: Path, target: Target, state: Path, listed: str, *options: str) -> Done:
    return send(source, target.address, state, "--changed-extents", listed, *options)


def test_cycles_by_lists_alone_keep_the_copy_equal(
    source: Path, target: Target, state: Path, tmp_path: Path, seed: int
) -> None:
    last = send(source, target.address, state, token=target.token).ok
    for cycle in range(4):
        listed = list_file(tmp_path, last["epoch"], disk=scribble(source, seed + cycle, 30))
        done = sent_with(source, target, state, listed)
        last = done.ok
        assert (last["mode"], last["fuzzy"], last["passes"]) == ("incremental", False, 1)
        assert last["matched_bytes"] == SIZE - 30 * BLOCK
        assert last["sent_bytes"] <= 30 * BLOCK + 16384
        assert "is not used" not in done.stderr
        assert identical(source, target.directory / "disk.vmdk")
    # The map was carried on: without a list nothing has to be asked or sent.
    after = send(source, target.address, state).ok
    assert (after["mode"], after["matched_bytes"], after["read_bytes"]) == ("incremental", SIZE, 0)


def test_what_is_not_listed_is_not_looked_at(
    source: Path, target: Target, state: Path, tmp_path: Path, seed: int
) -> None:
    """A tracker that forgets something shows that its word was taken; the next send without it heals that."""
    first = send(source, target.address, state, token=target.token).ok
    extents = scribble(source, seed, 20)
    done = sent_with(source, target, state, list_file(tmp_path, first["epoch"], disk=extents[:10])).ok
    assert done["mode"] == "incremental"
    assert not identical(source, target.directory / "disk.vmdk")
    assert send(source, target.address, state).ok["mode"] == "incremental"
    assert identical(source, target.directory / "disk.vmdk")


def test_a_list_since_an_older_epoch_is_told_and_not_used(
    source: Path, target: Target, state: Path, tmp_path: Path, seed: int
) -> None:
    first = send(source, target.address, state, token=target.token).ok
    scribble(source, seed, 10)
    second = send(source, target.address, state).ok
    scribble(source, seed + 1, 10)
    done = sent_with(source, target, state, list_file(tmp_path, first["epoch"], disk=[]))
    assert done.ok["mode"] == "incremental"  # by the map
    assert f"is not used: it is since epoch {first['epoch']}" in done.stderr
    assert f"the target's newest is {second['epoch']}" in done.stderr
    assert identical(source, target.directory / "disk.vmdk")


def test_a_list_is_not_used_for_a_vmdk_that_somebody_else_has_written_to(
    source: Path, target: Target, state: Path, tmp_path: Path, seed: int
) -> None:
    first = send(source, target.address, state, token=target.token).ok
    scribble(target.directory / "disk-flat.vmdk", seed, 10)
    done = sent_with(source, target, state, list_file(tmp_path, first["epoch"], disk=[]))
    assert done.ok["mode"] == "resync" and "is not used" in done.stderr
    assert identical(source, target.directory / "disk.vmdk")


def test_a_first_send_takes_everything_whatever_is_listed(
    source: Path, target: Target, state: Path, tmp_path: Path
) -> None:
    listed = list_file(tmp_path, "5" * 32, disk=[])
    options = ("--changed-extents", listed)
    done = send(source, target.address, state, *options, token=target.token)
    assert done.ok["mode"] == "full" and "is not used" in done.stderr
    assert identical(source, target.directory / "disk.vmdk")


def test_a_list_of_a_group_names_all_its_disks(
    source: Path, target: Target, state: Path, tmp_path: Path, seed: int
) -> None:
    other = make_disk(tmp_path / "other.img", 8 * MIB)
    group = (str(other), "--group", "web")
    first = send(source, target.address, state, *group, token=target.token).ok
    extents = scribble(other, seed, 5)
    listed = list_file(tmp_path, first["epoch"], disk=[], other=extents)
    done = sent_with(source, target, state, listed, *group).ok
    assert (done["mode"], done["matched_bytes"]) == ("incremental", SIZE + 8 * MIB - 5 * BLOCK)
    assert identical(source, target.directory / "disk.vmdk")
    assert identical(other, target.directory / "other.vmdk")


def test_a_vast_disk_costs_what_is_listed(target: Target, state: Path, tmp_path: Path, seed: int) -> None:
    """2 TiB, most of it never written, without the sender's map, and holes that would take long to list."""
    source = make_disk(tmp_path / "vast.img", 2048 * GIB, (0, MIB), (1024 * GIB, MIB), (2047 * GIB, MIB))
    first = send(source, target.address, state, token=target.token).ok
    extents = [[1024 * GIB, BLOCK], [2047 * GIB + 512, 512], [500 * GIB, BLOCK]]
    with source.open("r+b") as written:
        for offset, length in extents:
            written.seek(offset)
            written.write(random.Random(seed).randbytes(length))
    done = sent_with(source, target, state, list_file(tmp_path, first["epoch"], vast=extents)).ok
    assert done["mode"] == "incremental"
    assert done["sent_bytes"] < 3 * BLOCK + 512 * 250  # a frame every 4 GiB
    assert done["read_bytes"] == 3 * 65536
    assert done["seconds"] < 30
    with source.open("rb") as ours, (target.directory / "vast-flat.vmdk").open("rb") as theirs:
        for offset, length in extents:
            for file in (ours, theirs):
                file.seek(offset)
            assert ours.read(length) == theirs.read(length)
