"""One bit of a log changes between acknowledgement and recovery: what comes of it. For tests of I5.

The disk is at fault here, and the product may say so, or compare and send again. It may not hand out what the
source never held.
"""

import copy
import os
import random
from pathlib import Path
from typing import Final

from protocol.constants import HEADER_BYTES
from replicator.errors import StateError
from replicator.extents import Relation
from replicator.files import Files
from replicator.log.log import Kind, Log, found
from replicator.log.records import ALIGN, BlockType, block_starts, head_bytes, segment_name
from tests.faults.chapters import Chapters
from tests.faults.checks import images_hold, points
from tests.faults.oracle import SIZES, Oracle
from tests.faults.story import HASH_SEED, Machine, Plot, Story

PARTS: Final = ("header", "table", "payload", "batch", "open header", "anywhere")
"""Of records, batches, and files. An open header is one in a segment that has no index yet."""
SENT = Plot(2, 1)
"""The epoch whose log is changed: sent whole and not sealed, with the one before it not yet applied."""


class Target:
    """The state in which logs are changed, made once, and where in it the parts of records lie."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._chapters = Chapters(folder, seed)
        chapter = next(each for each in self._chapters.all if each.before.newest == SENT.parent)
        self._oracle = copy.deepcopy(chapter.before)
        self._start = folder / "sent"
        self._chapters.copy(chapter.start).rename(self._start)
        machine = Machine(self._start, Files())
        story = Story(machine, self._oracle, self._oracle.source, random.Random(seed))
        story.deliver(SENT._replace(seal=False), whole=True)
        machine.close()
        self.logs = sorted((self._start / "retention").rglob("*.seg"))
        copied = self._chapters.copy(self._start)
        self._parts = {
            part: [
                (self._start / file.relative_to(copied), start, end)
                for file, start, end in places
                if self._start / file.relative_to(copied) in self.logs
            ]
            for part, places in _parts(copied).items()
        }

    def flip(self, part: str, rng: random.Random) -> tuple[Path, Oracle, str]:
        """A copy of it in which one bit of that part is another; which, in words."""
        if part == "anywhere":
            log = rng.choice(self.logs)
            start, end = 0, log.stat().st_size
        else:
            log, start, end = rng.choice(self._parts[part])
        at, bit = rng.randrange(start, end), rng.randrange(8)
        path = self._chapters.copy(self._start)
        log = path / log.relative_to(self._start)
        content = bytearray(log.read_bytes())
        content[at] ^= 1 << bit
        log.write_bytes(content)
        return path, copy.deepcopy(self._oracle), f"{part}: bit {bit} of byte {at} of {log.name}"


def outcome(path: Path, oracle: Oracle, rng: random.Random) -> str:
    """What came of it: "refused", "sent again", "compared", or "harmless". Raises ``Violation``."""
    machine = Machine(path, Files())
    try:
        holding = machine.open(SENT.epoch, SENT.parent)
        try:
            compared = bool(holding.group.adopted)
            whole = all(
                disk.durable.relation(0, SIZES[disk.name]) is Relation.COVERED for disk in holding.disks
            )
        finally:
            holding.close()
        Story(machine, oracle, oracle.source, rng).deliver(SENT, whole=True)
        images_hold(machine, oracle, SENT.epoch)
        if not compared:
            points(machine, oracle, SENT.epoch, applied=True)
    except StateError:
        return "refused"
    finally:
        machine.close()
    return "compared" if compared else "harmless" if whole else "sent again"


def _parts(path: Path) -> dict[str, list[tuple[Path, int, int]]]:
    """Where in the logs the parts of records lie: file, first byte, first byte behind. Closes segments."""
    parts: dict[str, list[tuple[Path, int, int]]] = {part: [] for part in PARTS}
    machine = Machine(path, Files())
    dir_fd = machine.place.open()
    logs = found(machine.files, dir_fd)
    newest = max(number for _, number in logs)
    for kind, number in logs:
        log = Log.open(machine.files, dir_fd, kind, number, HASH_SEED)
        for segment in log.segments() if log is not None else ():
            file = machine.place.directory.path / segment_name(kind, number, segment)
            is_open = log is not None and (kind, number, segment) == (Kind.REDO, newest, log.segments()[-1])
            for entry in log.entries(segment) if log is not None else ():
                header, offset = entry.header, entry.offset
                table, payload = offset + HEADER_BYTES, offset + head_bytes(header)
                parts["header"].append((file, offset, table))
                if is_open:
                    parts["open header"].append((file, offset, table))
                if header.table_len:
                    parts["table"].append((file, table, table + header.table_len))
                if header.body_len > header.table_len:
                    parts["payload"].append((file, payload, payload + header.body_len - header.table_len))
            content = file.read_bytes()
            batches = block_starts(memoryview(content), BlockType.BATCH)
            parts["batch"] += [(file, at, at + ALIGN) for at in batches]
        if log is not None:
            log.close()
    os.close(dir_fd)
    machine.close()
    return parts
