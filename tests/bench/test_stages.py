"""What the stages allow: the sum of their costs, by hand; and that each of them can be measured."""

import os
from pathlib import Path

import pytest

from bench import stages
from bench.disk import Content
from bench.stages import Measured, Sample, Stage

MIB = 1 << 20
NAMES = (
    stages.READ, stages.ZERO_TEST_DATA, stages.ZERO_TEST_ZEROS, stages.DIGEST, stages.HASH,
    stages.compressing(1), stages.decompressing(1), stages.OUT, stages.IN, stages.WRITE,
)  # fmt: skip


def measured(write_bytes_s: float, **rates: float) -> Measured:
    """All stages at 1 GB/s, but for those given."""
    found = tuple(Stage(name, rates.get(name, 1e9)) for name in NAMES)
    return Measured(found, {0: 1.0, 1: 0.5}, write_bytes_s)


def taken(zero_share: float) -> Sample:
    return Sample(Path(), (), (), zero_share)


def test_the_ideal_is_the_sum_of_all_stages_over_the_cores() -> None:
    raw, compressed = stages.ideals(Content(4 * 10**9, 10**9), taken(0.0), measured(1e12), cores=2)
    # read, digest, zero test, write; two hashes of the data, two of the wire; TLS both ways
    assert raw.cpu_s == pytest.approx(4 + 4 + 2)
    assert raw.seconds == pytest.approx(5)
    assert raw.mb_s == pytest.approx(800)
    assert compressed.cpu_s == pytest.approx(4 + 3 + 1 + 2)


def test_zeros_are_read_and_tested_and_that_is_all() -> None:
    found = stages.ideals(Content(10**9, 10**9), taken(1.0), measured(1e12), cores=1)
    assert [ideal.cpu_s for ideal in found] == pytest.approx([3, 3])


def test_it_is_never_faster_than_the_file_system_writes() -> None:
    raw, _ = stages.ideals(Content(10**9, 10**9), taken(0.0), measured(1e8), cores=64)
    assert raw.seconds == pytest.approx(10)


def test_every_stage_can_be_measured(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
        file.write(os.urandom(MIB // 2).hex().encode() * 4)  # compresses two to one
        file.write(bytes(4 * MIB))
    sample = stages.sample(image)
    assert sample.zero_share == pytest.approx(0.5)
    found = stages.measure(sample, tmp_path)
    assert [stage.name for stage in found.stages] == list(NAMES)
    assert all(stage.bytes_per_s > 0 for stage in found.stages)
    assert 0.4 < found.ratios[1] < 0.65
