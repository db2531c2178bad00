"""Runs whole commands and counts what they cost: CPU seconds and peak memory of every process, both ends.

CPU: clients by wait4 when they end; servers by /proc before and after, their children included (both those
that are there and those that were waited for). What kernel threads do for a process, such as writing dirty
pages back, is nobody's. Memory: the high-water mark of the resident set (VmHWM), looked at every
``SAMPLE_S``, so that only what happens in a process's last moments is missed; what wait4 tells would begin
with the peak of us.

Not here: what is run (``contenders.py``), where (``namespaces.py``).
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from bench.errors import BenchError

SAMPLE_S = 0.1
SEARCH_EVERY = 5  # samples: looking through /proc for children costs more than looking at a process
START_S = 30.0
STOP_S = 10.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
TOLD_BYTES = 2000  # of what a failed process said


class RunFailed(Exception):
    """A contender did not do what it should; the text says what."""


class CutOff(Exception):
    """A contender took longer than it was given."""


@dataclass(slots=True)
class Member:
    """A process of a run.

    Attributes:
        name: what the table calls it. server: it was there before and does not end by itself.
        popen: it. pidfd: readable once it has ended.
        cpu_s: what it has cost, its children included; servers: what it had cost when the clock started.
        status: exit status; None while it runs.
    """

    name: str
    server: bool
    popen: subprocess.Popen[bytes]
    pidfd: int
    log: Path
    cpu_s: float = 0.0
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one run, by process: CPU seconds, and peak memory in bytes (the largest of those of a name)."""

    cpu_s: dict[str, float]
    peak_bytes: dict[str, int]


