"""What snapshots of the fake ARM hold: those of blobs in Azurite, one blob a disk, read by signed URLs."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from azure.storage.blob import BlobSasPermissions, BlobServiceClient, generate_blob_sas

from tests.azure.azurite import ACCOUNT, KEY


class AzuriteExports:
    """See `fake_arm.Exports`.

    Args:
        url: through which exports are read, the emulator's or a proxy's.
        service: the SDK's blocking client of the emulator.
        container: in it disk NAME is the blob NAME.
    """

    def __init__(self, url: str, service: BlobServiceClient, container: str) -> None:
        self._url = url
        self._service = service
        self._container = container

    async def capture(self, disk: str) -> Any:
        blob = self._service.get_blob_client(self._container, disk)
        return disk, str((await asyncio.to_thread(blob.create_snapshot))["snapshot"])

    async def url(self, content: Any, ends: datetime) -> str:
        disk, snapshot = content
        sas = generate_blob_sas(
            ACCOUNT,
            self._container,
            disk,
            snapshot=snapshot,
            account_key=KEY,
            permission=BlobSasPermissions(read=True),
            expiry=ends,
            start=datetime.now(UTC) - timedelta(minutes=5),
        )
        return f"{self._url}/{self._container}/{disk}?snapshot={quote(snapshot)}&{sas}"

    async def discard(self, content: Any) -> None:
        disk, snapshot = content
        blob = self._service.get_blob_client(self._container, disk, snapshot=snapshot)
        await asyncio.to_thread(blob.delete_blob)
