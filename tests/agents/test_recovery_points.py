"""What `replicator recovery-points` tells after sends, and epochs that are larger than the log."""

import random
import shutil
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from replicator.log.records import Kind
from tests.agents.harness import (
    MIB,
    Target,
    digest,
    identical,
    make_disk,
    receiving,
    run,
    send,
    sending,
    sidecar,
    tree,
)
from tests.agents.proxy import proxy
from tests.agents.retention import durable, logs_of

pytestmark = pytest.mark.peer("qemu-img")

SIZE = 32 * MIB
KILLED = -signal.SIGKILL


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SIZE)


def change(source: Path, size: int = 2 * MIB) -> None:
    """Write something else into the beginning of a disk."""
    with source.open("r+b") as file:
        file.write(random.randbytes(size))


def points(directory: Path, *options: str) -> list[dict[str, Any]]:
    found = run("recovery-points", "--directory", directory, "--json", *options).ok
    assert set(found) == {"recovery_points"}
    return found["recovery_points"]


# ------------------------------------------------------------------ the list


def test_each_send_of_a_file_at_rest_makes_a_recovery_point(
    source: Path, target: Target, state: Path
) -> None:
    began = datetime.now(UTC)
    sent = []
    for _ in range(3):
        sent.append(send(source, target.address, state, token=target.token).ok)
        change(source)
    found = points(target.directory)
    assert [point["id"] for point in found] == [done["recovery_point"] for done in sent]
    assert [point["epoch"] for point in found] == [done["epoch"] for done in sent]
    assert {point["consistency"] for point in found} == {done["consistency"] for done in sent} == {"crash"}
    assert {(point["group"], *point["disks"]) for point in found} == {("disk", "disk")}
    times = [datetime.fromisoformat(point["time"]) for point in found]
    assert times == sorted(times)
    assert began - timedelta(milliseconds=1) <= times[0] and times[-1] <= datetime.now(UTC)
    assert points(target.directory, "--group", "disk") == found


def test_people_are_told_the_same_one_line_a_point(source: Path, target: Target, state: Path) -> None:
    done = send(source, target.address, state, token=target.token).ok
    told = run("recovery-points", "--directory", target.directory)
    assert (told.status, told.stdout.count("\n")) == (0, 1)
    assert {done["recovery_point"], "crash", "disk"} <= set(told.stdout.split())


def test_a_group_that_is_not_there_has_no_points(source: Path, target: Target, state: Path) -> None:
    assert send(source, target.address, state, token=target.token).ok
    assert points(target.directory, "--group", "another") == []
    told = run("recovery-points", "--directory", target.directory, "--group", "another")
    assert (told.status, told.stdout, told.stderr) == (0, "", "no recovery points\n")


def test_a_target_that_has_received_nothing_has_no_points(target: Target) -> None:
    before = tree(target.directory, without=())
    assert points(target.directory) == []
    assert tree(target.directory, without=()) == before


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_a_directory_of_no_target_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    error = run("recovery-points", "--directory", tmp_path / name, "--json").error
    assert error["code"] == "target.missing"
    assert str(tmp_path / name) in error["message"]
    assert tree(tmp_path) == before


def test_a_send_that_is_killed_halfway_is_no_point(source: Path, target: Target, state: Path) -> None:
    assert send(source, target.address, state, token=target.token).ok
    before, disk = points(target.directory), tree(target.directory)
    make_disk(source, SIZE)
    with proxy(target.port) as line:
        line.hold_after(24 * MIB)
        with sending(source, line.address, state, token=target.token) as process:
            target.process.until(lambda: durable(target.retention, "disk").covered_bytes >= 8 * MIB)
            process.signal(signal.SIGKILL)
            assert process.wait().status == KILLED
        assert points(target.directory) == before
        line.reset()
    assert tree(target.directory) == disk
    done = send(source, target.address, state, token=target.token).ok
    assert [point["id"] for point in points(target.directory)] == [before[0]["id"], done["recovery_point"]]


