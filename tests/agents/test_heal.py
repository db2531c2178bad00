"""Each thing that a line or a peer does to a send is told in words, and over when its cause is gone."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agents.harness import (
    MIB,
    Process,
    Target,
    half_made,
    identical,
    make_disk,
    receiving,
    send,
    sending,
    sidecar,
)
from tests.agents.proxy import Proxy, proxy
from tests.real_disks import run as system

pytestmark = pytest.mark.peer("qemu-img")

SLACK_S = 3.0  # for a busy machine
RESET_S = 1.0
SILENCE_S = 15.0
# A look at the handshakes of the next try is no data yet.
DATA_BYTES = MIB


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", 192 * MIB)


@contextmanager
def under_way(source: Path, target: Target, state: Path, *, held: int) -> Iterator[tuple[Proxy, Process]]:
    """A send that keeps trying, of which exactly so many bytes have passed; it must end well."""
    with proxy(target.port) as line:
        line.hold_after(held)
        options = ("--compression", "off")
        with sending(
            source, line.address, state, *options, token=target.token, give_up_after_s=None
        ) as process:
            line.wait_passed(held)
            yield line, process
            done = process.wait()
            assert done.ok["fuzzy"] is False
            assert "trying again in" in done.stderr
            assert "Traceback" not in done.stderr
    assert identical(source, target.directory / "disk.vmdk")
    assert sidecar(target.directory, "disk")["state"] == "clean"
    assert half_made(target.directory) == []


def test_a_reset_is_over_within_a_second(
    source: Path, target: Target, tmp_path: Path, count: Callable
) -> None:
    took = []
    step = 150 * MIB // (times := count(3, 100))
    with under_way(source, target, tmp_path / "state", held=step) as (line, process):
        line.heal()
        for number in range(times):
            line.wait_passed(step * (number + 1))
            before, began = line.passed, line.reset()
            took.append(line.wait_passed(before + DATA_BYTES) - began)
    print(f"resumed after resets within {', '.join(f'{each:.3f} s' for each in took)}")
    assert max(took) <= RESET_S + SLACK_S - 1
    assert "lost" in process.wait().stderr


def test_a_black_hole_is_noticed_and_told_and_left_when_it_is_gone(
    source: Path, target: Target, tmp_path: Path
) -> None:
    with under_way(source, target, tmp_path / "state", held=64 * MIB) as (line, process):
        line.heal()
        began = line.black_hole()
        process.said("is silent", within_s=SILENCE_S + SLACK_S)
        noticed = time.monotonic()
        process.said("trying again in", times=2)  # nor does another try get anywhere
        healed, passed = line.heal(), line.passed
        resumed = line.wait_passed(passed + DATA_BYTES)
    print(f"silence noticed after {noticed - began:.1f} s, resumed {resumed - healed:.1f} s after its end")
    assert resumed - healed <= 12.0  # the longest wait between two tries


def test_bytes_in_tiny_slices_arrive(target: Target, tmp_path: Path) -> None:
    small = make_disk(tmp_path / "disk.img", MIB // 2)
    with proxy(target.port) as line:
        line.slice(7)
        assert send(small, line.address, tmp_path / "state", token=target.token).ok["resent_bytes"] == 0
    assert identical(small, target.directory / "disk.vmdk")


@pytest.mark.parametrize("to_server", [True, False], ids=["data", "answers"])
def test_damaged_bytes_are_never_written_and_sent_again(
    to_server: bool, source: Path, target: Target, tmp_path: Path
) -> None:
    with under_way(source, target, tmp_path / "state", held=64 * MIB) as (line, process):
        line.damage(to_server=to_server)
        line.heal()
        process.said("trying again in")


def test_a_frozen_target_is_noticed_and_goes_on_when_it_wakes(
    source: Path, target: Target, tmp_path: Path, count: Callable
) -> None:
    tries, frozen_s = count((1, 20), (8, 60))
    with under_way(source, target, tmp_path / "state", held=64 * MIB) as (line, process):
        line.heal()
        target.process.signal(signal.SIGSTOP)
        began = time.monotonic()
        process.said("is silent", within_s=SILENCE_S + SLACK_S)
        noticed = time.monotonic() - began
        process.said("trying again in", times=1 + tries, within_s=2 * frozen_s)
        slept = time.monotonic() - began
        target.process.signal(signal.SIGCONT)
    print(f"silence noticed after {noticed:.1f} s, awake after {slept:.1f} s")
    assert slept >= frozen_s - SLACK_S


def test_a_frozen_sender_goes_on_when_it_wakes(source: Path, target: Target, tmp_path: Path) -> None:
    with under_way(source, target, tmp_path / "state", held=64 * MIB) as (line, process):
        process.signal(signal.SIGSTOP)
        line.reset()
        line.heal()
        process.signal(signal.SIGCONT)


@contextmanager
def small_place(folder: Path, size: int) -> Iterator[Path]:
    """An ext4 of so many bytes, all of it for everybody."""
    image, place = folder / "small.img", folder / "small"
    make_disk(image, size, (0, 0))
    system("mkfs.ext4", "-q", "-m", "0", image)
    place.mkdir()
    system("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        system("umount", "--lazy", place)


@pytest.mark.peer("mkfs.ext4", "mount")
@pytest.mark.parametrize("own_retention", [True, False], ids=["datastore", "retention too"])
def test_a_full_target_is_waited_for_and_goes_on_when_there_is_space(
    own_retention: bool, tmp_path: Path
) -> None:
    source = make_disk(tmp_path / "disk.img", 48 * MIB)
    with small_place(tmp_path, 96 * MIB) as place:
        filler = make_disk(place / "filler", 56 * MIB)
        options = ("--retention", tmp_path / "retention") if own_retention else ()
        with (
            receiving(place, *options) as target,
            sending(
                source, target.address, tmp_path / "state", token=target.token, give_up_after_s=None
            ) as process,
        ):
            process.said("target.full")
            process.said("trying again in", times=3)
            assert not process.ended
            assert not (place / "disk.vmdk").exists()
            filler.unlink()
            done = process.wait()
            assert done.ok["fuzzy"] is False
            assert "space" in done.stderr
            assert identical(source, place / "disk.vmdk")
            assert half_made(place) == []


def test_after_so_long_in_vain_it_gives_up_if_told_so(source: Path, target: Target, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert send(source, target.address, state, token=target.token).ok
    target.stop()
    began = time.monotonic()
    done = send(source, target.address, state, give_up_after_s=2)
    assert (done.error["code"], done.status) == ("link.refused", 1)
    assert done.stderr.count("trying again in") >= 3
    assert 2.0 <= time.monotonic() - began <= 2.0 + 3.2 + SLACK_S


def test_before_the_target_was_met_the_first_error_is_final(source: Path, tmp_path: Path) -> None:
    """It is more likely a wrong address than a bad line."""
    with receiving(tmp_path / "target") as target:
        token, address = target.token, target.address
        target.stop()
    done = send(source, address, tmp_path / "state", token=token, give_up_after_s=None)
    assert (done.error["code"], done.status) == ("link.refused", 1)
