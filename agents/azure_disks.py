"""Managed disks as sources: who asks Azure's management interface, and where that is.

Imported only where a source is ``azure-disk://``: the SDK costs half a second. Not here: page blobs, whose
accounts ``azure_server.py`` opens, and the cycle that both go through.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AsyncExitStack

from azure.identity.aio import DefaultAzureCredential

from agents.send_config import SendConfig
from replicator.azure.arm import connect, parse_disk_address
from replicator.azure.compute import Disks
from replicator.azure.managed_disk import ManagedDiskInAzure
from replicator.clock import Clock
from replicator.workers import Workers

ENDPOINT_VARIABLE = "AZURE_RESOURCE_MANAGER_ENDPOINT"  # of another cloud than the public one


class ManagedDisks:
    """Opens managed disks, with one identity for all, and one client for each subscription.

    Args:
        config: of the send.
        installation: of the target, for tags.
        workers, clock: as everywhere.
        tell: takes a line for people.
        opened: closes the clients.
    """

    def __init__(
        self,
        config: SendConfig,
        installation: str,
        workers: Workers,
        clock: Clock,
        tell: Callable[[str], None],
        opened: AsyncExitStack,
    ) -> None:
        self._config = config
        self._whose = (config.group, installation)
        self._workers = workers
        self._clock = clock
        self._tell = tell
        self._opened = opened
        self._credential: DefaultAzureCredential | None = None
        self._subscriptions: dict[str, Disks] = {}

    async def open(self, name: str, source: str) -> ManagedDiskInAzure:
        """The disk that ``azure-disk://…`` names; Azure is asked when the cycle begins.

        Raises:
            UsageError: ``compute.address``.
        """
        ref = parse_disk_address(source)
        if self._credential is None:
            self._credential = await self._opened.enter_async_context(DefaultAzureCredential())
        if ref.subscription not in self._subscriptions:
            endpoint = os.environ.get(ENDPOINT_VARIABLE) or None
            client = connect(ref.subscription, self._credential, endpoint)
            await self._opened.enter_async_context(client)
            self._subscriptions[ref.subscription] = Disks(client, self._clock, self._tell)
        return ManagedDiskInAzure(
            name,
            self._subscriptions[ref.subscription],
            ref,
            self._whose,
            self._config.azure.trust_diff,
            self._workers,
            self._clock,
            self._tell,
        )