@pytest.mark.parametrize("failpoint", ["seal.before_record", "seal.recorded", "session.sealed"])
def test_a_point_is_listed_when_its_epoch_is_sealed_and_not_before(
    failpoint: str, source: Path, state: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "target"
    with receiving(directory) as target:
        assert send(source, target.address, state, token=target.token).ok
    before = points(directory)
    change(source)
    with receiving(directory, failpoint=failpoint) as target:
        assert send(source, target.address, state, token=target.token).error["code"].startswith("link.")
        assert target.process.wait().status == KILLED
    sealed = points(directory)
    assert sealed[:1] == before
    assert len(sealed) == (2 if failpoint == "session.sealed" else 1)
    with receiving(directory) as target:
        assert send(source, target.address, state, token=target.token).ok
    assert points(directory)[: len(sealed)] == sealed


# ------------------------------------------------------------------ epochs larger than the log

LARGE = 384 * MIB
JOURNAL = ("--journal-size", "256M")


def redo_segments(target: Target) -> list[int]:
    """Numbers of the segments that are not applied."""
    return [segment for kind, _, segment in logs_of(target.retention, "disk") if kind is Kind.REDO]


@pytest.fixture
def large(tmp_path: Path, state: Path) -> Iterator[tuple[Path, Target]]:
    """A sealed disk, of which now every block is another, and its target."""
    source = make_disk(tmp_path / "disk.img", LARGE, (0, 32 * MIB), (150 * MIB, 32 * MIB))
    with receiving(tmp_path / "target", *JOURNAL) as target:
        assert send(source, target.address, state, "--compression", "off", token=target.token).ok
        yield make_disk(tmp_path / "disk.img", LARGE), target


def test_an_epoch_larger_than_the_log_is_applied_early_and_seals(
    large: tuple[Path, Target], state: Path
) -> None:
    source, target = large
    flat = target.directory / "disk-flat.vmdk"
    old = digest(flat)
    with proxy(target.port) as line:
        line.hold_after(340 * MIB)
        with sending(source, line.address, state, "--compression", "off", token=target.token) as process:
            target.process.until(lambda: redo_segments(target)[:1] > [1])
            assert sidecar(target.directory, "disk")["state"] == "dirty"
            assert digest(flat) != old
            assert len(points(target.directory)) == 1
            line.heal()
            done = process.wait().ok
    assert (done["mode"], done["fuzzy"], done["resent_bytes"]) == ("incremental", False, 0)
    assert identical(source, target.directory / "disk.vmdk")
    assert sidecar(target.directory, "disk")["state"] == "clean"
    assert redo_segments(target) == []
    assert len(points(target.directory)) == 2


def test_an_epoch_that_was_applied_early_goes_on_after_a_kill_of_the_target(
    large: tuple[Path, Target], state: Path, tmp_path: Path
) -> None:
    source, target = large
    with proxy(target.port) as line:
        line.hold_after(340 * MIB)
        with sending(source, line.address, state, "--compression", "off", token=target.token) as process:
            target.process.until(lambda: redo_segments(target)[:1] > [1])
            target.process.signal(signal.SIGKILL)
            assert target.process.wait().status == KILLED
            assert process.wait().error["code"].startswith("link.")
    with receiving(target.directory, *JOURNAL) as again:
        done = send(source, again.address, state, "--compression", "off", token=again.token).ok
        assert done["sent_bytes"] <= LARGE - 128 * MIB, "what was durable is not sent again"
        assert identical(source, again.directory / "disk.vmdk")
        assert len(points(again.directory)) == 2


def test_an_epoch_that_was_applied_early_and_given_up_leaves_the_disk_as_it_was(
    large: tuple[Path, Target], state: Path
) -> None:
    source, target = large
    flat = target.directory / "disk-flat.vmdk"
    old = digest(flat)
    with proxy(target.port) as line:
        line.hold_after(340 * MIB)
        with sending(source, line.address, state, "--compression", "off", token=target.token) as process:
            target.process.until(lambda: redo_segments(target)[:1] > [1])
            process.signal(signal.SIGKILL)
            assert process.wait().status == KILLED
        line.reset()
        assert digest(flat) != old
        shutil.rmtree(state / "groups")
        line.hold_after(line.passed + 2 * MIB)
        with sending(source, line.address, state, "--compression", "off", token=target.token) as process:
            target.process.until(lambda: sidecar(target.directory, "disk")["state"] == "clean")
            assert digest(flat) == old
            line.heal()
            done = process.wait().ok
    assert (done["mode"], done["matched_bytes"]) == ("resync", 0)
    assert identical(source, target.directory / "disk.vmdk")


@pytest.mark.parametrize("size", ["255M", "1.5G", "much"])
def test_a_journal_size_that_is_none_or_too_small_is_refused(size: str, tmp_path: Path) -> None:
    done = run("receive", "--directory", tmp_path, "--journal-size", size, "--json")
    assert (done.error["code"], done.status) == ("usage.size", 2)
    assert "--journal-size" in done.error["message"]
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ retention


@pytest.mark.parametrize(
    ("options", "kept"),
    [((), 4), (("--retention-points", "2"), 2), (("--retention-hours", "0"), 1)],
    ids=["default", "points", "hours"],
)
def test_points_are_kept_as_long_as_was_asked_for(
    source: Path, tmp_path: Path, state: Path, options: tuple[str, ...], kept: int
) -> None:
    with receiving(tmp_path / "target", *options) as target:
        sealed = []
        for _ in range(4):
            change(source)
            sealed.append(send(source, target.address, state, token=target.token).ok["recovery_point"])
        target.process.until(lambda: len(points(target.directory)) <= kept)
        assert [point["id"] for point in points(target.directory)] == sealed[-kept:]
        assert identical(source, target.directory / "disk.vmdk")


@pytest.mark.parametrize(
    "option",
    [
        ("--retention-hours", "-1"),
        ("--retention-hours", "100000"),
        ("--retention-hours", "nan"),
        ("--retention-points", "0"),
        ("--retention-points", "1.5"),
    ],
)
def test_a_retention_that_is_none_is_refused(option: tuple[str, str], tmp_path: Path) -> None:
    done = run("receive", "--directory", tmp_path, *option, "--json")
    assert (done.error["code"], done.status) == ("usage.arguments", 2)
    assert option[0] in done.error["message"]
    assert list(tmp_path.iterdir()) == []
