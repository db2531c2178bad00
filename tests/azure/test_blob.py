"""What the client of a page blob reads, lists and writes, against Azurite."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest

from replicator.azure.access import Account, Credentials
from replicator.azure.blob import BlobAddress, InAccount, PageBlob, snapshots
from replicator.clock import Clock
from replicator.errors import LinkError, ReplicatorError, SourceError, TrustError, UsageError
from tests.azure.azurite import ACCOUNT, KEY, Disk, Emulator
from tests.azure.diff_proxy import RunningProxy

pytestmark = pytest.mark.peer("azurite")

MIB = 1024 * 1024
NewDisk = Callable[..., Disk]


@pytest.fixture
async def account(proxy: RunningProxy) -> AsyncIterator[Account]:
    found = Account(ACCOUNT, Credentials.parse(proxy.connection_string, "test"), None, Clock())
    yield found
    await found.close()


def blob_of(account: Account, disk: Disk, **how) -> PageBlob:
    address = BlobAddress.parse(disk.address)
    return PageBlob(InAccount(account, address), str(address), **how)


async def test_what_is_put_is_read_into_sections_with_gaps_left_out(
    account: Account, new_disk: NewDisk, seed: int
) -> None:
    content = random.Random(seed).randbytes(2 * MIB)
    disk = new_disk(4 * MIB)
    blob = blob_of(account, disk)
    for at in (0, MIB):
        await blob.put(MIB + at, content[at : at + MIB])
    assert await blob.size_bytes() == 4 * MIB
    first, last = bytearray(700), bytearray(MIB)
    await blob.read(MIB + 512, [memoryview(first), 3 * 512 - 700, memoryview(last)])
    assert first == content[512 : 512 + 700]
    assert last == content[4 * 512 : 4 * 512 + MIB]


async def test_ranges_are_what_was_written_and_not_cleared(account: Account, new_disk: NewDisk) -> None:
    blob = blob_of(account, new_disk(8 * MIB))
    assert await blob.ranges() == ()
    await blob.put(MIB, b"x" * MIB)
    await blob.put(2 * MIB, b"y" * MIB)
    await blob.clear(MIB + 4096, 4096)
    assert await blob.ranges() == ((MIB, MIB + 4096), (MIB + 8192, 3 * MIB))


async def test_snapshots_keep_their_content_moment_and_metadata(account: Account, new_disk: NewDisk) -> None:
    disk = new_disk(MIB)
    blob = blob_of(account, disk)
    await blob.put(0, b"a" * 512)
    first = await blob.take_snapshot({"replicator_group": "g"})
    await blob.put(0, b"b" * 512)
    second = await blob.take_snapshot({"other": "1"})
    listed = await snapshots(account, BlobAddress.parse(disk.address))
    assert [(one.id, one.metadata) for one in listed] == [
        (first.id, {"replicator_group": "g"}),
        (second.id, {"other": "1"}),
    ]
    assert listed[0].moment_ns == first.moment_ns < second.moment_ns
    assert abs(first.moment_ns - Clock().now_ns()) < 60e9
    view = memoryview(bytearray(512))
    await blob.at(first.id).read(0, [view])
    assert view == b"a" * 512
    await blob.at(first.id).delete()
    await blob.at(first.id).delete()  # gone already
    assert disk.snapshots() == [second.id]


async def test_a_diff_is_what_changed_and_none_where_it_is_refused(
    account: Account, new_disk: NewDisk, proxy: RunningProxy
) -> None:
    blob = blob_of(account, new_disk(4 * MIB))
    await blob.put(0, b"x" * MIB)
    old = await blob.take_snapshot({})
    await blob.put(2 * MIB, b"y" * 4096)
    await blob.clear(4096, 4096)
    new = blob.at((await blob.take_snapshot({})).id)
    found = await new.changes(old.id)
    assert found is not None
    assert found.written == ((2 * MIB, 2 * MIB + 4096),) and found.cleared == ((4096, 8192),)
    for mode in ("409", "501"):
        proxy.set(mode)
        assert await new.changes(old.id) is None
    proxy.set("whole")
    found = await new.changes(old.id)
    assert found is not None and found.cleared == () and found.written == await new.ranges()


async def test_throttling_costs_the_range_alone(
    account: Account, new_disk: NewDisk, proxy: RunningProxy, seed: int
) -> None:
    """Every third read is put off and every seventh breaks off; each range is asked again by itself."""
    content = random.Random(seed).randbytes(4 * MIB)
    disk = new_disk(4 * MIB)
    disk.write(0, content)
    blob = blob_of(account, disk)
    proxy.set("throttle=3")
    proxy.set("cut=7")
    found = bytearray(4 * MIB)
    step = 64 * 1024
    await asyncio.gather(
        *(blob.read(at, [memoryview(found)[at : at + step]]) for at in range(0, 4 * MIB, step))
    )
    asked = proxy.asked()
    assert found == content
    assert asked["read"] == 64 + asked["throttled"] + asked["cut"]
    assert asked["throttled"] >= 20 and asked["cut"] >= 5


async def test_what_is_put_off_again_and_again_is_told_and_may_be_tried_later(
    account: Account, new_disk: NewDisk, proxy: RunningProxy
) -> None:
    blob = blob_of(account, new_disk(MIB))
    proxy.set("throttle=1")
    with pytest.raises(LinkError) as caught:
        await blob.read(0, [512])
    assert caught.value.code == "azure.throttled" and "put off 7 times" in str(caught.value)
    assert proxy.asked()["read"] == 7


async def test_what_cannot_be_is_refused_with_the_reason(
    account: Account, new_disk: NewDisk, emulator: Emulator
) -> None:
    disk = new_disk(MIB)
    address = BlobAddress.parse(disk.address)
    nothing = PageBlob(InAccount(account, BlobAddress(ACCOUNT, address.container, "nothing")), "nothing")
    await expect(nothing.size_bytes(), SourceError, "azure.missing")
    with emulator.service as service:
        service.get_blob_client(address.container, "text").upload_blob(b"text")
    text = PageBlob(InAccount(account, BlobAddress(ACCOUNT, address.container, "text")), "text")
    await expect(text.size_bytes(), SourceError, "azure.not_page_blob")
    blob = blob_of(account, disk)
    await expect(blob.put(MIB, bytes(512)), SourceError, "azure.refused")
    wrong = Account(ACCOUNT, Credentials(emulator.url, ACCOUNT, KEY[:-6] + "AAAA=="), None, Clock())
    try:
        await expect(blob_of(wrong, disk).size_bytes(), TrustError, "azure.denied")
    finally:
        await wrong.close()


async def expect(asked, kind: type[ReplicatorError], code: str) -> None:
    with pytest.raises(kind) as caught:
        await asked
    assert caught.value.code == code, caught.value


@pytest.mark.parametrize(
    "text",
    ["azure://acc/disks", "azure://A/disks/b", "azure://acc/d/b", "azure:///disks/b", "https://acc/disks/b", "azure://acc/disks/b?x"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        BlobAddress.parse(text)
    assert caught.value.code == "azure.bad_address"


def test_an_address_may_have_slashes_and_spaces_in_its_blob() -> None:
    assert BlobAddress.parse("azure://acc0/disks/a b/c.vhd") == BlobAddress("acc0", "disks", "a b/c.vhd")
