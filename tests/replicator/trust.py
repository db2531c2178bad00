"""What the suites of identity and trust share: a clock that stands still, and an installation on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from replicator.authority import Authority
from replicator.certificates import ServerKind
from replicator.clock import Clock
from replicator.errors import ReplicatorError
from replicator.files import Files
from replicator.private_directory import PrivateDirectory
from replicator.tokens import TokenBook

ROOT = Path(__file__).resolve().parents[2]  # where programs that a test starts find the packages


class SetClock(Clock):
    """Both clocks move by `advance` only. TLS has its own idea of the time: start near the true one."""

    def __init__(self) -> None:
        self._passed_s = 0.0
        self._start = datetime.now(UTC)

    def advance(self, by: timedelta) -> None:
        self._passed_s += by.total_seconds()

    def monotonic_s(self) -> float:
        return self._passed_s

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._passed_s)


class Installation:
    """A master target's authority and book of tokens, below a directory."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.directory = PrivateDirectory(Files(), path)
        self.authority = Authority.open(self.directory, clock)
        self.tokens = TokenBook(self.directory, self.authority.pin, clock)
        self.server = self.authority.own_id(ServerKind.MASTER_TARGET)


@contextmanager
def refused(code: str) -> Iterator[pytest.ExceptionInfo[ReplicatorError]]:
    """The block raises our error with this code, and the error says what to do."""
    with pytest.raises(ReplicatorError) as caught:
        yield caught
    error = caught.value
    assert error.code == code, error
    assert error.message and error.cause and error.fix


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777
