"""kill -9 of the target at each durable step of a second send: its disk is at one of two epochs,
or on its way from one to the other, for which nobody is needed but the target.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.agents.harness import (
    MIB,
    digest,
    half_made,
    identical,
    make_disk,
    receiving,
    send,
    sidecar,
    tree,
)
from tests.agents.retention import durable, epochs_of

pytestmark = pytest.mark.peer("qemu-img")

KILLED = -9
SIZE = 6 * MIB + 512
# Where the target dies, in the order of things; if a name is reached again, each time. True: in every run.
BEFORE_DATA = {"log.before_create": False, "log.created": False, "log.before_write": False}
BEFORE_THE_SEAL = {
    "log.written": True,
    "session.before_ack": False,
    "session.acked": True,
    "session.before_sealed": False,
    "log.before_finish": False,
    "log.finished": True,
    "seal.before_record": False,
    "seal.recorded": True,
}
SEALED = {
    "session.sealed": True,
    "sidecar.before_mark": False,
    "sidecar.marked": False,
    "log.before_create:2": False,
    "log.created:2": False,
    "apply.before_undo": True,
    "apply.undo_kept": True,
    "apply.before_base": False,
    "apply.base_written": True,
    "image.before_sync": False,
    "image.synced": False,
    "apply.base_synced": True,
    "log.before_drop": False,
    "log.dropped": False,
    "apply.dropped": True,
    "image.before_publish": False,
    "image.published": True,
    "sidecar.before_mark:2": False,
    "sidecar.marked:2": False,
    "log.before_finish:2": False,
    "log.finished:2": True,
}
STEPS = ("before_write", "before_fsync", "before_rename", "before_fsync_dir", "done")
# What a target replaces in the course of one start and a second send.
REPLACED = {
    2: "catalogue, under way",
    3: "group, sealed",
    4: "catalogue, sealed",
    5: "sidecar, dirty",
    6: "descriptor",
    7: "sidecar, clean",
}


def is_sealed(failpoint: str) -> bool:
    """Whether the epoch counts when the target dies there: the catalogue names it."""
    step, _, number = failpoint.removeprefix("replace.").partition(":")
    if failpoint.startswith("replace."):
        return int(number) > 4 or (int(number) == 4 and step in STEPS[3:])
    return failpoint in SEALED


def cases() -> list[Any]:
    everyday = BEFORE_DATA | BEFORE_THE_SEAL | SEALED
    for number in REPLACED:
        everyday |= {f"replace.{step}:{number}": (number, step) == (4, "before_rename") for step in STEPS}
    return [
        pytest.param(failpoint, marks=() if always else (pytest.mark.release,))
        for failpoint, always in everyday.items()
    ]


class Pair(NamedTuple):
    """A source, what its sender remembers, and a target's directory: everything is at the first epoch."""

    source: Path
    state: Path
    directory: Path


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("first")
    pair = Pair(make_disk(folder / "disk.img", SIZE), folder / "state", folder / "target")
    with receiving(pair.directory) as target:
        assert send(pair.source, target.address, pair.state, token=target.token).ok["mode"] == "full"
    return pair


@pytest.fixture
def pair(first: Pair, tmp_path: Path) -> Pair:
    """A copy of the first, whose source has changed since."""
    shutil.copytree(first.source.parent, tmp_path, dirs_exist_ok=True)
    source = make_disk(tmp_path / "disk.img", SIZE, (MIB, MIB), (5 * MIB, MIB))
    return Pair(source, tmp_path / "state", tmp_path / "target")


def is_settled(directory: Path) -> bool:
    """Whether the disk says that it holds the newest sealed epoch."""
    found = sidecar(directory, "disk")
    return (found["state"], found["epoch"]) == (
        "clean",
        epochs_of(directory / ".replicator", "disk")["sealed"],
    )


@pytest.mark.parametrize("failpoint", cases())
def test_a_disk_whose_target_is_killed_is_at_one_epoch_or_gets_to_the_other_without_a_sender(
    failpoint: str, pair: Pair
) -> None:
    directory, flat = pair.directory, pair.directory / "disk-flat.vmdk"
    before, number, old = tree(directory), sidecar(directory, "disk")["disk"], digest(flat)
    with receiving(directory, failpoint=failpoint) as target:
        killed = send(pair.source, target.address, pair.state, token=target.token)
        assert killed.error["code"].startswith("link."), killed
        assert target.process.wait().status == KILLED, "the failpoint was not reached"
    if not is_sealed(failpoint):
        assert tree(directory, without=(".replicator", "disk.replica.json.new")) == before
        if failpoint in BEFORE_DATA | BEFORE_THE_SEAL:
            held = durable(directory / ".replicator", "disk").covered_bytes
            assert bool(held) == (failpoint in BEFORE_THE_SEAL)
    elif sidecar(directory, "disk")["state"] == "clean":
        assert digest(flat) == (digest(pair.source) if is_settled(directory) else old)
    with receiving(directory) as target:
        target.process.until(lambda: is_settled(directory))
        assert digest(flat) == (digest(pair.source) if is_sealed(failpoint) else old)
        assert send(pair.source, target.address, pair.state, token=target.token).ok["fuzzy"] is False
        assert identical(pair.source, directory / "disk.vmdk")
    after = sidecar(directory, "disk")
    assert (after["state"], after["disk"]) == ("clean", number), "a disk keeps its number"
    assert half_made(directory) == []
