"""A page blob's snapshot as a source: the contract, footers, short gaps, zeros nobody asks for, speed."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from uuid import UUID

import pytest

from protocol.payload import Extent
from replicator.azure.access import Account, Credentials
from replicator.azure.blob import BlobAddress, InAccount, PageBlob
from replicator.clock import Clock
from replicator.errors import LinkError, SourceError
from replicator.formats.vhd import FOOTER_BYTES, make_footer
from replicator.sources.page_blob import GAP_BYTES, PageBlobSource
from replicator.workers import Workers
from tests.azure.azurite import ACCOUNT, KEY, Disk
from tests.azure.diff_proxy import RunningProxy
from tests.replicator.sources import conformance
from tests.replicator.sources.conformance import extents_of, nothing, read

pytestmark = pytest.mark.peer("azurite")

MIB = 1024 * 1024
ROUNDS_MAX = 8
KEY_OF_ACCOUNT = {"account_name": ACCOUNT, "account_key": KEY}
NewDisk = Callable[..., Disk]


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers() as made:
        yield made


@pytest.fixture
async def account(proxy: RunningProxy) -> AsyncIterator[Account]:
    found = Account(ACCOUNT, Credentials.parse(proxy.connection_string, "test"), None, Clock())
    yield found
    await found.close()


async def opened(account: Account, disk: Disk, workers: Workers) -> PageBlobSource:
    """A source of a snapshot that is taken now."""
    address = BlobAddress.parse(disk.address)
    blob = PageBlob(InAccount(account, address), str(address))
    return await PageBlobSource.open(blob.at((await blob.take_snapshot({})).id), workers)


class TestContract(conformance.SourceConformance):
    """The contract of all sources, for blobs with and without a footer."""

    @pytest.fixture(params=[(1, False), (40_001, False), (40_001, True)], ids=["tiny", "bare", "footer"])
    def disk(
        self,
        request: pytest.FixtureRequest,
        new_disk: NewDisk,
        account: Account,
        workers: Workers,
        seed: int,
    ) -> conformance.Disk:
        sectors, footer = request.param
        layout = conformance.random_layout(seed, sectors)
        tail = make_footer(layout.size_bytes, UUID(int=1), datetime.now(UTC)) if footer else b""
        made = new_disk(layout.size_bytes, tail=tail)
        for offset, data in layout.pieces:
            made.write(offset, data)
        return conformance.Disk(layout.content, lambda: opened(account, made, workers))


async def test_what_was_never_written_is_neither_listed_as_data_nor_asked_for(
    new_disk: NewDisk, account: Account, workers: Workers, proxy: RunningProxy
) -> None:
    disk = new_disk(64 * MIB)
    disk.write(MIB, b"x" * MIB)
    disk.write(32 * MIB, b"y" * 512)
    disk.clear(MIB, 4096)
    source = await opened(account, disk, workers)
    proxy.set("diff")
    assert await extents_of(source) == [
        Extent(0, MIB + 4096, zero=True),
        Extent(MIB + 4096, MIB - 4096),
        Extent(2 * MIB, 30 * MIB, zero=True),
        Extent(32 * MIB, 512),
        Extent(32 * MIB + 512, 32 * MIB - 512, zero=True),
    ]
    assert await read(source, 40 * MIB, MIB) == bytes(MIB)
    assert proxy.asked() == {}
    assert await read(source, 0, 2 * MIB) == bytes(MIB + 4096) + b"x" * (MIB - 4096)
    assert proxy.asked() == {"read": 1}
    await source.close()


async def test_short_gaps_are_read_over_and_long_ones_are_not(
    new_disk: NewDisk, account: Account, workers: Workers, proxy: RunningProxy, seed: int
) -> None:
    content = random.Random(seed).randbytes(4 * MIB)
    disk = new_disk(4 * MIB)
    disk.write(0, content)
    source = await opened(account, disk, workers)
    near = [Extent(at, 4096) for at in range(0, MIB, 4096 + GAP_BYTES)]
    far = [Extent(at, 4096) for at in range(2 * MIB, 4 * MIB, 4096 + GAP_BYTES + 512)]
    for extents, requests in ((near, 1), (far, len(far))):
        proxy.set("diff")
        found = bytearray(4096 * len(extents))
        await source.read_into(extents, memoryview(found), nothing)
        assert found == b"".join(content[extent.offset : extent.end] for extent in extents)
        assert proxy.asked() == {"read": requests}
    await source.close()


async def test_a_read_that_fails_tells_its_range_and_ends_the_others(
    new_disk: NewDisk, account: Account, workers: Workers, proxy: RunningProxy
) -> None:
    disk = new_disk(16 * MIB)
    disk.write(0, b"x" * (16 * MIB))
    source = await opened(account, disk, workers)
    proxy.set("throttle=1")
    view = memoryview(bytearray(16 * MIB))
    with pytest.raises(LinkError, match="reading bytes"):
        await source.read_into([Extent(0, 16 * MIB)], view, nothing)
    await source.close()


async def test_a_snapshot_that_is_deleted_under_way_is_told(
    new_disk: NewDisk, account: Account, workers: Workers
) -> None:
    disk = new_disk(MIB)
    disk.write(0, b"x" * MIB)
    source = await opened(account, disk, workers)
    disk.blob.delete_blob(delete_snapshots="only")
    with pytest.raises(SourceError) as caught:
        await read(source, 0, 512)
    assert caught.value.code == "azure.missing"
    await source.close()


async def test_a_blob_of_no_size_or_of_a_footer_alone_is_refused(
    new_disk: NewDisk, account: Account, workers: Workers
) -> None:
    alone = make_footer(512, UUID(int=1), datetime.now(UTC))
    assert len(alone) == FOOTER_BYTES
    for disk in (new_disk(0, name="none"), new_disk(0, name="footer", tail=alone)):
        with pytest.raises(SourceError) as caught:
            await opened(account, disk, workers)
        assert caught.value.code == "source.empty"
