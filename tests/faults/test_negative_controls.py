"""Builds that are broken on purpose are caught by the very same checks: else finding nothing proves nothing.

One more, that syncs nothing at all, is caught on a real file system: `test_file_systems.py`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from protocol import header
from replicator.log import apply, scan
from replicator.log.segment import SegmentFile
from tests.faults.oracle import Violation
from tests.faults.test_bit_flips import flips
from tests.faults.test_power_cuts import power_cuts

SEEDS = 6
STATES = 150


def is_caught(find: Callable[[Path, int], object], folder: Path, seed: int) -> str:
    """What the first violation says. Fails if there is none in `SEEDS` stories."""
    for number in range(SEEDS):
        try:
            find(folder / f"{number}", seed + number)
        except Violation as violation:
            return str(violation)
    pytest.fail(f"not caught in {SEEDS} stories from {seed:#x} on")


def some_cuts(folder: Path, seed: int) -> None:
    power_cuts(folder, seed, STATES)


def some_cuts_before_syncs(folder: Path, seed: int) -> None:
    power_cuts(folder, seed, STATES, before="fdatasync")


def some_flips(folder: Path, seed: int) -> None:
    flips(folder, seed, STATES, ("open header",))


def test_one_that_acknowledges_before_it_syncs(
    in_memory: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SegmentFile, "sync_data", lambda self: None)
    assert is_caught(some_cuts, in_memory, seed)


class AnyHash:
    """A hash that is always the one that was expected: `==` with it is true."""

    def __init__(self, *_: object) -> None:
        pass

    def update(self, _: object) -> None:
        pass

    def intdigest(self) -> "AnyHash":
        return self

    def __eq__(self, _: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_one_that_skips_the_hash_of_a_body_when_it_reads_a_log_anew(
    in_memory: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "xxh3_64", AnyHash)
    assert "log.damaged" in is_caught(some_cuts_before_syncs, in_memory, seed)


def test_one_that_skips_the_hash_of_a_header_when_it_reads_a_log_anew(
    in_memory: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack = header.unpack

    def unchecked(data: memoryview, seed: int) -> header.Header:
        return unpack(rehashed(data, seed), seed)

    monkeypatch.setattr(scan, "unpack", unchecked)
    assert is_caught(some_flips, in_memory, seed)


def rehashed(data: memoryview, seed: int) -> bytes:
    """A header with the hash that fits it."""
    fields = bytes(data[:-8])
    return fields + xxh3_64_intdigest(fields, seed).to_bytes(8, "little")


def test_one_that_captures_undo_twice(in_memory: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "_kept", lambda undo, segment: 0)
    assert "I3" in is_caught(some_cuts, in_memory, seed)
