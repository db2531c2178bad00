"""An epoch that goes from a source into an image in one process: modes, breaks, and what is noted when."""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from protocol.messages import Interval, Mode
from protocol.payload import Extent
from replicator.errors import TargetError
from replicator.extents import Coverage
from replicator.files import Files
from replicator.framing import Progress, SendingDisk
from replicator.images.device import RawImage
from replicator.local import LocalDisk, LocalEpoch
from replicator.sources.raw import RawSource
from replicator.workers import Workers

MIB = 1 << 20
SIZE = 40 * MIB + 512
SEED = 7


class Recording:
    """A raw image that tells in which order it was written, synced and noted."""

    def __init__(self, image: RawImage) -> None:
        self._image = image
        self.events: list[str] = []
        self.fail_after = 1 << 30
        self.noted = Coverage()
        self.size_bytes, self.name, self.digests = image.size_bytes, image.name, image.digests

    @property
    def blank(self) -> bool:
        return self._image.blank

    def write(self, extents: Sequence[Extent], payload: memoryview) -> None:
        self.fail_after -= 1
        if self.fail_after < 0:
            raise TargetError("target.write_failed", "no", cause="c", fix="f")
        self._image.write(extents, payload)
        self.events.append("write")

    def sync(self) -> None:
        self._image.sync()
        self.events.append("sync")

    def note(self, entries: Sequence[tuple[int, int, int]]) -> None:
        self.events.append("note")
        for _, start, end in entries:
            self.noted.add(start, end)

    def read_ahead(self, extents: Sequence[Extent]) -> None:
        raise AssertionError("an epoch reads the image by digests alone")

    def read_into(self, extents: Sequence[Extent], view: memoryview) -> None:
        raise AssertionError("an epoch reads the image by digests alone")

    def close(self) -> None:
        self._image.close()


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def content(rng: random.Random) -> bytearray:
    found = bytearray(SIZE)
    for _ in range(12):
        offset = rng.randrange(SIZE // 512) * 512
        length = min(rng.randrange(1, 8000) * 512, SIZE - offset)
        found[offset : offset + length] = rng.randbytes(length)
    return found


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers() as workers:
        yield workers


@pytest.fixture
def source(tmp_path: Path, content: bytearray) -> Path:
    path = tmp_path / "source.img"
    path.write_bytes(content)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Recording]:
    image = Recording(RawImage.create(Files(), tmp_path / "image.img", SIZE))
    yield image
    image.close()


async def say(
    source: Path,
    image: Recording,
    workers: Workers,
    mode: Mode,
    done: Sequence[Interval] = (),
    listed: Sequence[Interval] | None = None,
) -> Progress:
    progress = Progress()
    disk = SendingDisk("disk", await RawSource.open(Files(), workers, source), number=1, listed=listed)
    disk.durable = Coverage(done)
    try:
        epoch = LocalEpoch([LocalDisk(disk, image)], mode, workers, SEED, progress, image.note)  # type: ignore[arg-type]
        await epoch.run()
    finally:
        await disk.source.close()
    assert progress.done == progress.size == SIZE
    assert disk.durable.is_whole(SIZE)
    return progress


def held(tmp_path: Path) -> bytes:
    return (tmp_path / "image.img").read_bytes()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, offset)
    os.close(fd)


async def test_a_full_epoch_makes_the_image_the_source(
    source: Path, image: Recording, workers: Workers, content: bytearray, tmp_path: Path
) -> None:
    progress = await say(source, image, workers, Mode.FULL)
    assert held(tmp_path) == content
    assert image.noted.is_whole(SIZE)
    assert progress.sent == 0


async def test_nothing_is_noted_before_it_is_synced(source: Path, image: Recording, workers: Workers) -> None:
    await say(source, image, workers, Mode.FULL)
    for at, event in enumerate(image.events):
        if event == "note":
            assert "sync" in image.events[max(0, at - 40) : at]
            last_sync = at - 1 - image.events[:at][::-1].index("sync")
            assert "note" not in image.events[last_sync:at]
    assert image.events.count("note") == image.events.count("sync") > 1


async def test_a_resync_writes_the_difference_and_clears_what_is_zero(
    source: Path,
    image: Recording,
    workers: Workers,
    content: bytearray,
    tmp_path: Path,
    rng: random.Random,
) -> None:
    await say(source, image, workers, Mode.FULL)
    overwrite(tmp_path / "image.img", 3 * MIB, rng.randbytes(4096))
    overwrite(tmp_path / "image.img", 20 * MIB, rng.randbytes(2 * MIB))
    image._image.blank = False
    overwrite(source, 9 * MIB, bytes(MIB))
    content[9 * MIB : 10 * MIB] = bytes(MIB)
    progress = await say(source, image, workers, Mode.RESYNC)
    assert held(tmp_path) == content
    assert progress.matched > SIZE / 2


async def test_a_list_is_all_that_is_looked_at(
    source: Path, image: Recording, workers: Workers, content: bytearray, tmp_path: Path, rng: random.Random
) -> None:
    await say(source, image, workers, Mode.FULL)
    image._image.blank = False
    for at in (5 * MIB, 30 * MIB):
        data = rng.randbytes(4096)
        overwrite(source, at, data)
        content[at : at + 4096] = data
    listed = [Interval(at, at + 64 * 1024) for at in (5 * MIB, 30 * MIB)]
    progress = await say(source, image, workers, Mode.INCREMENTAL, listed=listed)
    assert held(tmp_path) == content
    assert progress.read <= 2 * 64 * 1024


async def test_after_a_break_only_what_was_not_noted_is_said(
    source: Path, image: Recording, workers: Workers, content: bytearray, tmp_path: Path
) -> None:
    image.fail_after = 8
    with pytest.raises(TargetError):
        await say(source, image, workers, Mode.FULL)
    noted = image.noted.intervals()
    assert 0 < image.noted.covered_bytes < SIZE
    image.fail_after = 1 << 30
    progress = await say(source, image, workers, Mode.FULL, done=noted)
    assert held(tmp_path) == content
    assert progress.read <= SIZE - sum(end - start for start, end in noted)


@pytest.mark.parametrize("name", ["write", "sync"])
async def test_what_an_image_raises_ends_the_epoch_as_it_is(
    source: Path, image: Recording, workers: Workers, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: object) -> None:
        raise TargetError("target.sync_failed", "no", cause="c", fix="f")

    monkeypatch.setattr(image, name, fail)
    with pytest.raises(TargetError, match="no"):
        await say(source, image, workers, Mode.FULL)
    assert image.noted.covered_bytes == 0 or name == "write"
