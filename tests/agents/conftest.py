"""What many of the suite begin with: a running master target, and a process server's empty state."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents.harness import Target, receiving


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with receiving(tmp_path / "target") as target:
        yield target
