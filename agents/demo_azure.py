"""Azure's part of the demonstration: a disk that lies in a page blob, changes there, and goes back.

Azurite is Microsoft's emulator of the storage service. Not here: the sends (``demo.py``). Imported only with
``--azure``.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from asyncio import create_subprocess_exec, timeout
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Final
from uuid import uuid4

from protocol.constants import KIB
from replicator.azure.access import Account, Credentials
from replicator.azure.blob import BlobAddress, InAccount, PageBlob
from replicator.azure.way_back import DiskToBlob, WayBack
from replicator.clock import Clock
from replicator.errors import PeerError, UsageError
from replicator.files import Files
from replicator.formats.vhd import make_footer
from replicator.framing import Progress
from replicator.private_directory import PrivateDirectory
from replicator.sender import DiskToSend
from replicator.sources.page_blob import PageBlobSource
from replicator.sources.vmdk import open_vmdk
from replicator.verify import content_digest
from replicator.workers import Workers

START_S: Final = 30.0
UNIT_BYTES: Final = 64 * KIB
PUTS: Final = 8  # at the same time
CONTAINER: Final = "disks"

# The emulator's published account: they guard nothing.
_ACCOUNT: Final = "devstoreaccount1"
_KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_LISTENS: Final = re.compile(r"successfully listens on (http://127\.0\.0\.1:\d+)")


class DemoBlob:
    """A disk image and the page blob that holds the same."""

    def __init__(self, image: Path, connection_string: str, account: Account, workers: Workers) -> None:
        self.connection_string = connection_string
        self.address = BlobAddress(_ACCOUNT, CONTAINER, f"{image.stem}.vhd")
        self._image = image
        self.account = account
        self._workers = workers
        self._blob = PageBlob(InAccount(account, self.address), str(self.address))
        self._known: dict[int, bytes] = {}

    async def make(self) -> None:
        """The container and the blob: a fixed VHD, all zeros."""
        await (await self.account.container(CONTAINER)).create_container()
        size = (await self._workers.run(self._image.stat)).st_size
        footer = make_footer(size, uuid4(), Clock().now())
        await self._blob.create(size + len(footer), {})
        await self._blob.put(size, footer)

    async def follow(self) -> None:
        """Write to the blob what has changed in the image, and clear what has become zeros."""
        gate = asyncio.Semaphore(PUTS)

        async def say(offset: int, data: bytes) -> None:
            async with gate:
                if any(data):
                    await self._blob.put(offset, data)
                else:
                    await self._blob.clear(offset, len(data))

        async with asyncio.TaskGroup() as group:
            for offset, data in await self._workers.run(self._changed):
                group.create_task(say(offset, data))

    def _changed(self) -> list[tuple[int, bytes]]:
        """(offset, content) of the units that are not as they were. Blocks."""
        zeros = blake2b(bytes(UNIT_BYTES)).digest()
        found = []
        with self._image.open("rb") as file:
            offset = 0
            while data := file.read(UNIT_BYTES):
                digest = blake2b(data).digest()
                if self._known.get(offset, zeros) != digest:
                    self._known[offset] = digest
                    found.append((offset, data))
                offset += len(data)
        return found

    async def bring_back(self, vmdk: Path, state: Path) -> str:
        """Write the VMDK to a page blob of its own; the digest of what is there then."""
        address = BlobAddress(_ACCOUNT, CONTAINER, f"{vmdk.stem}-back.vhd")
        directory = PrivateDirectory(Files(), state)
        back = WayBack(self.account, self._workers, directory, Clock(), Progress(), lambda _: None)
        source = await open_vmdk(Files(), self._workers, vmdk)
        try:
            disk = DiskToSend(vmdk.stem, source, Clock().now_ns())
            await back.send("demo-back", [DiskToBlob(disk, address)])
        finally:
            await source.close()
        blob = PageBlob(InAccount(self.account, address), str(address))
        return await content_digest(await PageBlobSource.open(blob, self._workers))


@asynccontextmanager
async def in_azurite(image: Path, workers: Workers) -> AsyncIterator[DemoBlob]:
    """The image in a page blob of an emulator that runs as long as the block.

    Raises:
        UsageError: ``demo.no_azurite``. PeerError: ``demo.no_answer``.
    """
    program = shutil.which("azurite-blob")
    if program is None:
        raise UsageError(
            "demo.no_azurite",
            "azurite-blob is missing, so there is no storage account to show",
            cause="Azurite, Microsoft's storage emulator, is not installed or not in PATH",
            fix="make demo ARGS=--azure, which fetches it; or npm install --global azurite",
        )
    with tempfile.TemporaryDirectory() as folder:
        process = await create_subprocess_exec(
            program, "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence",
            "--blobPort", "0", cwd=folder, stdin=DEVNULL, stdout=PIPE,
        )  # fmt: skip
        try:
            url = await _address(process)
            text = f"AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={url}/{_ACCOUNT}"
            account = Account(_ACCOUNT, Credentials.parse(text, "the demonstration"), None, Clock())
            try:
                blob = DemoBlob(image, text, account, workers)
                await blob.make()
                yield blob
            finally:
                await account.close()
        finally:
            process.kill()  # it keeps nothing
            await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    """Where it listens, as it says itself."""
    try:
        async with timeout(START_S):
            while line := await process.stdout.readline() if process.stdout else b"":
                found = _LISTENS.search(line.decode(errors="replace"))
                if found is not None:
                    return found[1]
    except TimeoutError:
        pass
    raise PeerError(
        "demo.no_answer",
        "azurite-blob does not listen",
        cause="it does not run with this release of Node.js; its reason may stand above",
        fix="run azurite-blob by hand to see more",
    )
