"""The way to a storage account: where it is, and how requests are authorised, also after hours.

A connection string, a shared access signature (SAS) or an identity of Azure's own (managed identity, workload
identity, a login of the command line). A SAS is read again before it ends, and after a refusal. Not here:
what is asked of a blob (``blob.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self
from urllib.parse import parse_qs

from azure.core.credentials import AzureSasCredential
from azure.core.pipeline.transport import AioHttpTransport
from azure.storage.blob.aio import BlobClient, BlobServiceClient, ContainerClient

from replicator.clock import Clock
from replicator.errors import UsageError

RENEW_BEFORE_S: Final = 300  # a SAS ends: what has begun shall end with it
READ_AGAIN_S: Final = 10  # at the soonest, while the SAS found is still the one that ends
CONNECT_S: Final = 20.0
SILENT_S: Final = 60.0  # without a byte of an answer

SdkOptions = Mapping[str, Any]
OPTIONS: Final[SdkOptions] = {"retry_total": 0, "connection_timeout": CONNECT_S, "read_timeout": SILENT_S}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What an operator gave; all empty: an identity of Azure's own.

    Attributes:
        endpoint: of the account's blob service; empty: the public cloud's.
        account: name, if it was said.
        key: of the account. sas: a shared access signature without its question mark.
    """

    endpoint: str = ""
    account: str = ""
    key: str = field(default="", repr=False)
    sas: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str, name: str) -> Self:
        """Of a connection string or a SAS.

        Args:
            text: as Azure shows it. name: where it comes from, for messages.

        Raises:
            UsageError: ``azure.credentials``.
        """
        text = text.strip()
        if ";" not in text and "sig" in parse_qs(text.removeprefix("?")):
            return cls(sas=text.removeprefix("?"))
        pairs = [part.partition("=") for part in text.split(";") if part]
        found = {key.strip().lower(): value for key, _, value in pairs}
        account = found.get("accountname", "")
        suffix = found.get("endpointsuffix", "core.windows.net")
        scheme = found.get("defaultendpointsprotocol", "https")
        endpoint = found.get("blobendpoint", "") or (f"{scheme}://{account}.blob.{suffix}" if account else "")
        if not endpoint:
            raise UsageError(
                "azure.credentials",
                f"{name} holds neither a connection string nor a shared access signature",
                cause="it was cut short, or is something else, such as the account's key alone",
                fix="give a connection string or a SAS as Azure shows it; else the identity counts",
            )
        sas = found.get("sharedaccesssignature", "").removeprefix("?")
        return cls(endpoint.rstrip("/"), account, found.get("accountkey", ""), sas)


class Account:
    """A storage account that is open. Made inside the event loop; to be closed.

    Args:
        name: of the account.
        given: how requests are authorised.
        again: reads what was given anew, for a SAS that ends; None: it stays as it is.
        clock: tells when that is.

    Raises:
        UsageError: ``azure.other_account``: what was given is for another one.
    """

    def __init__(
        self,
        name: str,
        given: Credentials,
        again: Callable[[], Awaitable[Credentials]] | None,
        clock: Clock,
    ) -> None:
        if given.account not in ("", name):
            raise UsageError(
                "azure.other_account",
                f"the credential is for account {given.account}, not for {name}",
                cause="it was copied from another account, or the source's account is misspelt",
                fix="give the credential of the source's account",
            )
        self.name = name
        self._given = given
        self._again = again
        self._clock = clock
        self._sas = AzureSasCredential(given.sas) if given.sas else None
        self._identity: Any = None
        self._read_s = -float(READ_AGAIN_S)
        self._renewing = asyncio.Lock()
        self._service = BlobServiceClient(
            given.endpoint or f"https://{name}.blob.core.windows.net",
            credential=self._credential(),
            **OPTIONS,
        )

    async def client(self, container: str, blob: str, snapshot: str | None) -> BlobClient:
        """A client for a blob or a snapshot of it, whose next request is authorised."""
        if _ends_soon(self._given.sas, self._clock.now()):
            await self.renewed()
        return self._service.get_blob_client(container, blob, snapshot=snapshot)

    async def container(self, name: str) -> ContainerClient:
        """A client for a container, whose next request is authorised."""
        if _ends_soon(self._given.sas, self._clock.now()):
            await self.renewed()
        return self._service.get_container_client(name)

    async def renewed(self) -> bool:
        """Whether what was given, read anew, is something else now. Read at most once in a few seconds."""
        before = self._given
        async with self._renewing:
            if self._given != before:
                return True  # by whoever had the lock
            now_s = self._clock.monotonic_s()
            if self._again is None or self._sas is None or now_s - self._read_s < READ_AGAIN_S:
                return False
            self._read_s = now_s
            found = await self._again()
            if not found.sas or found == before:
                return False
            self._given = found
            self._sas.update(found.sas)
            return True

    async def close(self) -> None:
        """Let go of connections. Idempotent."""
        await self._service.close()
        if self._identity is not None:
            await self._identity.close()

    def _credential(self) -> Any:
        if self._sas is not None:
            return self._sas
        if self._given.key:
            return {"account_name": self.name, "account_key": self._given.key}
        from azure.identity.aio import DefaultAzureCredential  # noqa: PLC0415 - 0.3 s that a SAS need not pay

        self._identity = DefaultAzureCredential()
        return self._identity


class Export:
    """A blob that is reached by a URL with a SAS in it, such as the export of a managed disk's snapshot.

    Args:
        url: gives the URL to be used now; renews it when it is time.
    """

    def __init__(self, url: Callable[[], Awaitable[str]]) -> None:
        self._url = url
        self._used = ""
        self._client: BlobClient | None = None
        self._transport = AioHttpTransport(connection_timeout=CONNECT_S, read_timeout=SILENT_S)

    async def client(self, snapshot: str | None) -> BlobClient:
        """A client whose next request is authorised. An export has no snapshots: ``snapshot`` is None."""
        url = await self._url()
        if self._client is None or url != self._used:
            # All share one transport: requests that are under way by an older URL go on.
            self._client = BlobClient.from_blob_url(url, transport=self._transport, **OPTIONS)
            self._used = url
        return self._client

    async def renewed(self) -> bool:
        """Whether there is another URL now."""
        used = self._used
        return await self._url() != used

    async def close(self) -> None:
        """Let go of connections. Idempotent."""
        await self._transport.close()


def _ends_soon(sas: str, now: datetime) -> bool:
    """Whether a SAS tells an end that is near; one by a stored policy tells none."""
    told = parse_qs(sas).get("se", [""])[0]
    try:
        ends = datetime.fromisoformat(told)
    except ValueError:
        return False
    ends = ends if ends.tzinfo is not None else ends.replace(tzinfo=UTC)
    return ends - now < timedelta(seconds=RENEW_BEFORE_S)
