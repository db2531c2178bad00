"""The SDK's client of the fake ARM, and what tests of it share."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from azure.core.credentials import AccessToken
from azure.mgmt.compute.aio import ComputeManagementClient

from replicator.azure.arm import ResourceRef, connect
from replicator.azure.exports import Tag
from tests.azure.fake_arm import SUBSCRIPTION, TOKEN, FakeArm

MIB = 1 << 20
INSTALLATION = "installation-1"


class Credential:
    """A token that is always the same."""

    def __init__(self, token: str = TOKEN) -> None:
        self._token = token

    async def get_token(self, *scopes: str, **_: Any) -> AccessToken:
        return AccessToken(self._token, 1 << 40)

    async def close(self) -> None:
        pass

    async def __aenter__(self) -> "Credential":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


@asynccontextmanager
async def client_of(
    arm: FakeArm, token: str = TOKEN, endpoint: str | None = None
) -> AsyncIterator[ComputeManagementClient]:
    """A client as the product makes it, but for waits: nothing here takes as long as in Azure."""
    options = {"polling_interval": 0.01, "retry_backoff_factor": 0, "connection_verify": str(arm.ca)}
    async with connect(SUBSCRIPTION, Credential(token), endpoint or arm.endpoint, **options) as client:
        yield client


def disk_ref(name: str) -> ResourceRef:
    return ResourceRef(SUBSCRIPTION, "rg", "disks", name)


def vm_ref(name: str) -> ResourceRef:
    return ResourceRef(SUBSCRIPTION, "rg", "virtualMachines", name)


def tag(epoch: int, group: str = "web01", installation: str = INSTALLATION) -> Tag:
    return Tag(group, epoch.to_bytes(16, "big"), installation)
