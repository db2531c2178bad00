"""What tests against Azurite begin with: one emulator for all, a proxy before it, fresh containers."""

import secrets
from collections.abc import Callable, Iterator

import pytest
from azure.storage.blob import BlobServiceClient

from tests.azure.azurite import Disk, Emulator, azurite, make_disk
from tests.azure.diff_proxy import RunningProxy, diff_proxy


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with azurite(tmp_path_factory.mktemp("azurite")) as running:
        yield running


@pytest.fixture(scope="session")
def one_proxy(emulator: Emulator) -> Iterator[RunningProxy]:
    with diff_proxy(emulator) as running:
        yield running


@pytest.fixture
def proxy(one_proxy: RunningProxy) -> Iterator[RunningProxy]:
    """The proxy, answering as Azure does."""
    for wish in ("diff", "throttle=0", "cut=0"):
        one_proxy.set(wish)
    yield one_proxy
    for wish in ("throttle=0", "cut=0"):
        one_proxy.set(wish)


@pytest.fixture
def service(emulator: Emulator) -> Iterator[BlobServiceClient]:
    """The SDK's blocking client, past the proxy."""
    with emulator.service as service:
        yield service


@pytest.fixture
def new_disk(service: BlobServiceClient) -> Iterator[Callable[..., Disk]]:
    """`new_disk(size, name="disk.vhd", tail=b"")`: a page blob of zeros in a container of this test."""
    container = f"test-{secrets.token_hex(8)}"
    service.create_container(container)

    def make(size: int, name: str = "disk.vhd", tail: bytes = b"") -> Disk:
        return make_disk(service, container, name, size, tail)

    yield make
    service.delete_container(container)
