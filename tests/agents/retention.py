"""Looks at what a target keeps for itself in files: the epoch under way, and what of it is durable.

Not here: what a target says of itself (`harness.py`).
"""

import json
import os
import tempfile
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

from replicator.extents import Coverage
from replicator.files import Files
from replicator.images.coverage_journal import CoverageJournal
from replicator.log.log import Log
from replicator.log.records import Kind, parse_name, segment_name
from replicator.private_directory import PrivateDirectory
from tests.agents.harness import MIB


def group_directory(retention: Path, group: str) -> Path:
    return retention / "groups" / sha256(group.encode()).hexdigest()[:32]


def epochs_of(retention: Path, group: str) -> dict[str, Any]:
    """What the catalogue says of a group: `sealed` and `under_way`, in hex."""
    catalogue = json.loads((retention / "catalogue.json").read_text())
    (found,) = (each for each in catalogue["groups"] if each["name"] == group)
    return found


def logs_of(retention: Path, group: str) -> list[tuple[Kind, int, int]]:
    """Kind, epoch and segment of every file of a log that a group has, sorted."""
    folder = group_directory(retention, group)
    names = os.listdir(folder) if folder.exists() else []
    return sorted(parsed for parsed in map(parse_name, names) if parsed is not None)


def durable(retention: Path, group: str, disk: int = 1) -> Coverage:
    """What of the epoch under way is durable, by its journal or log. A target may be running."""
    covered = Coverage()
    with tempfile.TemporaryDirectory(dir=retention.parent.parent) as scratch:
        number = epochs_of(retention, group)["number"] if (retention / "catalogue.json").exists() else 0
        journal = retention / f"epoch-{number}.coverage"
        if journal.exists():
            _copy(journal, Path(scratch) / journal.name)
            with PrivateDirectory(Files(), Path(scratch)).held() as held:
                opened = CoverageJournal.open(held, number)
                opened.close()
            covered = opened.disks.get(disk, covered)
        for start, end in _logged(retention, group, number, Path(scratch), disk):
            covered.add(start, end)
    return covered


def _logged(retention: Path, group: str, number: int, scratch: Path, disk: int) -> list[tuple[int, int]]:
    for kind, epoch, segment in reversed(logs_of(retention, group)):
        if (kind, epoch) == (Kind.REDO, number):
            name = segment_name(kind, epoch, segment)
            _copy(group_directory(retention, group) / name, scratch / name)
    seed = int(json.loads((retention / "authority.json").read_text())["hash_seed"], 16)
    fd = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    try:
        log = Log.open(Files(), fd, Kind.REDO, number, seed)
        if log is None:
            return []
        with closing(log):
            return [
                (entry.header.cover_start, entry.header.cover_end)
                for segment in log.segments()
                for entry in log.entries(segment)
                if entry.header.disk == disk
            ]
    finally:
        os.close(fd)


def _copy(path: Path, copy: Path) -> None:
    """Copy a file that may be growing, from its end: all that came before what is in the copy is, too."""
    with path.open("rb") as read, copy.open("wb") as written:
        size = os.fstat(read.fileno()).st_size
        written.truncate(size)
        for start in range((size - 1) // MIB * MIB, -1, -MIB):
            os.pwrite(written.fileno(), os.pread(read.fileno(), MIB, start), start)
