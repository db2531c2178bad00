"""The way back as a process of its own, to be killed at any failpoint. See `test_way_back.py`.

    python -m tests.azure.back_child CONNECTION_STRING CONTAINER STATE GROUP VMDK...

Sends the VMDKs to the blobs NAME.vhd of the container.
"""

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from replicator.azure.access import Account, Credentials
from replicator.azure.blob import BlobAddress
from replicator.azure.way_back import DiskToBlob, WayBack
from replicator.changes import Changes
from replicator.clock import Clock
from replicator.files import Files
from replicator.framing import Progress
from replicator.private_directory import PrivateDirectory
from replicator.sender import DiskToSend, Outcome
from replicator.sources.vmdk import open_vmdk
from replicator.workers import Workers
from tests.azure.azurite import ACCOUNT


async def send_back(
    connection: str,
    container: str,
    state: Path,
    group: str,
    vmdks: list[Path],
    changes: Changes | None = None,
    **options: Any,
) -> tuple[Outcome, Progress, list[str]]:
    """One cycle; what became of it, the counters, and what was told."""
    progress, told = Progress(), list[str]()
    async with AsyncExitStack() as opened:
        workers = opened.enter_context(Workers())
        account = Account(ACCOUNT, Credentials.parse(connection, "the test"), None, Clock())
        opened.push_async_callback(account.close)
        moment_ns = Clock().now_ns()
        disks = []
        for path in vmdks:
            source = await open_vmdk(Files(), workers, path)
            opened.push_async_callback(source.close)
            blob = BlobAddress(ACCOUNT, container, f"{path.stem}.vhd")
            disks.append(DiskToBlob(DiskToSend(path.stem, source, moment_ns), blob))
        directory = PrivateDirectory(Files(), state)
        back = WayBack(account, workers, directory, Clock(), progress, told.append, **options)
        return await back.send(group, disks, changes), progress, told


def main(connection: str, container: str, state: str, group: str, *vmdks: str) -> None:
    asyncio.run(send_back(connection, container, Path(state), group, [Path(vmdk) for vmdk in vmdks]))


if __name__ == "__main__":
    main(*sys.argv[1:])
