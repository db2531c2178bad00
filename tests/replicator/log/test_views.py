"""Views of every point are what the disk was, while epochs are applied, undone and merged beside them."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from protocol.constants import SECTOR_BYTES
from protocol.messages import Interval
from protocol.payload import Extent
from replicator.errors import StateError
from replicator.files import Files
from replicator.log import views
from replicator.log.apply import apply_segment
from replicator.log.directory import remove
from replicator.log.history import merge, roll_back
from replicator.log.log import Kind, Log
from replicator.log.views import Past, PointView
from replicator.sources.raw import RawSource
from replicator.verify import content_digest
from replicator.workers import Workers
from tests.replicator.log.batches import KIB, MIB, SEED
from tests.replicator.log.epochs import (
    SIZES,
    Change,
    Group,
    Models,
    change,
    changed,
    frame,
    group,
    image_path,
    make_images,
    random_epoch,
    write_redo,
)
from tests.replicator.sources.conformance import Disk, SourceConformance, extents_of, random_layout, read

T = TypeVar("T")


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers() as made:
        yield made


class Chain:
    """A group, the history of its epochs, and what its disks held at each point; point 0 is the beginning.

    ``logs``: undo logs, oldest first, each with the point that it leads back to. ``pending``: redo logs of
    epochs that are not applied whole, oldest first, each with the point that it leads to.
    """

    def __init__(self, here: Group, models: Models, rng: random.Random) -> None:
        self.here = here
        self.points = {0: models}
        self.logs: list[tuple[int, Log]] = []
        self.pending: list[tuple[int, Log]] = []
        self.generation = 0
        self._epoch = 0
        self._rng = rng

    def append(self, changes: list[Change] | None = None) -> None:
        """One more epoch, applied whole, and a point."""
        for _ in self.steps(changes):
            pass

    def steps(self, changes: list[Change] | None = None) -> Iterator[None]:
        """The same, a segment at a time."""
        newest = max(self.points)
        changes = random_epoch(self._rng) if changes is None else changes
        self.points[newest + 1] = changed(self.points[newest], changes) if self.points[newest] else {}
        yield from self._apply(newest, changes)
        self.logs[-1][1].finish()

    def seal(self) -> None:
        """One more epoch and a point, of which nothing is applied."""
        newest = max(self.points)
        changes = random_epoch(self._rng)
        self.points[newest + 1] = changed(self.points[newest], changes)
        redo = self._redo(changes)
        self.generation += 1
        self.pending.append((newest + 1, redo))

    def apply_pending(self) -> Iterator[None]:
        """What was sealed is applied, a segment at a time."""
        while self.pending:
            point, redo = self.pending[0]
            undo = self.here.log(Kind.UNDO, redo.epoch)
            self._list([*self.logs, (point - 1, undo)])
            for segment in redo.segments():
                apply_segment(redo, segment, self.here.bases, undo, SEED)
                yield
            undo.finish()
            self.generation += 1
            del self.pending[0]
            redo.close()
            yield

    def give_up(self, changes: list[Change] | None = None) -> Iterator[None]:
        """An epoch is applied, and then undone."""
        yield from self._apply(max(self.points), changes or random_epoch(self._rng, share=0.9))
        undo = self.logs[-1][1]
        roll_back(undo, self.here.bases, SEED)
        yield
        self._list(self.logs[:-1])
        undo.close()
        remove(Files(), self.here.dir_fd, Kind.UNDO, undo.epoch)
        yield

    def thin_out(self) -> Iterator[None]:
        """Point 1 goes: two histories become one."""
        into = self.here.log(Kind.UNDO, 1000)
        (_, older), (_, newer), *rest = self.logs
        merge(older, newer, into, SEED)
        yield
        del self.points[1]
        self._list([(0, into), *rest])
        older.close()
        newer.close()
        yield

    def _apply(self, leads_to: int, changes: list[Change]) -> Iterator[None]:
        redo = self._redo(changes)
        undo = self.here.log(Kind.UNDO, self._epoch)
        self._list([*self.logs, (leads_to, undo)])
        for segment in redo.segments():
            apply_segment(redo, segment, self.here.bases, undo, SEED)
            yield

    def _redo(self, changes: list[Change]) -> Log:
        self._epoch += 1
        write_redo(self.here.dir_fd, self._epoch, changes, self._rng, segment_bytes=300 * KIB)
        return self.here.log(Kind.REDO, self._epoch)

    def _list(self, logs: list[tuple[int, Log]]) -> None:
        self.generation += 1
        self.logs = logs

    def past(self, point: int) -> Past:
        """What leads from the images back to a point."""
        return Past(
            logs=lambda: [log for leads_to, log in self.logs if leads_to >= point],
            generation=lambda: self.generation,
            redo=lambda: [log for leads_to, log in self.pending if leads_to <= point],
        )


class Meddled:
    """A source, while which is read something happens: before its bytes are there, between them, or after
    (always then, if ``last``)."""

    def __init__(
        self, base: RawSource, happen: Callable[[], object], rng: random.Random, last: bool = False
    ) -> None:
        self._last = last
        self.name, self.size_bytes = base.name, base.size_bytes
        self.fingerprint, self.changed, self.close = base.fingerprint, base.changed, base.close
        self._base = base
        self._happen = happen
        self._rng = rng

    async def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        async for extent in self._base.extents(start):
            self._happen()
            yield extent

    async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        first = len(extents) if self._last else self._rng.randrange(len(extents) + 1)
        cut = sum(extent.length for extent in extents[:first])
        await self._base.read_into(extents[:first], view[:cut], lambda: None)
        self._happen()
        return await self._base.read_into(extents[first:], view[cut:], then)


@contextmanager
def chain_of(folder: Path, rng: random.Random, epochs: int) -> Iterator[Chain]:
    models = make_images(folder, rng)
    with group(folder) as here:
        chain = Chain(here, models, rng)
        for _ in range(epochs):
            chain.append()
        yield chain


async def raw(chain: Chain, workers: Workers, disk: int) -> RawSource:
    return await RawSource.open(Files(), workers, image_path(chain.here.folder, disk))


def random_reads(rng: random.Random, size: int) -> list[Extent]:
    sectors = size // SECTOR_BYTES
    found = []
    for _ in range(rng.randint(1, 6)):
        first = rng.randrange(sectors)
        length = rng.randint(1, min(rng.choice((2, 300, 3000)), sectors - first))
        found.append(Extent(first * SECTOR_BYTES, length * SECTOR_BYTES))
    return found


async def read_some(view: PointView, extents: Sequence[Extent]) -> bytes:
    found = bytearray(sum(extent.length for extent in extents))
    await view.read_into(extents, memoryview(found), lambda: None)
    return bytes(found)


def expected(content: bytes, extents: Sequence[Extent]) -> bytes:
    return b"".join(content[extent.offset : extent.end] for extent in extents)


# ------------------------------------------------------------------ at rest


@pytest.mark.parametrize("kept_bytes", [views._KEEP_BYTES, 0])
async def test_every_point_of_a_chain_is_what_it_was(
    tmp_path: Path, rng: random.Random, workers: Workers, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "_KEEP_BYTES", kept_bytes)
    with chain_of(tmp_path, rng, 5) as chain:
        for point, models in chain.points.items():
            for disk, content in models.items():
                base = await raw(chain, workers, disk)
                view = PointView(base, disk, f"{point}", chain.past(point), workers, SEED)
                await check_whole(view, content)
                for _ in range(20):
                    extents = random_reads(rng, len(content))
                    assert await read_some(view, extents) == expected(content, extents)
                await view.close()


async def check_whole(view: PointView, content: bytes) -> None:
    """The disk by its extents, and what it calls zero."""
    position = 0
    for extent in await extents_of(view):
        assert extent.offset == position
        wanted = content[extent.offset : extent.end]
        assert (bytes(extent.length) if extent.zero else await read_some(view, [extent])) == wanted
        position = extent.end
    assert position == len(content)


async def test_the_digest_of_a_view_is_that_of_a_kept_copy(
    tmp_path: Path, rng: random.Random, workers: Workers
) -> None:
    with chain_of(tmp_path, rng, 2) as chain:
        (tmp_path / "copy").write_bytes(chain.points[0][1])
        copy = await RawSource.open(Files(), workers, tmp_path / "copy")
        view = PointView(await raw(chain, workers, 1), 1, "0", chain.past(0), workers, SEED)
        assert await content_digest(view) == await content_digest(copy)
        await view.close()
        await copy.close()


async def test_a_sparse_disk_is_sparse_at_every_point(
    tmp_path: Path, rng: random.Random, workers: Workers
) -> None:
    """Two far sectors share a record of the history, whose cover is nearly the whole disk."""
    size = 1 << 40
    make_images(tmp_path, rng, {})
    with open(image_path(tmp_path, 1), "wb") as file:
        file.truncate(size)
    far = (Extent(MIB, 4 * KIB), Extent(size - MIB, 4 * KIB))
    cover = Interval(0, size)
    with group(tmp_path) as here:
        chain = Chain(here, {}, rng)
        chain.append([Change(1, cover, far, rng.randbytes(8 * KIB))])
        for _ in range(2):
            chain.append([Change(1, cover, tuple(extent._replace(zero=True) for extent in far), b"")])
        for point in (0, 1, 2, 3):
            view = PointView(await raw(chain, workers, 1), 1, f"{point}", chain.past(point), workers, SEED)
            data = [extent for extent in await extents_of(view) if not extent.zero]
            assert data == (list(far) if point < 2 else [])
            assert any(await read_some(view, far)) is (point == 1)
            await view.close()


async def test_of_two_records_about_a_byte_the_first_is_right(
    tmp_path: Path, rng: random.Random, workers: Workers
) -> None:
    make_images(tmp_path, rng)
    first, second = (Change(1, Interval(0, 512), (Extent(0, 512),), rng.randbytes(512)) for _ in range(2))
    with group(tmp_path) as here:
        undo = here.log(Kind.UNDO, 1)
        undo.write([frame(first, 1, None), frame(second, 1, None)])
        undo.roll()
        undo.write([frame(second, 1, 1)])
        past = Past(lambda: [undo], lambda: 0)
        view = PointView(
            await RawSource.open(Files(), workers, image_path(tmp_path, 1)), 1, "0", past, workers, SEED
        )
        assert await read(view, 0, 512) == first.raw
        await view.close()


async def test_history_that_is_damaged_is_told_not_served(
    tmp_path: Path, rng: random.Random, workers: Workers
) -> None:
    with chain_of(tmp_path, rng, 0) as chain:
        chain.append([change(rng, 1, [Extent(0, MIB)])])
        (log,) = (log for _, log in chain.logs)
        entry = log.entries(1)[0]
        with open(tmp_path / "logs" / "undo-0000000001-000001.seg", "r+b") as file:
            file.seek(entry.offset + 3 * 4096)
            file.write(b"\xff" * 16)
        view = PointView(await raw(chain, workers, 1), 1, "0", chain.past(0), workers, SEED)
        with pytest.raises(StateError) as caught:
            await read(view, 0, 512)
        assert caught.value.code == "log.damaged"
        await view.close()


# ------------------------------------------------------------------ while the image changes


def happenings(chain: Chain) -> Iterator[None]:
    """Another epoch, one that is given up, fewer points, and a last epoch."""
    yield from chain.steps()
    yield from chain.give_up()
    yield from chain.thin_out()
    yield from chain.steps()


async def read_while_it_happens(
    chain: Chain,
    rng: random.Random,
    workers: Workers,
    rest: Iterator[None],
    points: Sequence[int],
    often: float = 0.5,
) -> None:
    """Reads views of points while their disks change; each read must be right."""
    over = False

    def happen() -> None:
        nonlocal over
        if rng.random() < often:
            over = over or next(rest, rest) is rest

    seen = []
    for point in points:
        for disk in SIZES:
            base = Meddled(await raw(chain, workers, disk), happen, rng)
            past = chain.past(point)
            seen.append((point, disk, PointView(base, disk, f"{point}", past, workers, SEED)))
    while not over:
        point, disk, view = rng.choice(seen)
        content = chain.points[point][disk]
        if rng.random() < 0.2:
            await check_whole(view, content)
        extents = random_reads(rng, len(content))
        assert await read_some(view, extents) == expected(content, extents), f"point {point} of disk {disk}"
    for point, disk, view in seen:
        await check_whole(view, chain.points[point][disk])
        await view.close()


async def test_views_stay_what_they_are_whatever_happens_during_a_read(
    tmp_path: Path, rng: random.Random, workers: Workers, count: Callable[[int, int], int]
) -> None:
    for number in range(count(3, 100)):
        with chain_of(tmp_path / f"{number}", rng, 3) as chain:
            await read_while_it_happens(chain, rng, workers, happenings(chain), (0, 2, 3))


async def test_points_that_are_not_applied_are_read_from_their_redo_until_they_are(
    tmp_path: Path, rng: random.Random, workers: Workers, count: Callable[[int, int], int]
) -> None:
    for number in range(count(2, 100)):
        with chain_of(tmp_path / f"{number}", rng, 1) as chain:
            chain.seal()
            chain.seal()
            await read_while_it_happens(chain, rng, workers, chain.apply_pending(), (1, 2, 3), 0.1)


async def test_redo_that_is_applied_and_removed_during_a_read_is_not_missed(
    tmp_path: Path, rng: random.Random, workers: Workers
) -> None:
    with chain_of(tmp_path, rng, 1) as chain:
        chain.seal()
        chain.seal()
        rest, newest = chain.apply_pending(), max(chain.points)
        while chain.pending:
            for disk, content in chain.points[newest].items():
                base = Meddled(await raw(chain, workers, disk), lambda: next(rest, None), rng, last=True)
                view = PointView(base, disk, "newest", chain.past(newest), workers, SEED)
                assert await read_some(view, [Extent(0, len(content))]) == content
                await view.close()


async def test_the_newest_point_is_right_before_anything_of_it_is_applied(
    tmp_path: Path, rng: random.Random, workers: Workers
) -> None:
    with chain_of(tmp_path, rng, 1) as chain:
        chain.seal()
        chain.seal()
        for point, models in chain.points.items():
            for disk, content in models.items():
                base = await raw(chain, workers, disk)
                view = PointView(base, disk, f"{point}", chain.past(point), workers, SEED)
                await check_whole(view, content)
                await view.close()


@pytest.mark.parametrize("blind", [False, True])
async def test_a_view_that_never_hears_of_new_logs_is_caught(
    tmp_path: Path, rng: random.Random, workers: Workers, blind: bool
) -> None:
    with chain_of(tmp_path, rng, 1) as chain:
        content, past = chain.points[1][1], chain.past(1)
        if blind:
            past = replace(past, generation=lambda: 0)
        view = PointView(await raw(chain, workers, 1), 1, "1", past, workers, SEED)
        assert await read(view, 0, MIB) == content[:MIB]
        chain.append([Change(1, Interval(0, MIB), (Extent(0, MIB),), rng.randbytes(MIB))])
        assert (await read(view, 0, MIB) == content[:MIB]) is not blind
        await view.close()


@pytest.mark.parametrize("blind", [False, True])
async def test_a_view_that_does_not_look_again_after_a_read_is_caught(
    tmp_path: Path, rng: random.Random, workers: Workers, blind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are read; then they are undone in the image, and the log that led back from them goes."""
    if blind:
        monkeypatch.setattr(PointView, "_if_still", lambda self, generation, look: (look(),))
    with chain_of(tmp_path, rng, 1) as chain:
        content = chain.points[1][1]
        rest = chain.give_up([Change(1, Interval(0, MIB), (Extent(0, MIB),), rng.randbytes(MIB))])
        next(rest)
        base = Meddled(await raw(chain, workers, 1), lambda: [*rest], rng, last=True)
        view = PointView(base, 1, "1", chain.past(1), workers, SEED)
        assert (await read(view, 0, MIB) == content[:MIB]) is not blind
        await view.close()


