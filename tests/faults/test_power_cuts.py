"""The power fails before any call of the story, and any of what was not synced is gone: I1 to I4 hold."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator.errors import ReplicatorError
from tests.faults.chapters import Chapters
from tests.faults.checks import recovers
from tests.faults.oracle import Violation
from tests.faulty_files import FaultyFiles

PER_STORY = 500


def power_cuts(folder: Path, seed: int, most: int, before: str = "") -> Counter[str]:
    """Cut the power in so many states of one story, any of them, each once; counts what recovery was.

    ``before``: only calls of this kind.

    Raises:
        Violation: with what replays it.
    """
    chapters = Chapters(folder, seed)
    places = list(chapters.places(before))
    seen: Counter[str] = Counter()
    for chapter, kth in random.Random(seed).sample(places, min(most, len(places))):
        path, oracle = chapters.cut(chapter, kth, FaultyFiles(seed + kth))
        try:
            seen[recovers(path, oracle, random.Random(seed + kth))] += 1
        except (AssertionError, ReplicatorError) as error:
            where = f"story {seed:#x}, power cut in step {chapter.step} before call {kth}"
            raise Violation(f"{where}: {type(error).__name__}: {error}") from error
    return seen


@pytest.mark.timeout(0)
def test_whenever_the_power_fails_nothing_promised_is_lost(
    in_memory: Path, seed: int, count: Callable[[int, int], int]
) -> None:
    wanted = count(2_000, 1_000_000)
    seen: Counter[str] = Counter()
    while seen.total() < wanted:
        number = seen.total() // PER_STORY
        seen += power_cuts(in_memory / f"{number}", seed + number, min(PER_STORY, wanted - seen.total()))
    assert len(seen) == 4, seen  # every way to come back was taken
    print(f"{seen.total()} power cuts: {dict(seen)}")
