"""The page blob as an image: the conformance suite and what is particular to it, against Azurite."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from azure.storage.blob import BlobClient, BlobServiceClient

from protocol.messages import Interval
from protocol.payload import Extent
from replicator.asking import rows_in_order
from replicator.azure.access import Account, Credentials
from replicator.azure.blob import PUT_MAX_BYTES, BlobAddress, InAccount, PageBlob
from replicator.clock import Clock
from replicator.digest import BLOCK_BYTES, FINE_BYTES, digests_of, zero_row
from replicator.errors import LinkError, TargetError
from replicator.files import Files
from replicator.formats.vhd import FOOTER_BYTES, make_footer, parse_footer
from replicator.images.page_blob import GAP_BYTES, PageBlobImage
from replicator.images.reading import Digested
from replicator.workers import Workers
from tests.azure.azurite import ACCOUNT, Emulator
from tests.replicator.images.conformance import MIB, SECTOR, ImageConformance, Kind, aligned, put
from tests.replicator.trust import refused

pytestmark = pytest.mark.peer("azurite")
NOW = datetime(2025, 1, 1, tzinfo=UTC)
CONTAINER = "images"


@pytest.fixture(scope="module", autouse=True)
def container(emulator: Emulator) -> Iterator[None]:
    with emulator.service as service:
        service.create_container(CONTAINER)
        yield
        service.delete_container(CONTAINER)


_numbers = count(1)


class Loop:
    """An event loop in a thread of its own: in the product, images are called beside the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def opened(emulator: Emulator) -> Account:
    return Account(ACCOUNT, Credentials.parse(emulator.connection_string, "the test"), None, Clock())


def blob_of(account: Account, name: str) -> PageBlob:
    way = InAccount(account, BlobAddress(ACCOUNT, CONTAINER, name))
    return PageBlob(way, name, blame=TargetError)


@dataclass
class BlobKind:
    """A page blob; opened again by its footer."""

    loop: Loop
    account: Account
    service: BlobServiceClient
    sector: int = SECTOR
    name: str = ""

    def make(self, files: Files, size: int) -> PageBlobImage:
        self.name = f"image-{next(_numbers)}.vhd"
        blob = blob_of(self.account, self.name)
        return self.loop.run(PageBlobImage.create(blob, size, UUID(int=1), NOW, {}))

    def reopen(self, files: Files) -> PageBlobImage:
        return self.loop.run(PageBlobImage.open(blob_of(self.account, self.name)))

    def content(self, size: int) -> bytes:
        return self.client.download_blob(0, size).readall()

    @property
    def client(self) -> BlobClient:
        return self.service.get_blob_client(CONTAINER, self.name)


class TestPageBlob(ImageConformance):
    @pytest.fixture
    def kind(self, emulator: Emulator, service: BlobServiceClient) -> Iterator[Kind]:
        loop = Loop()
        try:
            account = loop.run(opened(emulator))
            yield BlobKind(loop, account, service)
            loop.run(account.close())
        finally:
            loop.stop()


@pytest.fixture
async def account(emulator: Emulator) -> AsyncIterator[Account]:
    account = await opened(emulator)
    yield account
    await account.close()


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers() as workers:
        yield workers


@pytest.fixture
def blob(account: Account) -> PageBlob:
    return blob_of(account, f"image-{next(_numbers)}.vhd")


async def made(blob: PageBlob, size: int) -> PageBlobImage:
    return await PageBlobImage.create(blob, size, UUID(int=7), NOW, {"owner": "web01"})


# ------------------------------------------------------------------ the blob around the disk