class Crowd:
    """The processes of one run; a context manager, at the end of which none of them is left.

    Children of ours that are started otherwise while it lasts are taken for orphans of the run, and ended.

    Args:
        folder: for what they say. limit_s: for the timed part; then ``CutOff``.
    """

    def __init__(self, folder: Path, limit_s: float) -> None:
        self._folder = folder
        self._limit_s = limit_s
        self._members: list[Member] = []
        self._names: dict[int, str] = {}  # of every process seen, members and their descendants
        self._peaks: dict[int, int] = {}
        self._orphans: dict[str, float] = {}
        self._earlier: frozenset[int] = frozenset()
        self._deadline_s = 0.0
        self._samples = 0
        # Whatever happens to us, nobody of them shall go on.
        self._leash = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()

    def __enter__(self) -> Self:
        _adopt_orphans(True)
        self._earlier = frozenset(_tree(os.getpid()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for member in reversed(self._members):
            self._end(member)
        self._bury_orphans()
        _adopt_orphans(False)

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        prefix: Sequence[str] = (),
        server: bool = False,
        stdout: int | IO[bytes] | None = None,
        behind: Member | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Member:
        """Start a process, ``behind`` another one in a pipe. What it says goes to a file unless ``stdout`` is
        given.
        """
        log = self._folder / f"{len(self._members)}-{name.replace('/', '_').replace(' ', '_')}.log"
        with log.open("wb") as said:
            popen = subprocess.Popen(
                (*prefix, *self._leash, *map(str, command)),
                stdin=subprocess.DEVNULL if behind is None else behind.popen.stdout,
                stdout=said if stdout is None else stdout,
                stderr=said,
                env={**os.environ, **(environment or {})},
            )
        if behind is not None and behind.popen.stdout is not None:
            behind.popen.stdout.close()  # else the one before would not notice the end of the one behind
        member = Member(name, server, popen, os.pidfd_open(popen.pid), log)
        self._members.append(member)
        self._names[popen.pid] = name
        return member

    @property
    def members(self) -> Sequence[Member]:
        """All of them, in the order of their start."""
        return tuple(self._members)

    def ready(self, member: Member, done: Callable[[], bool], within_s: float = START_S) -> None:
        """Wait until ``done()`` is true, which says that a server serves.

        Raises:
            RunFailed: it ended, or is not ready in time.
        """
        deadline_s = time.monotonic() + within_s
        while not done():
            if _ended(member, 0.01):
                self._reap(member)
                raise RunFailed(f"{member.name} did not start: {_said(member)}")
            if time.monotonic() > deadline_s:
                raise RunFailed(f"{member.name} was not ready in {within_s:.0f} s: {_said(member)}")

    def begin(self) -> None:
        """The clock starts: what servers cost so far does not count."""
        for member in self._members:
            if member.server:
                member.cpu_s = _cpu_s(_tree(member.popen.pid))
        self._deadline_s = time.monotonic() + self._limit_s

    def finish(self, *members: Member) -> None:
        """Wait until these have ended well; all others are looked at meanwhile.

        Raises:
            RunFailed: one ended badly, or a server ended. CutOff: the time is over.
        """
        waiting = {member.pidfd: member for member in self._members if member.status is None}
        wanted = {member.pidfd for member in members if member.status is None}
        next_sample_s = time.monotonic()
        while wanted:
            now_s = time.monotonic()
            if now_s >= next_sample_s:
                self._sample()
                next_sample_s = now_s + SAMPLE_S
            if now_s > self._deadline_s:
                raise CutOff(f"more than {self._limit_s:.0f} s")
            ended = select.select(list(waiting), [], [], max(0.0, next_sample_s - now_s))[0]
            for pidfd in ended:
                member = waiting.pop(pidfd)
                wanted.discard(pidfd)
                self._reap(member)
                if member.status or member not in members:
                    raise RunFailed(f"{member.name} ended with {member.status}: {_said(member)}")

    def settle(self) -> None:
        """Wait until servers have none but the processes that they began with: their CPU is counted then."""
        deadline_s = time.monotonic() + STOP_S
        for member in self._members:
            while member.server and member.status is None and len(_tree(member.popen.pid)) > 1:
                if time.monotonic() > deadline_s:
                    return
                if _ended(member, 0.01):
                    break

    def costs(self) -> Costs:
        """What the run has cost; after ``settle``."""
        self._sample(search=True)
        self._bury_orphans()
        cpu_s = dict(self._orphans)
        for member in self._members:
            spent_s = member.cpu_s
            if member.server and member.status is None:
                spent_s = _cpu_s(_tree(member.popen.pid)) - member.cpu_s
            cpu_s[member.name] = cpu_s.get(member.name, 0.0) + spent_s
        peak_bytes: dict[str, int] = {}
        for pid, peak in self._peaks.items():
            peak_bytes[self._names[pid]] = max(peak_bytes.get(self._names[pid], 0), peak)
        return Costs({name: round(spent_s, 3) for name, spent_s in cpu_s.items()}, peak_bytes)

    # -- the rest -----

    def _sample(self, *, search: bool = False) -> None:
        self._samples += 1
        if search or self._samples % SEARCH_EVERY == 1:
            for member in self._members:
                for pid in _tree(member.popen.pid) if member.status is None else ():
                    if pid not in self._names:
                        self._names[pid] = _name(pid) or member.name
        for pid in self._names:
            self._peaks[pid] = max(self._peaks.get(pid, 0), _peak_bytes(pid))

    def _bury_orphans(self) -> None:
        """Processes whose parents ended before them have become ours: they are ended, and what they cost
        counts.
        """
        members = {member.popen.pid for member in self._members}
        for pid in _tree(os.getpid())[1:]:
            if pid in members or pid in self._earlier or (_stat(pid) or ["", ""])[1] != str(os.getpid()):
                continue
            name = self._names.get(pid) or _name(pid) or "orphan"
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            _, _, usage = os.wait4(pid, 0)
            self._orphans[name] = self._orphans.get(name, 0.0) + usage.ru_utime + usage.ru_stime

    def _reap(self, member: Member) -> None:
        before_s = member.cpu_s
        _, status, usage = os.wait4(member.popen.pid, 0)
        member.status = member.popen.returncode = os.waitstatus_to_exitcode(status)
        member.cpu_s = usage.ru_utime + usage.ru_stime - before_s

    def _end(self, member: Member) -> None:
        if member.status is None:
            below = _tree(member.popen.pid)[1:]
            signal.pidfd_send_signal(member.pidfd, signal.SIGTERM)
            if not _ended(member, STOP_S):
                signal.pidfd_send_signal(member.pidfd, signal.SIGKILL)
            self._reap(member)
            for pid in below:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        os.close(member.pidfd)


def _ended(member: Member, within_s: float) -> bool:
    return bool(select.select([member.pidfd], [], [], within_s)[0])


def _said(member: Member) -> str:
    with member.log.open("rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - TOLD_BYTES))
        lines = log.read().decode(errors="replace").strip().splitlines()
    return " / ".join(lines[-4:]) or "(nothing said)"


def _adopt_orphans(yes: bool) -> None:
    """Whether descendants whose parents have ended become our children (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, int(yes), 0, 0, 0):
        raise BenchError(f"prctl failed: {os.strerror(ctypes.get_errno())}")


def _name(pid: int) -> str | None:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return None


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on, which is the state; None: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (fields := _stat(int(name))) is not None:
            parents.setdefault(int(fields[1]), []).append(int(name))
    found = [pid]
    for one in found:
        found.extend(parents.get(one, ()))
    return found


def _cpu_s(pids: list[int]) -> float:
    """User and system time of these, with that of the children that they have waited for."""
    ticks = 0
    for pid in pids:
        fields = _stat(pid)
        if fields is not None:
            ticks += sum(int(field) for field in fields[11:15])
    return ticks * TICK_S


def _peak_bytes(pid: int) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
