"""What the tests of sources share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.workers import Workers
from tests.faulty_files import FaultyFiles


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers() as made:
        yield made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk of 1 MiB, all data."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * (1 << 20))
    return path


@pytest.fixture
def faulty() -> Iterator[FaultyFiles]:
    files = FaultyFiles()
    yield files
    files.let_go()
