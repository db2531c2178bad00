"""Runs the product as its users do: real processes, the real command line, real TLS on loopback.

No fixed ports and no sleeps: every wait is for a line, an exit or a byte, and has a bound. Not here: what a
command should answer; that is each test's own.
"""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from tests.house.tree import ROOT

COMMAND = (sys.executable, "-m", "agents.cli")
BOUND_S = 60.0  # only a hang takes this long, on however slow a machine
SAMPLE_S = 0.02  # how often a process's memory is looked at
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Done:
    """A process that has ended. `status` is negative for a signal, as in `subprocess`."""

    status: int
    stdout: str
    stderr: str
    peak_bytes: int

    @property
    def document(self) -> dict[str, Any]:
        """What it printed on stdout, which must be exactly one JSON document on one line."""
        assert self.stdout.count("\n") == 1 and self.stdout.endswith("\n"), self
        found = json.loads(self.stdout)
        assert isinstance(found, dict), self
        return found

    @property
    def ok(self) -> dict[str, Any]:
        """The document of a command that succeeded."""
        assert self.status == 0, self
        assert "error" not in self.document, self
        return self.document

    @property
    def error(self) -> dict[str, str]:
        """The error of a command that failed as commands should: told on both channels, no traceback."""
        assert self.status in (1, 2), self
        assert set(self.document) == {"error"}, self
        error: dict[str, str] = self.document["error"]
        assert set(error) == {"code", "message", "cause", "fix"} and all(error.values()), self
        assert "Traceback" not in self.stderr, self.stderr
        assert error["code"] in self.stderr, self
        return error


class Heard:
    """What a process says on stderr, as it says it."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._text = b""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with self._pipe:
            while got := os.read(self._pipe.fileno(), 65536):
                with self._changed:
                    self._text += got
                    self._changed.notify_all()

    @property
    def text(self) -> str:
        with self._changed:
            return self._text.decode(errors="backslashreplace")

    def wait_for(self, words: str, times: int, within_s: float) -> None:
        with self._changed:
            said = self._changed.wait_for(lambda: self._text.count(words.encode()) >= times, within_s)
        assert said, f"{words!r} was not said {times} times in {within_s} s: {self.text}"

    def end(self) -> str:
        """All of it; the process has ended, and nobody else holds its stderr."""
        self._thread.join(BOUND_S)
        return self.text


class Process:
    """A command under way; killed at the end of the `with` if it is still there."""

    def __init__(
        self,
        *arguments: str | Path,
        failpoint: str = "",
        stdin: str | int = "",
        through: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.arguments = (*through, *command, *map(str, arguments))
        self._read = b""
        inherited = {name: value for name, value in os.environ.items() if name != "FAILPOINT"}
        with tempfile.TemporaryFile() as given:
            if isinstance(stdin, str):
                given.write(stdin.encode())
                given.seek(0)
            self._popen = subprocess.Popen(
                self.arguments,
                cwd=ROOT,
                env={**inherited, **(environment or {}), **({"FAILPOINT": failpoint} if failpoint else {})},
                stdin=given if isinstance(stdin, str) else stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        assert self._popen.stderr is not None
        self._errors = Heard(self._popen.stderr)
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._done: Done | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._done is None:
            self.signal(signal.SIGKILL)
            self.wait()
        os.close(self._pidfd)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def ended(self) -> bool:
        return self._done is not None or bool(select.select([self._pidfd], [], [], 0)[0])

    def signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def said(self, words: str, *, times: int = 1, within_s: float = BOUND_S) -> None:
        """Wait until it has said these words on stderr, so many times in all."""
        self._errors.wait_for(words, times, within_s)

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The documents of the first so many lines on stdout."""
        return [json.loads(line) for line in self.line(count).splitlines()[:count]]

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds that this process, which stays there, brings about."""
        deadline = time.monotonic() + BOUND_S
        while not holds():
            gone = select.select([self._pidfd], [], [], SAMPLE_S)[0]
            assert not gone and time.monotonic() < deadline, f"it did not come about: {self._errors.text}"

    def line(self, count: int = 1) -> bytes:
        """The first line on stdout, or more; what there was when the process ended without them."""
        assert self._popen.stdout is not None
        deadline = time.monotonic() + BOUND_S
        while self._read.count(b"\n") < count:
            ready, _, _ = select.select([self._popen.stdout], [], [], deadline - time.monotonic())
            assert ready, f"{self.arguments} printed no line in {BOUND_S} s: {self._errors.text}"
            got = os.read(self._popen.stdout.fileno(), 65536)
            if not got:
                break
            self._read += got
        return self._read

    def peak_bytes(self) -> int:
        """The most memory that the process, which is still there, has held so far."""
        peak = self._peak_so_far()
        assert peak, "no VmHWM: it has ended"
        return peak

    def _peak_so_far(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0

    def wait(self) -> Done:
        """Wait for its end."""
        if self._done is not None:
            return self._done
        assert self._popen.stdout is not None
        deadline = time.monotonic() + BOUND_S
        peak = 0
        while time.monotonic() < deadline:  # until the end of stdout: a full pipe would hold the process
            # Looked at again and again: what wait4 tells begins with the peak of whoever started the process.
            peak = max(peak, self._peak_so_far())
            if select.select([self._popen.stdout], [], [], SAMPLE_S)[0]:
                got = os.read(self._popen.stdout.fileno(), 65536)
                if not got:
                    break
                self._read += got
        ended = select.select([self._pidfd], [], [], max(0, deadline - time.monotonic()))[0]
        if not ended:
            self._popen.kill()
        _, status = os.waitpid(self.pid, 0)
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        self._popen.stdout.close()
        self._done = Done(
            self._popen.returncode,
            self._read.decode(),
            self._errors.end(),
            peak,
        )
        assert ended, f"{self.arguments} did not end in {BOUND_S} s: {self._done}"
        return self._done


def run(*arguments: str | Path, **how: Any) -> Done:
    """Run a command to its end; `how` as for `Process`."""
    with Process(*arguments, **how) as process:
        return process.wait()


class Target:
    """`replicator receive` on a directory, with what it said of itself."""

    def __init__(self, process: Process, directory: Path) -> None:
        self.process = process
        self.directory = directory
        said = json.loads(process.line() or "{}")
        self.address: str = said.get("listen", "")  # empty: it died before it listened
        self.token: str = said.get("token", "")

    @property
    def retention(self) -> Path:
        return self.directory / ".replicator"

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def stop(self) -> Done:
        """End it as an operator does."""
        self.process.signal(signal.SIGTERM)
        return self.process.wait()


@contextmanager
def receiving(
    directory: Path, *options: str | Path, listen: str = "127.0.0.1:0", **how: Any
) -> Iterator[Target]:
    """A master target for the time of a block, in a directory that is made if need be; `how` as for
    `Process`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    arguments = ("receive", "--directory", directory, "--listen", listen, "--json", *options)
    with Process(*arguments, **how) as process:
        target = Target(process, directory)
        yield target
        if not process.ended:
            done = target.stop()
            assert done.status == 0, done
            assert "Traceback" not in done.stderr, done.stderr


