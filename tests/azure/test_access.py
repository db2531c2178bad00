"""How requests are authorised: what an operator gives, and a SAS that ends in the middle of a read."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from azure.storage.blob import (
    BlobSasPermissions,
    ContainerSasPermissions,
    generate_blob_sas,
    generate_container_sas,
)

from replicator.azure.access import Account, Credentials, Export
from replicator.azure.blob import BlobAddress, InAccount, PageBlob, snapshots
from replicator.clock import Clock
from replicator.errors import TrustError, UsageError
from tests.azure.azurite import ACCOUNT, KEY, Disk, Emulator

MIB = 1024 * 1024
AZURITE = pytest.mark.peer("azurite")
NewDisk = Callable[..., Disk]


class Later(Clock):
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self) -> datetime:
        return super().now() + self.ahead

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead.total_seconds()


def sas(disk: Disk, ends_in_s: float, key: str = KEY) -> str:
    """For the container of a disk, as the portal makes one."""
    container = BlobAddress.parse(disk.address).container
    ends = datetime.now(UTC) + timedelta(seconds=ends_in_s)
    permission = ContainerSasPermissions(read=True, write=True, delete=True, list=True)
    return generate_container_sas(ACCOUNT, container, account_key=key, permission=permission, expiry=ends)


class Given:
    """What a file holds, and how often it was read."""

    def __init__(self, emulator: Emulator, text: str) -> None:
        self._emulator = emulator
        self.text = text
        self.reads = 0

    async def read(self) -> Credentials:
        self.reads += 1
        return self.now()

    def now(self) -> Credentials:
        return Credentials.parse(
            f"BlobEndpoint={self._emulator.url};SharedAccessSignature={self.text}", "test"
        )


async def read(account: Account, disk: Disk, offset: int = 0) -> bytes:
    address = BlobAddress.parse(disk.address)
    found = bytearray(512)
    await PageBlob(InAccount(account, address), str(address)).read(offset, [memoryview(found)])
    return bytes(found)


@AZURITE
async def test_a_sas_is_renewed_before_it_ends_in_the_middle_of_a_read(
    emulator: Emulator, new_disk: NewDisk
) -> None:
    disk = new_disk(MIB)
    disk.write(0, b"x" * 1024)
    clock = Later()
    given = Given(emulator, sas(disk, 3600))
    account = Account(ACCOUNT, given.now(), given.read, clock)
    try:
        assert await read(account, disk) == b"x" * 512
        assert given.reads == 0
        given.text = sas(disk, 7200)
        clock.ahead = timedelta(seconds=3400)
        assert await read(account, disk, 512) == b"x" * 512
        assert await read(account, disk) == b"x" * 512
        assert given.reads == 1
    finally:
        await account.close()


@AZURITE
async def test_a_sas_that_is_refused_is_read_again_at_once_and_the_range_asked_again(
    emulator: Emulator, new_disk: NewDisk
) -> None:
    disk = new_disk(MIB)
    given = Given(emulator, sas(disk, 3600, key="b2xkLWtleQ=="))  # of a key that was changed since
    account = Account(ACCOUNT, given.now(), given.read, Clock())
    try:
        given.text = sas(disk, 3600)
        assert await read(account, disk) == bytes(512)
        assert given.reads == 1
        address = BlobAddress.parse(disk.address)
        assert await snapshots(account, address) == []
    finally:
        await account.close()


@AZURITE
async def test_a_sas_that_has_ended_and_is_not_replaced_is_refused_after_one_look(
    emulator: Emulator, new_disk: NewDisk
) -> None:
    disk = new_disk(MIB)
    given = Given(emulator, sas(disk, -60))
    account = Account(ACCOUNT, given.now(), given.read, Clock())
    try:
        with pytest.raises(TrustError) as caught:
            await read(account, disk)
        assert caught.value.code == "azure.denied"
        assert given.reads == 1
        assert "sig=" not in str(caught.value)
    finally:
        await account.close()


@AZURITE
async def test_an_exports_url_is_followed_when_it_becomes_another(
    emulator: Emulator, new_disk: NewDisk
) -> None:
    disk = new_disk(MIB)
    disk.write(0, b"x" * 512)
    address = BlobAddress.parse(disk.address)

    def url(ends_in_s: float) -> str:
        ends = datetime.now(UTC) + timedelta(seconds=ends_in_s)
        signature = generate_blob_sas(
            ACCOUNT,
            address.container,
            address.blob,
            account_key=KEY,
            permission=BlobSasPermissions(read=True),
            expiry=ends,
        )
        return f"{disk.blob.url}?{signature}"

    urls = [url(3600), url(-60), url(3600), url(1800)]
    asked: list[str] = []

    async def now() -> str:
        asked.append(urls[min(len(asked), len(urls) - 1)])
        return asked[-1]

    export = Export(now)
    try:
        blob = PageBlob(export, "disk")
        assert await blob.size_bytes() == MIB
        found = bytearray(512)
        await blob.read(0, [memoryview(found)])  # refused with the second, read with what comes after
        assert found == b"x" * 512 and len(asked) == 4
    finally:
        await export.close()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "DefaultEndpointsProtocol=https;AccountName=acc0;AccountKey=a2V5==;EndpointSuffix=core.example.net",
            Credentials("https://acc0.blob.core.example.net", "acc0", "a2V5==", ""),
        ),
        (
            "BlobEndpoint=https://acc0.privatelink.example.net/;SharedAccessSignature=?sv=1&sig=a%3D\n",
            Credentials("https://acc0.privatelink.example.net", "", "", "sv=1&sig=a%3D"),
        ),
        ("?sv=1&se=2030-01-01&sig=a%3D", Credentials(sas="sv=1&se=2030-01-01&sig=a%3D")),
        ("BlobEndpoint=https://acc0.example.net", Credentials("https://acc0.example.net")),
    ],
)
def test_what_azure_shows_is_understood(text: str, found: Credentials) -> None:
    assert Credentials.parse(text, "file") == found


@pytest.mark.parametrize("text", ["", "a2V5", "AccountKey=a2V5", "hello;world"])
def test_what_is_no_credential_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Credentials.parse(text, "the file")
    assert caught.value.code == "azure.credentials"
    assert not text or text not in str(caught.value)


async def test_the_credential_of_another_account_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        Account("acc1", Credentials("https://acc0.example.net", "acc0", "a2V5"), None, Clock())
    assert caught.value.code == "azure.other_account"


def test_a_secret_is_not_shown() -> None:
    shown = repr(Credentials("https://acc0.example.net", "acc0", "the-key", "the-sas"))
    assert "the-key" not in shown and "the-sas" not in shown
