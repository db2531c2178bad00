"""What every image must do, whatever lies under it: one suite, run over all kinds (test_conformance.py).

A kind says how to make an image, how to open it again and how to read it by other means.
"""

import errno
import logging
import mmap
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import pytest

from protocol.payload import Extent
from replicator.errors import SpaceError, TargetError
from replicator.files import Files
from replicator.images.base import Image
from replicator.images.writer import FileImage

SECTOR = 512
MIB = 1 << 20


class Kind(Protocol):
    """One way to have an image. ``sector``: its size must be a multiple of it."""

    sector: int

    def make(self, files: Files, size: int) -> Image: ...

    def reopen(self, files: Files) -> Image: ...

    def content(self, size: int) -> bytes:
        """What the medium holds, read by other means than the image's."""
        ...


class FileKind(Kind, Protocol):
    """One that lies in a file or device, behind the I/O seam."""

    @property
    def path(self) -> Path: ...

    def make(self, files: Files, size: int) -> FileImage: ...

    def reopen(self, files: Files) -> FileImage: ...


# ------------------------------------------------------------------ helpers


def aligned(content: bytes | bytearray) -> memoryview:
    """The content in page-aligned memory, as the pool hands it out."""
    memory = memoryview(mmap.mmap(-1, max(1, len(content))))
    memory[: len(content)] = content
    return memory[: len(content)]


def read_back(path: Path, size: int) -> bytes:
    """What the medium holds: read past the page cache's copy, by plain system calls."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found = bytearray()
        while len(found) < size:
            part = os.pread(fd, size - len(found), len(found))
            assert part, f"{path} ends after {len(found)} bytes"
            found += part
        return bytes(found)
    finally:
        os.close(fd)


def first_difference(found: bytes, expected: bytes | bytearray) -> str | None:
    if found == expected:
        return None
    at = next(at for at, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    return f"first difference at byte {at} (sector {at // SECTOR}, page {at // 4096})"


def random_extents(rng: random.Random, size: int, longest: int) -> list[Extent]:
    """Sorted, disjoint, whole sectors; some touch, some are zeros."""
    extents: list[Extent] = []
    position = 0
    while position < size and len(extents) < 64:
        position += rng.choice((0, 0, rng.randrange(0, 9), rng.randrange(0, 200))) * SECTOR
        length = min(size - position, rng.randrange(1, longest // SECTOR + 1) * SECTOR)
        if length > 0:
            extents.append(Extent(position, length, rng.random() < 0.25))
        position += max(0, length)
    return extents


def put(image: Image, model: bytearray, extents: Sequence[Extent], rng: random.Random) -> None:
    """Write random bytes to image and model alike."""
    payload = bytearray()
    for extent in extents:
        data = bytes(extent.length) if extent.zero else rng.randbytes(extent.length)
        model[extent.offset : extent.end] = data
        payload += b"" if extent.zero else data
    image.write(extents, aligned(payload))


def read_extents(image: Image, extents: Sequence[Extent], lead: int = 0) -> bytes:
    """What an image holds there; the memory begins ``lead`` bytes behind a page's start."""
    memory = aligned(bytes(lead + sum(extent.length for extent in extents)))[lead:]
    image.read_ahead(extents)
    image.read_into(extents, memory)
    return bytes(memory)


def wanted(model: bytearray, extents: Sequence[Extent]) -> bytes:
    """What a model holds there."""
    return b"".join(model[extent.offset : extent.end] for extent in extents)


def fill(image: Image, rng: random.Random) -> bytearray:
    """An image full of random bytes, synced, no longer blank; returns its content."""
    model = bytearray(image.size_bytes)
    for start in range(0, image.size_bytes, MIB):
        put(image, model, [Extent(start, min(MIB, image.size_bytes - start))], rng)
    image.sync()
    image.blank = False
    return model


