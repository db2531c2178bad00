"""Disks that are sent together: one epoch, one recovery point, one line of progress."""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.agents.harness import MIB, Target, identical, make_disk, send, sending, sidecar
from tests.real_disks import loop_device

pytestmark = pytest.mark.peer("qemu-img")

NAMES = ("system", "data", "logs")
SIZES = {"system": 24 * MIB, "data": 8 * MIB + 512, "logs": 3 * MIB}
BLOCK = 4096


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [make_disk(tmp_path / f"{name}.img", SIZES[name]) for name in NAMES]


def others(sources: list[Path], *options: str) -> tuple[str, ...]:
    """What follows the first source on the command line."""
    return (*map(str, sources[1:]), "--group", "web", *options)


def arrived(sources: list[Path], target: Target, epoch: str, names: tuple[str, ...] = NAMES) -> None:
    for source, name in zip(sources, names, strict=True):
        assert identical(source, target.directory / f"{name}.vmdk"), name
        card = sidecar(target.directory, name)
        assert (card["state"], card["epoch"]) == ("clean", epoch), name


def scribble(path: Path, blocks: int, seed: int) -> None:
    rng = random.Random(seed)
    with path.open("r+b") as file:
        for number in rng.sample(range(path.stat().st_size // BLOCK), blocks):
            file.seek(number * BLOCK)
            file.write(rng.randbytes(BLOCK))


def test_a_group_is_one_epoch_of_all_its_disks(
    sources: list[Path], target: Target, state: Path, seed: int
) -> None:
    done = send(sources[0], target.address, state, *others(sources), token=target.token).ok
    assert (done["group"], done["disk"], done["disks"]) == ("web", "system", list(NAMES))
    assert (done["vmdk"], done["mode"], done["fuzzy"]) == ("system.vmdk", "full", False)
    assert (done["consistency"], done["passes"]) == ("crash", 1)
    assert 0 < done["sealed_seconds"] <= done["seconds"]
    assert done["recovery_point"] in (None, done["epoch"])
    assert done["read_bytes"] == sum(SIZES.values())
    arrived(sources, target, done["epoch"])

    scribble(sources[1], 20, seed)
    again = send(sources[0], target.address, state, *others(sources)).ok
    assert (again["mode"], again["epoch"] != done["epoch"]) == ("incremental", True)
    assert again["matched_bytes"] == sum(SIZES.values()) - 20 * BLOCK
    assert again["sent_bytes"] <= 20 * BLOCK + 65536
    arrived(sources, target, again["epoch"])


def test_the_disks_have_the_names_that_are_given_in_their_order(
    sources: list[Path], target: Target, state: Path
) -> None:
    names = ("a", "b", "system")
    named = tuple(word for name in names for word in ("--disk", name))
    done = send(sources[0], target.address, state, *others(sources, *named), token=target.token).ok
    assert (done["disk"], done["disks"], done["vmdk"]) == ("a", list(names), "a.vmdk")
    arrived(sources, target, done["epoch"], names)


def test_one_disk_may_have_a_group_of_another_name(sources: list[Path], target: Target, state: Path) -> None:
    options = ("--group", "web", "--disk", "os")
    done = send(sources[0], target.address, state, *options, token=target.token).ok
    assert (done["group"], done["disks"]) == ("web", ["os"])
    # The group has another name: the disk is another one's.
    refused = send(sources[0], target.address, state, "--disk", "os")
    assert refused.error["code"] == "disk.name_taken"
    alone = send(sources[1], target.address, state).ok
    assert (alone["group"], alone["disk"]) == ("data", "data")


def test_a_group_that_was_killed_goes_on_where_it_was(
    sources: list[Path], target: Target, state: Path
) -> None:
    options = others(sources, "--compression", "off")
    with sending(
        sources[0], target.address, state, *options, token=target.token, failpoint="send.acknowledged:2"
    ) as process:
        assert process.wait().status == -signal.SIGKILL
    done = send(sources[0], target.address, state, *options, token=target.token).ok
    assert done["sent_bytes"] < sum(SIZES.values()) and done["passes"] == 1
    arrived(sources, target, done["epoch"])


@pytest.mark.peer("losetup")
@pytest.mark.parametrize("quiesced", [False, True])
def test_a_group_is_worth_what_its_least_certain_disk_is(
    sources: list[Path], target: Target, state: Path, quiesced: bool
) -> None:
    with loop_device(sources[1]) as device:
        options = (str(device), "--group", "web", "--disk", "a", "--disk", "b", *["--quiesced"] * quiesced)
        done = send(sources[0], target.address, state, *options, token=target.token)
    assert done.ok["fuzzy"] is not quiesced
    assert done.ok["consistency"] == ("crash" if quiesced else "fuzzy")
    assert done.ok["passes"] == 1  # nothing tells whether another pass would help
    if not quiesced:
        assert done.ok["recovery_point"] is None
    assert identical(sources[0], target.directory / "a.vmdk")
    assert identical(sources[1], target.directory / "b.vmdk")


@pytest.mark.peer("losetup")
def test_a_device_is_one_disk_by_whatever_name_it_goes(
    sources: list[Path], target: Target, tmp_path: Path
) -> None:
    with loop_device(sources[0]) as device:
        twin = tmp_path / "twin"
        os.mknod(twin, device.stat().st_mode, device.stat().st_rdev)
        refused = send(device, target.address, tmp_path / "state", str(twin), "--group", "web")
    assert (refused.error["code"], refused.status) == ("usage.sources", 2)


def test_a_disk_of_the_group_that_changes_meanwhile_has_all_of_them_sent_again(
    sources: list[Path], target: Target, state: Path, seed: int
) -> None:
    """Their recovery point is of one moment, so another pass is of all of them."""
    options = others(sources, "--compression", "off")
    with sending(
        sources[0], target.address, state, *options, token=target.token, failpoint="send.acknowledged:2"
    ) as process:
        process.wait()
    scribble(sources[2], 5, seed)
    done = send(sources[0], target.address, state, *options, token=target.token)
    assert (done.ok["passes"], done.ok["fuzzy"], done.ok["consistency"]) == (2, False, "crash")
    assert "may have changed" in done.stderr
    arrived(sources, target, done.ok["epoch"])