@pytest.mark.parametrize("size", [SECTOR, MIB - SECTOR, MIB, MIB + SECTOR, 5 * MIB])
async def test_the_blob_is_whole_mib_and_a_footer_and_the_disk_keeps_its_size(
    blob: PageBlob, service: BlobServiceClient, size: int
) -> None:
    image = await made(blob, size)
    content = service.get_blob_client(CONTAINER, blob.name).download_blob().readall()
    rounded = -(-size // MIB) * MIB
    assert len(content) == rounded + FOOTER_BYTES
    footer = parse_footer(content[-FOOTER_BYTES:])
    assert footer is not None
    assert (footer.disk_bytes, footer.id) == (rounded, UUID(int=7))
    assert not any(content[:-FOOTER_BYTES])
    assert (await blob.properties()).metadata["owner"] == "web01"
    again = await PageBlobImage.open(blob)
    assert (image.size_bytes, image.blank) == (size, True)
    assert (again.size_bytes, again.blank) == (size, False)


async def test_a_vhd_of_somebody_else_has_the_size_of_its_footer(
    blob: PageBlob, service: BlobServiceClient
) -> None:
    await made(blob, 3 * MIB)
    service.get_blob_client(CONTAINER, blob.name).set_blob_metadata({"replicator_disk_bytes": "99999999999"})
    assert (await PageBlobImage.open(blob)).size_bytes == 3 * MIB
    service.get_blob_client(CONTAINER, blob.name).set_blob_metadata({})
    assert (await PageBlobImage.open(blob)).size_bytes == 3 * MIB


@pytest.mark.parametrize("size", [512, MIB, MIB + 512])
async def test_a_blob_without_a_footer_of_its_size_is_no_image(
    blob: PageBlob, service: BlobServiceClient, size: int
) -> None:
    client = service.get_blob_client(CONTAINER, blob.name)
    client.create_page_blob(size)
    with refused("target.no_vhd"):
        await PageBlobImage.open(blob)
    client.upload_page(make_footer(9 * MIB, UUID(int=1), NOW), size - FOOTER_BYTES, FOOTER_BYTES)
    with refused("target.no_vhd"):
        await PageBlobImage.open(blob)


async def test_what_is_not_there_and_what_is_no_page_blob_are_told(
    blob: PageBlob, service: BlobServiceClient
) -> None:
    with refused("azure.missing") as caught:
        await PageBlobImage.open(blob)
    assert isinstance(caught.value, TargetError)
    service.get_blob_client(CONTAINER, blob.name).upload_blob(b"x" * 512)
    with refused("azure.not_page_blob"):
        await PageBlobImage.open(blob)


# ------------------------------------------------------------------ requests


async def test_the_last_page_of_the_disk_is_written_and_the_footer_stays(
    blob: PageBlob, service: BlobServiceClient, workers: Workers, seed: int
) -> None:
    image = await made(blob, 2 * MIB)
    model = bytearray(2 * MIB)
    await workers.run(put, image, model, [Extent(2 * MIB - SECTOR, SECTOR)], random.Random(seed))
    content = service.get_blob_client(CONTAINER, blob.name).download_blob().readall()
    assert content[: 2 * MIB] == model
    assert parse_footer(content[-FOOTER_BYTES:]) is not None


async def test_pages_go_out_as_large_as_azure_takes_them_and_zeros_as_clears(
    blob: PageBlob, workers: Workers, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await made(blob, 24 * MIB)
    image.blank = False
    puts: list[int] = []
    clears: list[tuple[int, int]] = []
    monkeypatch.setattr(image, "_blob", _Recording(blob, puts, clears))
    extents = [
        Extent(0, 5 * MIB),
        Extent(5 * MIB, 5 * MIB),  # touches: one run of 10 MiB
        Extent(11 * MIB, 9 * MIB, True),
        Extent(20 * MIB, SECTOR),
    ]
    model = bytearray(24 * MIB)
    await workers.run(put, image, model, extents, random.Random(seed))
    assert sorted(puts) == [SECTOR, *[PUT_MAX_BYTES] * (10 * MIB // PUT_MAX_BYTES)]
    assert clears == [(11 * MIB, 9 * MIB)]
    found = aligned(bytes(24 * MIB))
    await workers.run(image.read_into, [Extent(0, 24 * MIB)], found)
    assert found == model


class _Recording:
    """A blob whose requests are written down on their way."""

    def __init__(self, blob: PageBlob, puts: list[int], clears: list[tuple[int, int]]) -> None:
        self._blob, self._puts, self._clears = blob, puts, clears
        self.read, self.ranges = blob.read, blob.ranges

    async def put(self, offset: int, data: memoryview) -> None:
        self._puts.append(len(data))
        await self._blob.put(offset, data)

    async def clear(self, offset: int, length: int) -> None:
        self._clears.append((offset, length))
        await self._blob.clear(offset, length)


async def test_zeros_are_not_said_to_a_blank_blob_and_take_no_space_later(
    blob: PageBlob, workers: Workers, seed: int
) -> None:
    image = await made(blob, 8 * MIB)
    rng, model = random.Random(seed), bytearray(8 * MIB)
    await workers.run(put, image, model, [Extent(0, MIB, True), Extent(MIB, 2 * MIB)], rng)
    rounded = Interval(8 * MIB, 8 * MIB + FOOTER_BYTES)
    assert await blob.ranges() == (Interval(MIB, 3 * MIB), rounded)
    image.blank = False
    await workers.run(put, image, model, [Extent(2 * MIB, MIB, True)], rng)
    assert await blob.ranges() == (Interval(MIB, 2 * MIB), rounded)


async def test_reads_close_together_share_a_request(
    blob: PageBlob, workers: Workers, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await made(blob, 8 * MIB)
    model = bytearray(8 * MIB)
    await workers.run(put, image, model, [Extent(0, 8 * MIB)], random.Random(seed))
    requests: list[int] = []
    read = blob.read

    async def recording(offset: int, sections: Any) -> None:
        requests.append(offset)
        await read(offset, sections)

    monkeypatch.setattr(blob, "read", recording)
    near = [Extent(at, SECTOR) for at in range(0, 2 * MIB, GAP_BYTES + SECTOR)]
    far = [Extent(at, SECTOR) for at in range(4 * MIB, 5 * MIB, GAP_BYTES + 2 * SECTOR)]
    for extents, wanted in ((near, 1), (far, len(far))):
        requests.clear()
        found = aligned(bytes(SECTOR * len(extents)))
        await workers.run(image.read_into, extents, found)
        assert bytes(found) == b"".join(model[extent.offset : extent.end] for extent in extents)
        assert len(requests) == wanted


# ------------------------------------------------------------------ digests


@pytest.mark.parametrize("block", [BLOCK_BYTES, FINE_BYTES])
@pytest.mark.parametrize("reopened", [False, True])
async def test_digests_tell_holes_and_are_those_of_the_content(
    blob: PageBlob, workers: Workers, seed: int, block: int, reopened: bool
) -> None:
    size = 6 * MIB + 3 * SECTOR
    image = await made(blob, size)
    rng, model = random.Random(seed), bytearray(size)
    image.blank = False
    for _ in range(6):
        first = rng.randrange(size // SECTOR)
        length = min(rng.randrange(1, 3000), size // SECTOR - first) * SECTOR
        await workers.run(put, image, model, [Extent(first * SECTOR, length, rng.random() < 0.4)], rng)
    if reopened:
        image = await PageBlobImage.open(blob)
    for most in (4096, 7):
        rest = [Interval(0, MIB), Interval(2 * MIB, size)]
        while rest:
            found = await workers.run(image.digests, rest, block, 99, most)
            _compare(found, model, size, block)
            reached = found.intervals[-1].end
            rest = [Interval(max(start, reached), end) for start, end in rest if end > reached]


def _compare(found: Digested, model: bytearray, size: int, block: int) -> None:
    rows = b"".join(rows_in_order(*found, size, block, 99))
    wanted = b"".join(digests_of(memoryview(model)[start:end], 99, block) for start, end in found.intervals)
    assert rows == wanted
    for hole in found.holes:
        assert not any(model[hole.start : hole.end])
        assert zero_row(hole, size, 99, block)


async def test_an_empty_disk_is_one_hole(blob: PageBlob, workers: Workers) -> None:
    image = await made(blob, 64 * MIB)
    found = await workers.run(image.digests, [Interval(0, 64 * MIB)], BLOCK_BYTES, 1, 4096)
    assert found == ((Interval(0, 64 * MIB),), (Interval(0, 64 * MIB),), b"")
    again = await PageBlobImage.open(blob)
    assert await workers.run(again.digests, [Interval(0, 64 * MIB)], BLOCK_BYTES, 1, 4096) == found


async def test_what_is_written_while_the_pages_are_listed_is_no_hole(
    blob: PageBlob, workers: Workers, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made(blob, 4 * MIB)
    image = await PageBlobImage.open(blob)
    model = bytearray(4 * MIB)
    ranges = blob.ranges

    async def slow() -> tuple[Interval, ...]:
        found = await ranges()
        await workers.run(put, image, model, [Extent(MIB, MIB)], random.Random(seed))
        return found

    monkeypatch.setattr(blob, "ranges", slow)
    found = await workers.run(image.digests, [Interval(0, 4 * MIB)], BLOCK_BYTES, 99, 4096)
    assert found.holes == (Interval(0, MIB), Interval(2 * MIB, 4 * MIB))
    _compare(found, model, 4 * MIB, BLOCK_BYTES)


# ------------------------------------------------------------------ what goes wrong


async def test_a_write_to_a_blob_that_is_gone_ends_blankness_and_is_told(
    blob: PageBlob, workers: Workers, service: BlobServiceClient, seed: int
) -> None:
    image = await made(blob, 4 * MIB)
    service.get_blob_client(CONTAINER, blob.name).delete_blob()
    with refused("azure.missing") as caught:
        await workers.run(put, image, bytearray(4 * MIB), [Extent(0, MIB)], random.Random(seed))
    assert isinstance(caught.value, TargetError)
    assert blob.name in caught.value.message
    assert not image.blank


async def test_a_cancelled_write_is_waited_for_and_the_loop_stays_free(
    blob: PageBlob, workers: Workers, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await made(blob, 4 * MIB)
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(offset: int, data: memoryview) -> None:
        begun.set()
        await may_end.wait()
        raise LinkError("azure.unreachable", "gone", cause="c", fix="f")

    monkeypatch.setattr(blob, "put", slow)
    call = partial(put, image, bytearray(4 * MIB), [Extent(0, MIB)], random.Random(seed))
    writing = asyncio.create_task(workers.run(call))
    await begun.wait()
    writing.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await writing


async def test_a_closed_image_takes_nothing(blob: PageBlob, workers: Workers, tmp_path: Path) -> None:
    image = await made(blob, MIB)
    image.close()
    image.close()
    with pytest.raises(ValueError, match="closed"):
        await workers.run(image.write, [Extent(0, SECTOR)], aligned(bytes(SECTOR)))
