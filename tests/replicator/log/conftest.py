"""Places for logs: the test's own file system, and memory, where a sync costs nothing."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """An empty folder on a tmpfs."""
    path = Path(tempfile.mkdtemp(prefix="replicator-log-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, in_memory: Path) -> Path:
    """An empty folder, once on each of the two."""
    if request.param == "memory":
        return in_memory
    path = tmp_path / "log"
    path.mkdir()
    return path
