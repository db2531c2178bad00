"""What every test of faults gets: memory to be quick in, and segments that a small disk fills."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.log.log import Log
from tests.faults.story import SEGMENT_BYTES


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """An empty folder on a tmpfs, where a sync costs nothing."""
    path = Path(tempfile.mkdtemp(prefix="replicator-faults-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log begins a new segment after a few frames: else nothing could be applied early."""
    for make in (Log.create, Log.open):
        monkeypatch.setitem(make.__func__.__kwdefaults__, "segment_bytes", SEGMENT_BYTES)  # type: ignore[attr-defined]