@pytest.mark.parametrize("pending", [False, True])
async def test_views_are_right_while_another_thread_applies(
    tmp_path: Path, rng: random.Random, workers: Workers, pending: bool
) -> None:
    with chain_of(tmp_path, rng, 3) as chain:
        rest, newest = happenings(chain), 2
        if pending:
            chain.seal()
            chain.seal()
            rest, newest = chain.apply_pending(), 5

        async def apply_all() -> None:
            while await workers.run(next, rest, rest) is not rest:
                pass

        applying = asyncio.create_task(apply_all())
        content = chain.points[newest]
        opened = {disk: await raw(chain, workers, disk) for disk in SIZES}
        seen = {
            disk: PointView(base, disk, "p", chain.past(newest), workers, SEED)
            for disk, base in opened.items()
        }
        reads = 0
        while not applying.done():
            disk = rng.choice(list(seen))
            extents = random_reads(rng, len(content[disk]))
            assert await read_some(seen[disk], extents) == expected(content[disk], extents)
            reads += 1
        await applying
        assert reads > (1 if pending else 10)
        for view in seen.values():
            await view.close()


# ------------------------------------------------------------------ the contract of sources


class TestPointView(SourceConformance):
    """The contract, for the beginning of a chain."""

    @pytest.fixture(params=[1, 7_000], ids="{} sectors".format)
    def disk(
        self, request: pytest.FixtureRequest, tmp_path: Path, workers: Workers, rng: random.Random
    ) -> Iterator[Disk]:
        layout = random_layout(rng.getrandbits(64), request.param)
        make_images(tmp_path, rng, {})
        with open(image_path(tmp_path, 1), "wb") as file:
            file.truncate(layout.size_bytes)
            for offset, data in layout.pieces:
                file.seek(offset)
                file.write(data)
        with group(tmp_path) as here:
            chain = Chain(here, {1: layout.content}, rng)
            for _ in range(3):
                chain.append(random_epoch(rng, {1: layout.size_bytes}))

            async def opened() -> PointView:
                return PointView(await raw(chain, workers, 1), 1, "0", chain.past(0), workers, SEED)

            yield Disk(layout.content, opened)
