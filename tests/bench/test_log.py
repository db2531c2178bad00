"""The part for the log, with tiny sizes: all figures are there, and what is wrong is no figure."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from bench import disk, ours, report, suite
from bench.contenders import Ends
from bench.errors import BenchError
from bench.log import known, vast
from bench.log.figures import Figure, Unit, row
from bench.log.frames import kinds
from bench.log.pipelined import copy
from bench.namespaces import HostNetwork, free_port
from bench.options import MIB, QUICK_LOG, Options
from bench.processes import RunFailed

TINY = replace(
    QUICK_LOG,
    changed_shares=(0.01, 0.10),
    applied_bytes=8 * MIB,
    blocks_bytes=MIB,
    base_bytes=16 * MIB,
    vast_bytes=(1 << 30, 2 << 30),
    changed_bytes=2 * MIB,
    disks=24,  # more than the target has memory for at once
    disk_bytes=MIB,
    journal_bytes=80 * MIB,
)


@pytest.fixture
def ends() -> Ends:
    network = HostNetwork()
    return Ends(network, network, "127.0.0.1", free_port())


def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("bench.options.QUICK_LOG", TINY)
    options = Options(size_bytes=32 * MIB, parts=("log",), quick=True)
    found: dict[str, Any] = json.loads(json.dumps(suite.run(options, lambda line: None)))
    return found


@pytest.mark.peer("mkfs.ext4")
def test_every_figure_is_measured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    document = measured(monkeypatch)
    assert report.failures(document) == []
    figures = {figure["title"]: figure for figure in document["log"]["figures"]}
    assert len(figures) == 2 + 3 * 4 + 2 + 2 * 4 + 1
    assert all(figure["measured"] > 0 for figure in figures.values())
    page = report.markdown(document)
    assert all(f"| {title} |" in page for title in figures)
    many = [figure for title, figure in figures.items() if "slowest" in title]
    assert [len(figure["runs"]["done after, s"]) for figure in many] == [24, 24]
    start = next(figure for title, figure in figures.items() if "journal" in title)
    assert start["title"].startswith("start over 0.1 GiB")


@pytest.mark.peer("mkfs.ext4")
def test_a_figure_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RunFailed("no luck")

    for name in ("known", "vast", "many", "starting"):
        monkeypatch.setattr(f"bench.log.{name}.measure", broken)
    document = measured(monkeypatch)
    assert len(document["log"]["figures"]) == 12
    assert report.failures(document) == [
        f"nothing came of {what}: no luck"
        for what in ("known changes", "vast disks", "many disks", "starting")
    ]


def test_a_list_of_changes_that_is_not_used_is_no_figure(tmp_path: Path, ends: Ends) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(4 * MIB))
    real = ours.send
    told: list[str] = []

    def forgetful(*given: Any, **named: Any) -> dict[str, Any]:
        """Tells another epoch than the one that was sealed."""
        said = real(*given, **named)
        told.append(said["epoch"])
        return {**said, "epoch": "ab" * 16}

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunFailed, match="did not use its list"):
        patch.setattr(ours, "send", forgetful)
        known.measure(image, TINY, 1, tmp_path / "room", ends, lambda line: None)
    assert told


def test_what_is_not_listed_and_changes_all_the_same_is_found(
    tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(4 * MIB))
    real = known.listed
    half: dict[str, Sequence[tuple[int, int]]] = {ours.DISK: [(0, 2 * MIB)]}
    monkeypatch.setattr(known, "listed", lambda folder, epoch, ranges: real(folder, epoch, half))
    with pytest.raises(BenchError, match="left another disk"):
        known.measure(image, TINY, 1, tmp_path / "room", ends, lambda line: None)


def test_a_disk_is_as_large_as_it_says_and_changes_all_over(tmp_path: Path, ends: Ends) -> None:
    figures = vast.measure(TINY, 1, tmp_path / "room", ends, lambda line: None)
    assert [sorted(figure.runs) for figure in figures] == [["1G, s", "2G, s"]] * 2
    for name, size in (("1G", 1 << 30), ("2G", 2 << 30)):
        target = ours.flat(tmp_path / "room", name)
        ranges = list(disk.data_ranges(target))
        assert target.stat().st_size == size and ranges[-1][1] > size // 4
        assert sum(end - start for start, end in ranges) == TINY.changed_bytes


def test_the_rival_brings_the_very_bytes_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content = os.urandom(12 * MIB)
    source.write_bytes(content)
    extents = [(4096 * number, 4096) for number in range(0, 600, 2)] + [(5 * MIB, 3 * MIB + 512)]
    assert copy(source, extents, target) > 0
    with target.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        assert stream.read() == b"".join(content[start : start + length] for start, length in extents)


def test_changes_are_of_the_kinds_and_sizes_that_were_asked_for() -> None:
    whole, text, blocks = kinds(8 * MIB, MIB, 16 * MIB, 1)
    assert [kind.size_bytes for kind in (whole, text, blocks)] == [8 * MIB, 8 * MIB, MIB]
    assert (whole.level, text.level) == (None, 1)
    for kind, length in ((whole, MIB), (text, MIB), (blocks, 4096)):
        extents = [extent for change in kind.changes for extent in change.extents]
        assert {extent.length for extent in extents} == {length}
        assert [extent.offset for extent in extents] == sorted({extent.offset for extent in extents})
        assert extents[-1].end <= 16 * MIB


@pytest.mark.parametrize(
    ("measured", "at_most", "met"),
    [(2.0, True, True), (2.1, True, False), (2.0, False, True), (1.9, False, False)],
)
def test_what_was_wanted_is_met_or_not(measured: float, at_most: bool, met: bool) -> None:
    figure = Figure("a figure", measured, Unit.RATIO, 2.0, at_most)
    assert figure.met is met
    bound = "at most" if at_most else "at least"
    assert row(figure.document()) == (
        "a figure",
        f"{measured:.2f}",
        f"{bound} 2.00",
        "yes" if met else "no",
    )


def test_of_what_nothing_was_wanted_nothing_is_said() -> None:
    assert row(Figure("memory", 5e6, Unit.BYTES).document()) == ("memory", "5 MB", "", "")
