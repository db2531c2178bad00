"""A disk that is written while it is read: the copy is equal or told to be fuzzy, never silently wrong."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agents.harness import BOUND_S, MIB, Done, Target, identical, make_disk, send, sending
from tests.agents.proxy import proxy
from tests.real_disks import loop_device

pytestmark = pytest.mark.peer("qemu-img")

SIZE = 96 * MIB
BLOCK = 4096
# Writes random blocks and says how many it has written; a line on stdin lets it write that many more, the end
# of stdin ends it. 0: until then as many as it can.
WRITER = """
import os, random, select, sys
fd, rng = os.open(sys.argv[1], os.O_WRONLY), random.Random(int(sys.argv[2]))
blocks = os.lseek(fd, 0, os.SEEK_END) // 4096
def write():
    os.pwrite(fd, rng.randbytes(4096), rng.randrange(blocks) * 4096)
while line := sys.stdin.readline():
    if int(line):
        for _ in range(int(line)):
            write()
    else:
        while not select.select([sys.stdin], [], [], 0)[0]:
            write()
    print(line.strip(), flush=True)
"""


class Writer:
    """A process that writes to a disk."""

    def __init__(self, process: subprocess.Popen) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    def write(self, blocks: int) -> None:
        """Write so many blocks, and return when that is done."""
        self.start(blocks)
        assert self._stdout.readline() == f"{blocks}\n"

    def start(self, blocks: int = 0) -> None:
        self._stdin.write(f"{blocks}\n")
        self._stdin.flush()

    def stop(self) -> None:
        """Its last write is done when this returns."""
        self._stdin.close()
        assert self._process.wait(BOUND_S) == 0


@contextmanager
def writing(path: Path, seed: int) -> Iterator[Writer]:
    command = (sys.executable, "-c", WRITER, path, str(seed))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Writer(process)
        finally:
            process.kill()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SIZE)


def is_honest(done: Done, source: Path, target: Target) -> bool:
    """The oracle, when nobody writes any more: equal, or told to be fuzzy."""
    return identical(source, target.directory / "disk.vmdk") or done.ok["fuzzy"] is True


def test_what_was_written_while_it_was_read_is_sent_in_another_pass(
    source: Path, target: Target, tmp_path: Path, seed: int
) -> None:
    with proxy(target.port) as line, writing(source, seed) as writer:
        line.hold_after(SIZE // 2)
        with sending(source, line.address, tmp_path / "state", token=target.token) as process:
            line.wait_passed(SIZE // 2)
            writer.write(200)
            writer.stop()
            line.heal()
            done = process.wait()
    document = done.ok
    assert document["passes"] > 1
    assert document["fuzzy"] is False
    assert identical(source, target.directory / "disk.vmdk")
    assert "may have changed" in done.stderr


def test_a_disk_that_is_never_at_rest_is_told_to_be_fuzzy(
    source: Path, target: Target, tmp_path: Path, seed: int
) -> None:
    with writing(source, seed) as writer:
        writer.start()
        done = send(source, target.address, tmp_path / "state", token=target.token)
        assert (done.ok["fuzzy"], done.ok["passes"]) == (True, 3)
        assert "fuzzy" in done.stderr
        writer.stop()
    after = send(source, target.address, tmp_path / "state")
    assert (after.ok["fuzzy"], after.ok["mode"]) == (False, "incremental")
    assert identical(source, target.directory / "disk.vmdk")


def test_whenever_the_writer_stops_the_copy_is_equal_or_told_to_be_fuzzy(
    source: Path, target: Target, tmp_path: Path, seed: int, count: Callable
) -> None:
    rng = random.Random(seed)
    found = []
    with proxy(target.port) as line:
        for number in range(count(6, 200)):
            make_disk(source, SIZE, (0, SIZE // 3), (SIZE // 2, SIZE // 3))
            with writing(source, seed + number) as writer:
                writer.start()
                with sending(source, line.address, tmp_path / "state", token=target.token) as process:
                    line.wait_passed(line.passed + rng.randrange(SIZE), lambda: process.ended)
                    writer.stop()
                    done = process.wait()
            assert is_honest(done, source, target), (number, done)
            found.append((done.ok["passes"], done.ok["fuzzy"]))
    print(f"seed {seed:#x}: passes and fuzzy: {found}")


def test_a_send_that_goes_on_over_a_disk_that_has_changed_since_brings_the_change(
    source: Path, target: Target, tmp_path: Path, seed: int
) -> None:
    state = tmp_path / "state"
    options = ("--compression", "off")
    with proxy(target.port) as line:
        line.hold_after(SIZE // 2)
        with sending(source, line.address, state, *options, token=target.token) as process:
            line.wait_passed(SIZE // 2)
            process.signal(signal.SIGKILL)
            process.wait()
        line.reset()
    with writing(source, seed) as writer:
        writer.write(200)
        writer.stop()
    done = send(source, target.address, state, *options, token=target.token)
    assert done.ok["passes"] > 1
    assert done.ok["fuzzy"] is False
    assert identical(source, target.directory / "disk.vmdk")


@pytest.mark.peer("losetup")
@pytest.mark.parametrize("quiesced", [False, True])
def test_a_device_is_fuzzy_unless_it_is_vouched_for(
    quiesced: bool, source: Path, target: Target, tmp_path: Path
) -> None:
    options = ("--quiesced",) if quiesced else ()
    with loop_device(source) as device:
        done = send(
            device, target.address, tmp_path / "state", "--disk", "disk", *options, token=target.token
        )
    assert done.ok["fuzzy"] is not quiesced
    assert done.ok["passes"] == 1
    assert ("fuzzy" in done.stderr) is not quiesced
    assert identical(source, target.directory / "disk.vmdk")


@pytest.mark.peer("losetup")
def test_a_vouched_for_device_that_changed_between_two_runs_of_one_send_is_not_mixed(
    source: Path, target: Target, tmp_path: Path, seed: int
) -> None:
    """The vouching is for a run: nothing tells what happened to the device between two."""
    state, options = tmp_path / "state", ("--disk", "disk", "--quiesced", "--compression", "off")
    with loop_device(source) as device, proxy(target.port) as line:
        line.hold_after(SIZE // 2)
        with sending(device, line.address, state, *options, token=target.token) as process:
            line.wait_passed(SIZE // 2)
            process.signal(signal.SIGKILL)
            process.wait()
        line.reset()
        with writing(device, seed) as writer:
            writer.write(200)
            writer.stop()
        done = send(device, target.address, state, *options, token=target.token)
        assert done.ok["fuzzy"] is False
        assert identical(device, target.directory / "disk.vmdk")


# ------------------------------------------------------------------ --watch


def test_watching_sends_each_change_and_ends_cleanly(source: Path, target: Target, tmp_path: Path) -> None:
    options = ("--watch", "1")
    with sending(source, target.address, tmp_path / "state", *options, token=target.token) as process:
        (first,) = process.lines(1)
        with source.open("r+b") as file:
            file.seek(SIZE // 2)
            file.write(os.urandom(2 * BLOCK))
        cycles = 2
        while process.lines(cycles)[-1]["sent_bytes"] < 2 * BLOCK:
            cycles += 1  # it looked before the change was there
            assert cycles < 10
        process.signal(signal.SIGTERM)
        done = process.wait()
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["mode"] for each in documents] == ["full"] + ["incremental"] * (cycles - 1)
    assert len({each["epoch"] for each in documents}) == cycles
    assert first["sent_bytes"] > SIZE and documents[-1]["sent_bytes"] < MIB
    assert (done.status, "Traceback" in done.stderr) == (0, False)
    assert identical(source, target.directory / "disk.vmdk")
