"""A process server for disks in Azure: cycles of snapshots, sent as any other disk is.

Not here: what a cycle is (``replicator/azure/cycle.py``). Imported only where a source is in Azure.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from agents.link import Link
from agents.send_config import SendConfig, SendReport
from agents.text_file import read_text
from protocol.constants import ID_BYTES
from replicator.azure.access import Account, Credentials
from replicator.azure.blob import BlobAddress
from replicator.azure.blob_disk import BlobDisk
from replicator.azure.cycle import DiskInAzure, begin
from replicator.clock import Clock
from replicator.errors import UsageError
from replicator.files import Files
from replicator.framing import Progress
from replicator.retrying import keep_trying
from replicator.sender import Outcome
from replicator.workers import Workers

T = TypeVar("T")

MANAGED = "azure-disk://"
CREDENTIALS_MAX_BYTES = 64 * 1024
VARIABLES = (
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
)  # as other tools of Azure have them


async def send_from_azure(
    config: SendConfig, progress: Progress, clock: Clock, files: Files, tell: Callable[[str], None]
) -> SendReport:
    """As ``process_server.send``, for sources that are all in Azure.

    Raises:
        ReplicatorError: what stood in the way; see ``docs/errors.md``.
    """
    began = clock.monotonic_s()
    with Workers() as workers:
        async with AsyncExitStack() as opened:
            link = Link(config, workers, clock, files, progress, tell)
            opened.push_async_callback(workers.run, link.close)
            server = _Server(config, link, _Parts(workers, clock, files, tell), opened)
            first, went_on = await server.cycle()
            outcome, passes = first, 1
            if went_on:
                tell(f"{config.sources}: what an earlier run had begun is sent; now what was written since")
                outcome, _ = await server.cycle()
                passes = 2
    return SendReport.of(config, first, outcome, passes, progress, clock.monotonic_s() - began)


@dataclass(frozen=True, slots=True)
class _Parts:
    workers: Workers
    clock: Clock
    files: Files
    tell: Callable[[str], None]


class _Server:
    """The cycles of one group."""

    def __init__(self, config: SendConfig, link: Link, parts: _Parts, opened: AsyncExitStack) -> None:
        self._config = config
        self._link = link
        self._parts = parts
        self._opened = opened
        self._disks: Sequence[DiskInAzure] = ()

    async def cycle(self) -> tuple[Outcome, bool]:
        """One epoch, to its seal and the end of its predecessor. True: an earlier run had begun it."""
        pin, memory = await self._try(self._link.identify)
        if not self._disks:
            self._disks = await self._open_disks(pin.hex()[:16])
        record = await self._parts.workers.run(memory.load)
        new_epoch = secrets.token_bytes(ID_BYTES)
        async with AsyncExitStack() as sources:
            cycle = await self._try(partial(begin, self._disks, record, new_epoch, sources))
            send = partial(self._link.send, cycle.disks, cycle.changes, cycle.epoch)
            outcome = await self._try(send)
            if not outcome.settled:
                await self._try(partial(self._link.settled, cycle.disks, outcome.epoch))
            await self._try(cycle.sealed)
        return outcome, cycle.went_on

    async def _try(self, attempt: Callable[[], Awaitable[T]]) -> T:
        parts, patience_s = self._parts, self._config.give_up_after_s
        return await keep_trying(attempt, self._link.met, parts.tell, parts.clock, patience_s)

    async def _open_disks(self, installation: str) -> Sequence[DiskInAzure]:
        """The disks, their accounts open until ``opened`` ends."""
        config, parts = self._config, self._parts
        accounts: dict[str, Account] = {}
        disks: list[DiskInAzure] = []
        managed: ManagedDisks | None = None
        for disk in config.disks:
            if disk.source.startswith(MANAGED):
                from agents.azure_disks import ManagedDisks  # half a second that page blobs need not pay

                managed = managed or ManagedDisks(
                    config, installation, parts.workers, parts.clock, parts.tell, self._opened
                )
                disks.append(await managed.open(disk.name, disk.source))
                continue
            address = BlobAddress.parse(disk.source)
            if address.account not in accounts:
                given = await self._credentials()
                account = Account(address.account, given, self._credentials, parts.clock)
                self._opened.push_async_callback(account.close)
                accounts[address.account] = account
            disks.append(
                BlobDisk(
                    disk.name,
                    accounts[address.account],
                    address,
                    (config.group, installation),
                    config.azure.trust_diff,
                    parts.workers,
                    parts.clock,
                    parts.tell,
                )
            )
        return disks

    async def _credentials(self) -> Credentials:
        """What the operator gave, as it is now."""
        path = self._config.azure.credentials
        if path is not None:
            return await self._parts.workers.run(_read_credentials, path, self._parts.files)
        for variable in VARIABLES:
            if text := os.environ.get(variable, ""):
                return Credentials.parse(text, variable)
        return Credentials()


def _read_credentials(path: Path, files: Files) -> Credentials:
    try:
        return Credentials.parse(read_text(files, path, CREDENTIALS_MAX_BYTES), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "azure.credentials",
            f"the credentials in {path} cannot be read: {error}",
            cause="a wrong path, no text, or this user may not read it",
            fix="give a file that holds a connection string or a shared access signature",
        ) from None
