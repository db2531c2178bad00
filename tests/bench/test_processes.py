"""What a run costs is counted whole: children, orphans and servers, and nothing but the run."""

import os
import select
import signal
import sys
from pathlib import Path

import pytest

from bench.processes import Crowd, CutOff, RunFailed

MIB = 1 << 20
LIMIT_S = 30.0
BURN_S = 0.3
BURN = f"import time\nwhile time.process_time() < {BURN_S}: pass\n"
IN_A_CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}], check=True)\n"
# Its child is still there when it ends, and burns until its own parent has gone.
LEAVES_AN_ORPHAN = f"""
import os, sys, time
read, write = os.pipe()
if os.fork():
    os.close(write)
    os.read(read, 1)  # it has burnt what it should
else:
    {BURN.replace(chr(10), chr(10) + "    ")}
    os.write(write, b"x")
    time.sleep(60)
"""


def costs_of(tmp_path: Path, script: str) -> dict[str, float]:
    with Crowd(tmp_path, LIMIT_S) as crowd:
        crowd.begin()
        crowd.finish(crowd.start("it", (sys.executable, "-c", script)))
        crowd.settle()
        return crowd.costs().cpu_s


@pytest.mark.parametrize("script", [BURN, IN_A_CHILD, LEAVES_AN_ORPHAN], ids=["own", "child's", "orphan's"])
def test_cpu_time_is_counted(tmp_path: Path, script: str) -> None:
    assert BURN_S <= sum(costs_of(tmp_path, script).values()) < BURN_S + 1.0


def test_what_a_server_cost_before_is_not_counted(tmp_path: Path) -> None:
    with Crowd(tmp_path, LIMIT_S) as crowd:
        log = tmp_path / "said"
        with log.open("wb") as said:
            script = f"{BURN}print('ready', flush=True)\nimport signal\nsignal.pause()\n"
            server = crowd.start("server", (sys.executable, "-c", script), server=True, stdout=said)
        crowd.ready(server, lambda: b"ready" in log.read_bytes())
        crowd.begin()
        crowd.finish(crowd.start("client", (sys.executable, "-c", "pass")))
        crowd.settle()
        assert crowd.costs().cpu_s["server"] < BURN_S / 2


def test_peak_memory_is_that_of_each_process_and_not_ours(tmp_path: Path) -> None:
    ours = bytearray(200 * MIB)
    with Crowd(tmp_path, LIMIT_S) as crowd:
        log = tmp_path / "said"
        with log.open("wb") as said:
            script = (
                f"a = b'x' * {64 * MIB}\ndel a\nprint('ready', flush=True)\nimport signal\nsignal.pause()\n"
            )
            big = crowd.start("big", (sys.executable, "-c", script), server=True, stdout=said)
            crowd.start("small", ("sleep", "60"), server=True)
        crowd.ready(big, lambda: b"ready" in log.read_bytes())
        crowd.begin()
        peaks = crowd.costs().peak_bytes
    assert 64 * MIB < peaks["big"] < 150 * MIB
    assert 0 < peaks["small"] < 16 * MIB
    assert len(ours) == 200 * MIB


def test_a_failure_is_told_with_what_the_process_said(tmp_path: Path) -> None:
    with Crowd(tmp_path, LIMIT_S) as crowd:
        crowd.begin()
        failing = crowd.start("it", ("sh", "-c", "echo no such thing >&2; exit 3"))
        with pytest.raises(RunFailed, match="it ended with 3: no such thing"):
            crowd.finish(failing)


def test_a_server_that_ends_fails_the_run(tmp_path: Path) -> None:
    with Crowd(tmp_path, LIMIT_S) as crowd:
        crowd.start("server", ("sh", "-c", "exit 0"), server=True)
        crowd.begin()
        with pytest.raises(RunFailed, match="server ended with 0"):
            crowd.finish(crowd.start("client", ("sleep", "60")))


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    with Crowd(tmp_path, LIMIT_S) as crowd:
        server = crowd.start("server", ("sh", "-c", "echo port taken >&2; exit 1"), server=True)
        with pytest.raises(RunFailed, match="did not start: port taken"):
            crowd.ready(server, lambda: False)


def test_who_takes_too_long_is_cut_off_and_nobody_is_left(tmp_path: Path) -> None:
    with Crowd(tmp_path, 0.05) as crowd:
        crowd.begin()
        slow = crowd.start("slow", ("sh", "-c", "sleep 60; true"))
        with pytest.raises(CutOff):
            crowd.finish(slow)
    with pytest.raises(ProcessLookupError):
        os.kill(slow.popen.pid, 0)


def test_a_pipe_carries_everything_and_its_end(tmp_path: Path) -> None:
    with Crowd(tmp_path, LIMIT_S) as crowd:
        crowd.begin()
        first = crowd.start("first", ("sh", "-c", "echo through"), stdout=-1)
        output = tmp_path / "output"
        with output.open("wb") as taken:
            second = crowd.start("second", ("cat",), behind=first, stdout=taken)
        crowd.finish(first, second)
    assert output.read_bytes() == b"through\n"


def test_nobody_outlives_whoever_measures(tmp_path: Path) -> None:
    script = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from bench.processes import Crowd\n"
        "crowd = Crowd(Path(sys.argv[1]), 60).__enter__()\n"
        "print(crowd.start('it', ('sleep', '60')).popen.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with Crowd(tmp_path, LIMIT_S) as crowd:
        told = tmp_path / "told"
        (tmp_path / "inner").mkdir()
        with told.open("wb") as output:
            command = ("env", "PYTHONPATH=.", sys.executable, "-c", script, tmp_path / "inner")
            holder = crowd.start("holder", command, stdout=output)
            crowd.ready(holder, lambda: told.read_bytes().endswith(b"\n"))
        pidfd = os.pidfd_open(int(told.read_bytes()))
        os.kill(holder.popen.pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], LIMIT_S)[0]
        os.close(pidfd)
