"""Signals end commands in order, and what they ended goes on with the same command."""

import fcntl
import os
import select
import signal
import time
from pathlib import Path

import pytest

from tests.agents.harness import (
    BOUND_S,
    MIB,
    Done,
    Process,
    Target,
    half_made,
    identical,
    make_disk,
    receiving,
    send,
    sending,
    sidecar,
    tree,
)
from tests.agents.holding import relay
from tests.agents.retention import durable

pytestmark = pytest.mark.peer("qemu-img")

SOON_S = 4.0  # two for the last words to the peer, two for a busy machine
STOPS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", 32 * MIB)


def stopped(process: Process, number: signal.Signals) -> Done:
    """Send a signal to a command whose line stalls; it does not wait for that line."""
    began = time.monotonic()
    process.signal(number)
    done = process.wait()
    assert time.monotonic() - began <= SOON_S
    assert (done.error["code"], done.status) == ("interrupted", 1)
    assert number.name in done.error["message"]
    return done


def finished(source: Path, target: Target, state: Path) -> None:
    """The same command, to its end."""
    assert send(source, target.address, state, token=target.token).ok
    assert sidecar(target.directory, "disk")["state"] == "clean"
    assert identical(source, target.directory / "disk.vmdk")
    assert half_made(target.directory) == []


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_stopped_send_says_so_and_goes_on_with_the_same_command(
    number: signal.Signals, source: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with receiving(tmp_path / "target") as target, relay(target.port, hold_after=4 * MIB) as held:
        with sending(source, held.address, state, token=target.token) as process:
            held.wait_until_holding()
            stopped(process, number)
        assert sidecar(target.directory, "disk")["state"] == "dirty"
        assert not (target.directory / "disk.vmdk").exists()
        finished(source, target, state)


def test_a_stopped_send_over_a_sealed_disk_leaves_it_as_it_was(source: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with receiving(tmp_path / "target") as target:
        finished(source, target, state)
        before = tree(target.directory)
        make_disk(source, 32 * MIB)
        with (
            relay(target.port, hold_after=24 * MIB) as held,
            sending(source, held.address, state, token=target.token) as process,
        ):
            held.wait_until_holding()
            target.process.until(lambda: durable(target.retention, "disk").covered_bytes >= 4 * MIB)
            stopped(process, signal.SIGINT)
        assert tree(target.directory) == before
        assert sidecar(target.directory, "disk")["state"] == "clean"
        finished(source, target, state)


def test_a_killed_send_does_not_keep_the_next_one_out(source: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with receiving(tmp_path / "target") as target, relay(target.port, hold_after=4 * MIB) as held:
        with sending(source, held.address, state, token=target.token) as process:
            held.wait_until_holding()
            process.signal(signal.SIGKILL)
            assert process.wait().status == -signal.SIGKILL
        finished(source, target, state)


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_stopped_target_lets_the_sender_know_and_goes_on_after_a_restart(
    number: signal.Signals, source: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with receiving(tmp_path / "target") as first:
        port = first.port
        with relay(port, hold_after=4 * MIB) as held:
            with sending(source, held.address, state, token=first.token) as process:
                held.wait_until_holding()
                first.process.signal(number)
                ended = first.process.wait()
                lost = process.wait()
            assert (ended.status, ended.stdout.count("\n")) == (0, 1), ended
            assert f"stopped by {number.name}" in ended.stderr and "Traceback" not in ended.stderr
            assert (lost.error["code"], lost.status) == ("link.lost", 1)
            assert "same command again" in lost.error["fix"]
            held.release()
            with receiving(tmp_path / "target", listen=f"127.0.0.1:{port}") as second:
                assert send(source, held.address, state).ok
                assert identical(source, second.directory / "disk.vmdk")
                assert sidecar(second.directory, "disk")["state"] == "clean"


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_send_that_waits_for_its_token_can_be_stopped(
    number: signal.Signals, source: Path, tmp_path: Path
) -> None:
    read, write = os.pipe()
    try:
        # A pipe of one page, full: it takes more once the command has read it, and then waits for more, since
        # these are only half as many characters as it asks for.
        size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        assert os.write(write, "ü".encode() * (size // 2)) == size
        arguments = (
            source,
            "--to",
            "127.0.0.1:9",
            "--state",
            tmp_path / "state",
            "--token-file",
            "-",
            "--json",
        )
        with Process("send", *arguments, stdin=read) as process:
            assert select.select([], [write], [], BOUND_S)[1], "it did not read its token"
            stopped(process, number)
    finally:
        os.close(read)
        os.close(write)
    assert not (tmp_path / "state").exists()
