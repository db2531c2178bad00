"""Disks that are mostly holes cost what their data costs; memory grows with neither disk nor load."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agents.harness import MIB, Done, Target, identical, make_disk, receiving, send

TIB = 1024 * 1024 * MIB
PEAK_MAX_BYTES = 256 * MIB


@pytest.fixture
def target(tmp_path: Path):
    with receiving(tmp_path / "target") as target:
        yield target


def within_memory(done: Done, target: Target) -> dict:
    document = done.ok
    assert done.peak_bytes <= PEAK_MAX_BYTES
    assert target.process.peak_bytes() <= PEAK_MAX_BYTES
    return document


@pytest.mark.peer("qemu-img")
def test_two_tebibytes_of_holes_cost_what_their_data_costs(
    tmp_path: Path, target: Target, count: Callable
) -> None:
    pieces = count(64, 1024)  # of 1 MiB
    step = 2 * TIB // pieces
    # Each at another place within its stretch, the last one at the disk's end.
    places = [number * step + number * 4096 for number in range(pieces - 1)] + [2 * TIB - MIB]
    sparse = make_disk(tmp_path / "sparse.img", 2 * TIB, *((place, MIB) for place in places))
    dense = make_disk(tmp_path / "dense.img", 0)
    with sparse.open("rb") as data, dense.open("wb") as file:
        for place in places:
            data.seek(place)
            file.write(data.read(MIB))
    state = tmp_path / "state"
    of_sparse = within_memory(send(sparse, target.address, state, token=target.token), target)
    of_dense = within_memory(send(dense, target.address, state), target)
    assert of_sparse["read_bytes"] == pieces * MIB == of_dense["read_bytes"]
    assert of_sparse["zero_bytes"] == 2 * TIB - pieces * MIB
    assert of_sparse["sent_bytes"] == pytest.approx(of_dense["sent_bytes"], rel=0.2)
    flat = target.directory / "sparse-flat.vmdk"
    assert flat.stat().st_size == 2 * TIB
    assert flat.stat().st_blocks * 512 <= 1.1 * pieces * MIB
    assert identical(sparse, target.directory / "sparse.vmdk")


def half_random(path: Path, size: int) -> Path:
    """Random bytes and text by turns: frames that compress, and every level has work."""
    make_disk(path, size)
    with path.open("r+b") as file:
        for start in range(0, size, MIB):
            file.seek(start)
            file.write(b"%015d\n" % start * (MIB // 32))
    return path


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (256 * MIB, ("--streams", "16", "--compression", "off")),
        (256 * MIB, ("--streams", "16")),
        (64 * MIB, ("--streams", "16", "--compression", "19")),
    ],
    ids=["raw", "auto", "19"],
)
def test_memory_is_bounded_under_load(
    size: int, options: tuple[str, ...], tmp_path: Path, target: Target
) -> None:
    source = half_random(tmp_path / "disk.img", size)
    done = send(source, target.address, tmp_path / "state", *options, token=target.token)
    document = within_memory(done, target)
    assert document["read_bytes"] == size


def test_memory_is_bounded_while_several_disks_are_received(tmp_path: Path, target: Target) -> None:
    """One after the other in one target: what a session held is given back."""
    state = tmp_path / "state"
    peaks = []
    for number in range(4):
        source = make_disk(tmp_path / f"disk{number}.img", 96 * MIB)
        within_memory(send(source, target.address, state, "--streams", "16", token=target.token), target)
        source.unlink()
        peaks.append(target.process.peak_bytes())
    # The first may have needed little: what one session may hold and what is kept for the next come on top.
    assert peaks[-1] <= peaks[0] + (48 + 64) * MIB
