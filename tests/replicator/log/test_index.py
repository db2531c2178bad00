"""The index finds exactly the records whose cover has a byte of a stretch, those written meanwhile, too."""

import random
from pathlib import Path

from protocol.messages import Interval
from replicator.files import Files
from replicator.log.index import CoverIndex, Place
from replicator.log.log import Kind, Log
from tests.replicator.log.batches import SEED, directory
from tests.replicator.log.epochs import SECTOR, Change, frame

Known = list[tuple[int, Interval]]


def test_it_finds_what_a_search_through_everything_finds(in_memory: Path, seed: int) -> None:
    rng = random.Random(seed)
    with directory(in_memory / "logs") as dir_fd:
        log = Log.create(Files(), dir_fd, Kind.UNDO, 1, SEED, segment_bytes=200_000)
        index = CoverIndex(log)
        known: Known = []
        for _ in range(30):
            write_some(log, rng, known)
            index.refresh()
            check(log, index, rng, known)
        log.finish()
        check(log, CoverIndex(log), rng, known)
        log.close()


def write_some(log: Log, rng: random.Random, known: Known) -> None:
    """A batch of records without extents, some of them with long covers."""
    frames = []
    for _ in range(rng.randrange(5)):
        start = rng.randrange(1000)
        cover = Interval(start * SECTOR, (start + rng.choice((1, 5, 30, 700))) * SECTOR)
        disk = rng.choice((1, 2))
        known.append((disk, cover))
        frames.append(frame(Change(disk, cover, (), b""), 1, None))
    log.write(frames)
    if rng.random() < 0.2:
        log.roll()


def check(log: Log, index: CoverIndex, rng: random.Random, known: Known) -> None:
    places = [Place(segment, entry.offset) for segment in log.segments() for entry in log.entries(segment)]
    for disk in (1, 2, 3):
        start = rng.randrange(1200) * SECTOR
        end = start + rng.choice((1, 10, 300)) * SECTOR
        wanted = [
            place
            for place, (number, cover) in zip(places, known, strict=True)
            if number == disk and cover.start < end and start < cover.end
        ]
        assert index.records(disk, start, end) == wanted
        ahead = [max(start, cover.start) for number, cover in known if number == disk and cover.end > start]
        assert index.next_cover(disk, start) == min(ahead, default=None)