def sending(
    source: Path,
    to: str,
    state: Path,
    *options: str,
    token: str = "",
    give_up_after_s: float | None = 0,
    **how: Any,
) -> Process:
    """`replicator send` with `--json`, started. It gives up at its first error, so that a test sees which;
    None leaves that to the command, which keeps trying once it has met the target.
    """
    patience = () if give_up_after_s is None else ("--give-up-after", str(give_up_after_s))
    with_token = ("--token-file", "-") if token else ()
    arguments = (source, "--to", to, "--state", state, "--json", *patience, *with_token, *options)
    return Process("send", *arguments, stdin=token, **how)


def send(source: Path, to: str, state: Path, *options: str, token: str = "", **how: Any) -> Done:
    """`replicator send`, to its end."""
    with sending(source, to, state, *options, token=token, **how) as process:
        return process.wait()


# ------------------------------------------------------------------ disks and directories


def make_disk(path: Path, size: int, *stretches: tuple[int, int]) -> Path:
    """A sparse file with random bytes in (offset, length); all of it when no stretches are given."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in stretches or ((0, size),):
            for start in range(offset, offset + length, MIB):
                file.seek(start)
                file.write(os.urandom(min(MIB, offset + length - start)))
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree(folder: Path, *, without: Sequence[str] = (".replicator",)) -> dict[str, tuple[int, int, str]]:
    """All that is below a folder: path -> (mode, mtime in ns, content); symbolic links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.split("/", maxsplit=1)[0] in without:
            continue
        status = path.lstat()
        content = f"-> {os.readlink(path)}" if path.is_symlink() else digest(path) if path.is_file() else ""
        found[name] = (status.st_mode, 0 if path.is_dir() else status.st_mtime_ns, content)
    return found


def half_made(folder: Path) -> list[str]:
    """Files that were being made ready under a second name: none may stay behind."""
    return [str(path) for path in folder.rglob("*") if path.name.endswith(".new")]


def sidecar(directory: Path, disk: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / f"{disk}.replica.json").read_text())
    return found


def identical(source: Path, vmdk: Path) -> bool:
    """Whether qemu-img, an independent reader, finds the same disk in both."""
    command = ("qemu-img", "compare", "-f", "raw", "-F", "vmdk", source, vmdk)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND_S)
    assert done.returncode in (0, 1), done
    return done.returncode == 0