class ShortWrites(Files):
    """Each write stops at a random sector."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        sectors = len(data) // SECTOR
        return super().pwrite(fd, data[: self.rng.randrange(1, sectors + 1) * SECTOR], offset)


class ShortReads(Files):
    """Each read stops at a random sector."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        first = buffers[0]
        return super().preadv(fd, [first[: self.rng.randrange(1, len(first) // SECTOR + 1) * SECTOR]], offset)


class Refusing(Files):
    """Refuses what it is told to, with an errno each."""

    def __init__(self, **errors: int) -> None:
        self.errors = errors
        self.calls: list[str] = []

    def _refuse(self, call: str) -> None:
        self.calls.append(call)
        if call in self.errors:
            raise OSError(self.errors[call], os.strerror(self.errors[call]))

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
        if flags & os.O_DIRECT:
            self._refuse("open_direct")
        return super().open(path, flags, mode)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if data:
            self._refuse("pwrite_direct" if is_direct(fd) else "pwrite")
        return super().pwrite(fd, data, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        call = "preadv_direct" if is_direct(fd) else "preadv"
        if call in self.errors:  # a descriptor's reads are not of interest
            self._refuse(call)
        return super().preadv(fd, buffers, offset)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self._refuse(f"fallocate_{mode:#x}")
        self._refuse("fallocate")
        super().fallocate(fd, mode, offset, length)

    def zero_device(self, fd: int, offset: int, length: int) -> None:
        self._refuse("zero_device")
        super().zero_device(fd, offset, length)

    def fdatasync(self, fd: int) -> None:
        self._refuse("fdatasync")
        super().fdatasync(fd)


def is_direct(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


# ------------------------------------------------------------------ the suite


class ImageConformance:
    """What every image must do. Collected through a subclass that has a fixture ``kind``."""

    @pytest.fixture
    def rng(self, seed: int) -> random.Random:
        return random.Random(seed)

    @pytest.fixture
    def size(self, kind: Kind) -> int:
        return 3 * MIB + kind.sector

    @pytest.fixture
    def image(self, kind: Kind, size: int) -> Iterator[Image]:
        image = kind.make(Files(), size)
        yield image
        image.close()

    def check(self, kind: Kind, image: Image, model: bytearray) -> None:
        image.sync()
        assert first_difference(kind.content(len(model)), model) is None

    @pytest.mark.parametrize("sectors", [1, 7, 513, 3 * 2048 + 1])
    def test_any_size_is_written_whole(self, kind: Kind, sectors: int, rng: random.Random) -> None:
        image = kind.make(Files(), sectors * kind.sector)
        assert image.size_bytes == sectors * kind.sector
        self.check(kind, image, fill(image, rng))
        image.close()

    @pytest.mark.parametrize("longest", [8 * SECTOR, 200 * SECTOR, MIB])
    def test_random_extents_end_up_as_in_the_model(
        self, kind: Kind, image: Image, size: int, rng: random.Random, longest: int
    ) -> None:
        model = fill(image, rng)
        for _ in range(12):
            put(image, model, random_extents(rng, size, longest), rng)
        self.check(kind, image, model)

    def test_memory_that_is_not_aligned_is_written_as_well(
        self, kind: Kind, image: Image, size: int, rng: random.Random
    ) -> None:
        model = fill(image, rng)
        data = rng.randbytes(2 * MIB)
        image.write([Extent(4096, len(data))], aligned(b"x" + data)[1:])
        model[4096 : 4096 + len(data)] = data
        last = size - 100 * 1024  # read-only memory has no address for us
        image.write([Extent(last, 100 * 1024)], memoryview(bytes(100 * 1024)))
        model[last:] = bytes(100 * 1024)
        self.check(kind, image, model)

    def test_zeros_over_data_are_zeros_and_the_neighbours_stay(
        self, kind: Kind, image: Image, size: int, rng: random.Random
    ) -> None:
        model = fill(image, rng)
        for offset, length in ((0, SECTOR), (7 * SECTOR, 9 * SECTOR), (MIB - SECTOR, MIB + 2 * SECTOR)):
            put(image, model, [Extent(offset, length, True)], rng)
        put(image, model, [Extent(size - SECTOR, SECTOR, True)], rng)
        self.check(kind, image, model)
        put(image, model, [Extent(0, size, True)], rng)
        self.check(kind, image, model)

    def test_a_new_image_reads_as_zeros_where_nothing_was_written(
        self, kind: Kind, image: Image, size: int, rng: random.Random
    ) -> None:
        if not image.blank:
            return  # a device holds what it held
        model = bytearray(size)
        put(image, model, [Extent(0, MIB, True), Extent(MIB, 5 * SECTOR), Extent(2 * MIB, MIB, True)], rng)
        self.check(kind, image, model)

    def test_what_is_synced_is_there_after_opening_it_again(
        self, kind: Kind, image: Image, size: int, rng: random.Random
    ) -> None:
        model = fill(image, rng)
        image.close()
        again = kind.reopen(Files())
        assert (again.size_bytes, again.blank) == (size, False)
        put(again, model, random_extents(rng, size, 100 * SECTOR), rng)
        self.check(kind, again, model)
        again.close()

    def test_neighbours_written_by_many_threads_at_once_lose_nothing(
        self, kind: Kind, image: Image, rng: random.Random, count: Callable[[int, int], int]
    ) -> None:
        threads, rounds = 6, count(6, 200)
        model = fill(image, rng)
        assert getattr(image, "direct", True)  # otherwise half of this test is not there
        for round_number in range(rounds):
            owned = owners(rng, image.size_bytes, threads)
            seeds = [rng.randbytes(8) for _ in owned]

            def hammer(mine: list[Extent], own_seed: bytes) -> list[tuple[Extent, bytes]]:
                own = random.Random(own_seed)
                own.shuffle(mine)
                written: list[tuple[Extent, bytes]] = []
                for at in range(0, len(mine), 3):
                    some = sorted(mine[at : at + 3])
                    data = [bytes(e.length) if e.zero else own.randbytes(e.length) for e in some]
                    payload = b"".join(d for e, d in zip(some, data, strict=True) if not e.zero)
                    image.write(some, aligned(payload))
                    written += zip(some, data, strict=True)
                    if own.random() < 0.1:
                        image.sync()
                return written

            with ThreadPoolExecutor(threads) as pool:
                for written in pool.map(hammer, owned, seeds):
                    for extent, data in written:
                        model[extent.offset : extent.end] = data
            image.sync()
            found = first_difference(kind.content(len(model)), model)
            assert found is None, f"round {round_number}: {found}"

    @pytest.mark.parametrize("longest", [SECTOR, 8 * SECTOR, 200 * SECTOR, MIB])
    @pytest.mark.parametrize("lead", [0, SECTOR, 1])
    def test_extents_are_read_as_they_were_written(
        self, image: Image, size: int, rng: random.Random, longest: int, lead: int
    ) -> None:
        model = fill(image, rng)
        for _ in range(12):
            extents = random_extents(rng, size, longest)
            assert read_extents(image, extents, lead) == wanted(model, extents)

    def test_what_was_written_just_now_is_read(self, image: Image, size: int, rng: random.Random) -> None:
        model = fill(image, rng)
        for _ in range(12):
            put(image, model, random_extents(rng, size, 300 * SECTOR), rng)
            extents = random_extents(rng, size, 300 * SECTOR)
            assert read_extents(image, extents) == wanted(model, extents)

    def test_a_read_beyond_the_end_or_of_another_length_is_our_own_mistake(
        self, image: Image, size: int
    ) -> None:
        for extents, length in (([Extent(size, SECTOR)], SECTOR), ([Extent(0, SECTOR)], 2 * SECTOR)):
            with pytest.raises(ValueError, match="do not fit"):
                image.read_into(extents, aligned(bytes(length)))

    def test_a_write_beyond_the_end_is_our_own_mistake_and_changes_nothing(
        self, kind: Kind, image: Image, size: int, rng: random.Random
    ) -> None:
        model = fill(image, rng)
        for extents, length in (
            ([Extent(size, SECTOR)], SECTOR),
            ([Extent(0, SECTOR)], 2 * SECTOR),
            ([Extent(size, SECTOR, True)], 0),
        ):
            with pytest.raises(ValueError, match="do not fit"):
                image.write(extents, aligned(bytes(length)))
        self.check(kind, image, model)


class FileConformance(ImageConformance):
    """What images in files and devices must do besides: how the file system fails them, and O_DIRECT."""

    def test_short_writes_are_finished(self, kind: FileKind, size: int, rng: random.Random) -> None:
        kind.make(Files(), size).close()
        image = kind.reopen(ShortWrites(rng))
        model = fill(image, rng)
        put(image, model, random_extents(rng, size, 700 * SECTOR), rng)
        self.check(kind, image, model)
        image.close()

    def test_short_reads_are_finished(self, kind: FileKind, size: int, rng: random.Random) -> None:
        image = kind.make(Files(), size)
        model = fill(image, rng)
        image.close()
        image = kind.reopen(ShortReads(rng))
        for longest in (8 * SECTOR, MIB):
            extents = random_extents(rng, size, longest)
            assert read_extents(image, extents) == wanted(model, extents)
        image.close()

    def test_where_nothing_is_read_past_the_cache_it_says_so_and_goes_on(
        self, kind: FileKind, size: int, rng: random.Random
    ) -> None:
        image = kind.make(Files(), size)
        model = fill(image, rng)
        image.close()
        image = kind.reopen(Refusing(preadv_direct=errno.EINVAL))
        assert read_extents(image, [Extent(0, size)]) == model
        assert not image.direct
        image.close()

    @pytest.mark.parametrize("call", ["preadv", "preadv_direct"])
    def test_a_failed_read_names_the_image(self, kind: FileKind, size: int, call: str) -> None:
        kind.make(Files(), size).close()
        files = Refusing()
        image = kind.reopen(files)
        files.errors = {call: errno.EIO}
        with pytest.raises(TargetError, match=image.name) as caught:
            read_extents(image, [Extent(0, SECTOR if call == "preadv" else MIB)])
        assert caught.value.code == "target.read_failed"
        image.close()

    @pytest.mark.parametrize("where", ["open_direct", "pwrite_direct"])
    def test_without_direct_io_it_says_so_once_and_goes_on(
        self, kind: FileKind, size: int, rng: random.Random, where: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        kind.make(Files(), size).close()
        files = Refusing(**{where: errno.EINVAL})
        with caplog.at_level(logging.WARNING):
            image = kind.reopen(files)
            self.check(kind, image, fill(image, rng))
        assert not image.direct
        assert image.note is not None
        assert image.note.startswith(f"{image.name}: O_DIRECT is refused here")
        assert [record.getMessage() for record in caplog.records] == [image.note]
        assert files.calls.count(where) == 1
        image.close()

    def test_where_nothing_can_zero_a_range_zeros_are_written(
        self, kind: FileKind, size: int, rng: random.Random
    ) -> None:
        kind.make(Files(), size).close()
        image = kind.reopen(Refusing(fallocate=errno.EOPNOTSUPP, zero_device=errno.ENOTTY))
        model = fill(image, rng)
        put(image, model, [Extent(SECTOR, 2 * MIB + SECTOR, True), Extent(size - SECTOR, SECTOR, True)], rng)
        self.check(kind, image, model)
        image.close()

    @pytest.mark.parametrize(
        ("number", "leaf", "code"),
        [
            (errno.ENOSPC, SpaceError, "target.full"),
            (errno.EDQUOT, SpaceError, "target.full"),
            (errno.EROFS, TargetError, "target.read_only"),
            (errno.EIO, TargetError, "target.write_failed"),
        ],
    )
    @pytest.mark.parametrize("call", ["pwrite", "pwrite_direct", "zero"])
    def test_an_error_names_image_and_place(
        self, kind: FileKind, size: int, number: int, leaf: type[Exception], code: str, call: str
    ) -> None:
        kind.make(Files(), size).close()
        zeroing = {"fallocate": number, "zero_device": number}
        image = kind.reopen(Refusing(**(zeroing if call == "zero" else {call: number})))
        length = MIB if call != "pwrite" else SECTOR
        data = b"" if call == "zero" else bytes(length)
        with pytest.raises(leaf) as caught:
            image.write([Extent(MIB, length, call == "zero")], aligned(data))
        assert caught.value.code == code  # type: ignore[attr-defined]
        assert f"{image.name} at byte {MIB}" in str(caught.value)
        image.close()

    def test_after_a_failed_sync_nothing_is_written_or_synced_any_more(
        self, kind: FileKind, size: int
    ) -> None:
        kind.make(Files(), size).close()
        files = Refusing(fdatasync=errno.EIO)
        image = kind.reopen(files)
        calls: list[Callable[[], None]] = [
            image.sync,
            image.sync,
            lambda: image.write([Extent(0, SECTOR)], aligned(bytes(SECTOR))),
            lambda: image.read_into([Extent(0, SECTOR)], aligned(bytes(SECTOR))),
        ]
        for call in calls:
            with pytest.raises(TargetError) as caught:
                call()
            assert caught.value.code == "target.sync_failed"
        assert files.calls == ["open_direct", "fdatasync"]
        image.close()

    def test_closing_twice_is_fine_and_ends_it(self, kind: FileKind, size: int) -> None:
        image = kind.make(Files(), size)
        before = len(os.listdir("/proc/self/fd"))
        image.close()
        image.close()
        assert len(os.listdir("/proc/self/fd")) == before - 2
        with pytest.raises(TargetError):
            image.write([Extent(0, SECTOR)], aligned(bytes(SECTOR)))


def owners(rng: random.Random, size: int, threads: int) -> list[list[Extent]]:
    """The whole image cut into pieces at odd sectors, dealt out so that neighbours have different owners."""
    cuts, position = [0], 0
    while position < size:
        position = min(size, position + rng.choice((1, 3, 8, 129, 300, 700, rng.randrange(1, 40))) * SECTOR)
        cuts.append(position)
    owned: list[list[Extent]] = [[] for _ in range(threads)]
    for number, (start, end) in enumerate(pairwise(cuts)):
        owned[number % threads].append(Extent(start, end - start, rng.random() < 0.15))
    return owned
