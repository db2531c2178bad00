"""The story in a process of its own, on a file system that is cut off under it. See `test_file_systems.py`.

    python -m tests.faults.child FOLDER SEED [careless]

Tells the oracle on the other end of stdout, a line of JSON for each event, before the next thing is done.
`careless`: a build that calls everything durable and syncs nothing, which must be caught.
"""

import json
import random
import sys
from pathlib import Path

from replicator.files import Files
from replicator.log.log import Log
from tests.faults.oracle import Source
from tests.faults.story import SEGMENT_BYTES, Machine, Story


class Teller:
    """`Told`, over stdout."""

    def __getattr__(self, event: str):
        return lambda *args: print(json.dumps([event, *args]), flush=True)


class Careless(Files):
    """Says that everything is durable."""

    def fsync(self, fd: int) -> None:
        """Nothing."""

    def fdatasync(self, fd: int) -> None:
        """Nothing."""


def small_segments() -> None:
    """A log begins a new segment after a few frames: else nothing could be applied early."""
    for make in (Log.create, Log.open):
        make.__func__.__kwdefaults__["segment_bytes"] = SEGMENT_BYTES  # type: ignore[attr-defined]


def main(folder: str, seed: str, *how: str) -> None:
    """The whole story."""
    small_segments()
    machine = Machine(Path(folder), Careless() if how else Files())
    story = Story(machine, Teller(), Source(int(seed)), random.Random(int(seed)))
    for step in story.steps():
        step()


if __name__ == "__main__":
    main(*sys.argv[1:])
