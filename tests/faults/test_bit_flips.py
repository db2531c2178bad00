"""I5: a bit of a log that changes between acknowledgement and recovery is detected or harmless, no more."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.faults.flips import PARTS, Target, outcome
from tests.faults.oracle import Violation


def flips(folder: Path, seed: int, most: int, parts: Sequence[str] = PARTS) -> Counter[tuple[str, str]]:
    """Change so many bits, one at a time, of every part in turn; counts what came of it.

    Raises:
        Violation: something was served that the source never held; with what replays it.
    """
    target = Target(folder, seed)
    seen: Counter[tuple[str, str]] = Counter()
    for number in range(most):
        part, rng = parts[number % len(parts)], random.Random(f"{seed}/{number}")
        path, oracle, what = target.flip(part, rng)
        try:
            seen[part, outcome(path, oracle, rng)] += 1
        except (AssertionError, LookupError) as error:
            raise Violation(f"I5: story {seed:#x}, flip {number}, {what}: {error!r}") from error
    return seen


@pytest.mark.timeout(0)
def test_a_flipped_bit_is_never_served(in_memory: Path, seed: int, count: Callable[[int, int], int]) -> None:
    seen = flips(in_memory / "story", seed, count(2_000, 100_000))
    assert not seen["open header", "harmless"], seen
    for part in ("table", "payload"):  # all else is there twice: closed segments have an index
        assert not seen[part, "harmless"], seen
        assert seen[part, "refused"], seen
    print(f"{seen.total()} flips: {dict(seen)}")
