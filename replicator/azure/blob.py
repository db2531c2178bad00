"""A page blob in Azure: read in ranges, what of it is written, its snapshots, and pages put and cleared.

Shared by the source and the image. Each request is tried again by itself (``tries.py``); how it is authorised
is ``access.py``'s matter. Not here: what the ranges mean to a cycle (``cycle.py``), and the footer of a VHD
(``formats/vhd.py``).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, Protocol, TypeVar, cast
from urllib.parse import quote

from azure.core.exceptions import HttpResponseError, IncompleteReadError
from azure.storage.blob import BlobType
from azure.storage.blob.aio import BlobClient

from protocol.constants import MIB
from protocol.messages import Interval
from replicator.azure.access import Account
from replicator.azure.tries import tried
from replicator.errors import ReplicatorError, SourceError, TargetError, UsageError
from replicator.extents import Coverage

T = TypeVar("T")
Section = memoryview | int
"""Where bytes go that are read: memory to be filled, or a count of bytes that nobody wants."""

SCHEME: Final = "azure://"
PAGE_BYTES: Final = 512
PUT_MAX_BYTES: Final = MIB  # Azure takes four; a longer body would hold the event loop, says aiohttp
DIFF_REFUSALS: Final = frozenset({400, 404, 409, 412, 501})

_ADDRESS: Final = re.compile(r"azure://([a-z0-9]{3,24})/([a-z0-9$](?:[a-z0-9-]{2,62}))/([^?#]{1,1024})")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_FRACTION: Final = re.compile(r"(\.\d{1,6})\d*")


@dataclass(frozen=True, slots=True)
class BlobAddress:
    """``azure://ACCOUNT/CONTAINER/BLOB``; the blob's name may hold slashes."""

    account: str
    container: str
    blob: str

    @classmethod
    def parse(cls, text: str) -> BlobAddress:
        """The address of a text; ``UsageError`` (``azure.bad_address``) if it is none."""
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise UsageError(
                "azure.bad_address",
                f"{text!r} is no address of a blob",
                cause="a part is missing, or has letters that Azure does not take there",
                fix="write azure://ACCOUNT/CONTAINER/BLOB",
            )
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{SCHEME}{self.account}/{self.container}/{self.blob}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of a blob: its id, the moment that it shows in ns since 1970 UTC, and its metadata."""

    id: str
    moment_ns: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Properties:
    """Of a blob: its size, its metadata, the ETag that is another one after every change, and whether it is a
    premium one, of which Azure takes fewer snapshots.
    """

    size_bytes: int
    metadata: Mapping[str, str]
    etag: str
    premium: bool


@dataclass(frozen=True, slots=True)
class Diff:
    """What was written and what was cleared between two snapshots; intervals in order."""

    written: tuple[Interval, ...]
    cleared: tuple[Interval, ...]


class Way(Protocol):
    """How a blob is reached."""

    async def client(self, snapshot: str | None) -> BlobClient:
        """A client for the blob or a snapshot of it, whose next request is authorised."""
        ...

    async def renewed(self) -> bool:
        """After a refusal: whether there is a newer credential to try with."""
        ...


@dataclass(frozen=True, slots=True)
class InAccount:
    """The way to a blob by its account."""

    account: Account
    address: BlobAddress

    async def client(self, snapshot: str | None) -> BlobClient:
        """See ``Way``."""
        return await self.account.client(self.address.container, self.address.blob, snapshot)

    async def renewed(self) -> bool:
        """See ``Way``."""
        return await self.account.renewed()


class PageBlob:
    """A page blob, or one snapshot of it.

    Every method raises what ``tries.tried`` does.

    Args:
        way: how it is reached: ``InAccount``, or an ``access.Export``.
        name: what an operator would call it, for messages.
        snapshot: id of a snapshot; None: the blob itself.
        blame: the class of errors for which its own state is the reason.
    """

    def __init__(
        self,
        way: Way,
        name: str,
        snapshot: str | None = None,
        blame: type[SourceError] | type[TargetError] = SourceError,
    ) -> None:
        self.name = name
        self.snapshot = snapshot
        self._way = way
        self._blame = blame

    def at(self, snapshot: str) -> PageBlob:
        """A snapshot of this blob."""
        return PageBlob(self._way, self.name, snapshot, self._blame)

    # -- reading -----

    async def size_bytes(self) -> int:
        """Its size; ``azure.not_page_blob`` if it is a blob of another kind."""
        return (await self.properties()).size_bytes

    async def properties(self) -> Properties:
        """What it is now; ``azure.not_page_blob`` if it is a blob of another kind."""

        async def ask(client: BlobClient) -> tuple[Properties, object]:
            found = await client.get_blob_properties()
            properties = Properties(
                found.size, dict(found.metadata or {}), str(found.etag), bool(found.blob_tier)
            )
            return properties, found.blob_type

        properties, kind = await self._tried(ask, f"looking at {self}")
        if kind != BlobType.PAGEBLOB:
            raise self._blame(
                "azure.not_page_blob",
                f"{self} is no page blob",
                cause="it was uploaded as a block or append blob; disks of machines are page blobs",
                fix="give the disk's own blob, or upload the file as a page blob",
            )
        return properties

    async def read(self, offset: int, sections: Sequence[Section]) -> None:
        """Read from ``offset`` on, in one request, into sections that touch one another."""
        length = sum(map(_length, sections))
        what = f"reading bytes [{offset}, {offset + length}) of {self}"
        await self._tried(partial(self._read, offset, length, sections), what)

    async def ranges(self) -> tuple[Interval, ...]:
        """What was ever written and not cleared; the rest is zeros. In order, apart."""
        return (await self._ranges(f"listing the pages of {self}")).written

    async def changes(self, since: str) -> Diff | None:
        """What the service says was written and cleared since an older snapshot.

        Args:
            since: its id; or its URL, if this is the export of a managed disk's snapshot.

        Returns:
            None if the service refuses: other versions, a base that was replaced, a snapshot that is gone.
        """
        try:
            return await self._ranges(f"asking what changed in {self} since {_bare(since)}", since)
        except ReplicatorError as error:
            answer = error.__cause__
            if isinstance(answer, HttpResponseError) and answer.status_code in DIFF_REFUSALS:
                return None
            raise

    # -- snapshots -----

    async def take_snapshot(self, metadata: Mapping[str, str]) -> Snapshot:
        """A new snapshot with this metadata. After a lost answer there may be two: see ``snapshots``."""

        async def ask(client: BlobClient) -> str:
            return str((await client.create_snapshot(metadata=dict(metadata)))["snapshot"])

        made = await self._tried(ask, f"taking a snapshot of {self}")
        return Snapshot(made, moment_ns(made), dict(metadata))

    async def delete(self) -> None:
        """Delete this snapshot, or the blob if it has none. One that is gone is fine."""

        async def ask(client: BlobClient) -> None:
            try:
                await client.delete_blob()
            except HttpResponseError as error:
                if error.status_code != 404:
                    raise

        await self._tried(ask, f"deleting {self}")

    # -- writing -----

    async def create(self, size_bytes: int, metadata: Mapping[str, str]) -> None:
        """Make it, of zeros, in place of what was there. Size: a multiple of 512."""

        async def ask(client: BlobClient) -> None:
            await client.create_page_blob(size_bytes, metadata=dict(metadata))

        await self._tried(ask, f"creating {self}")

    async def put(self, offset: int, data: bytes | memoryview) -> None:
        """Write pages, at most ``PUT_MAX_BYTES``."""

        async def ask(client: BlobClient) -> None:
            await client.upload_page(bytes(data), offset, len(data))

        await self._tried(ask, f"writing bytes [{offset}, {offset + len(data)}) of {self}")

    async def annotate(self, metadata: Mapping[str, str]) -> None:
        """Give it this metadata in place of what it had."""

        async def ask(client: BlobClient) -> None:
            await client.set_blob_metadata(dict(metadata))

        await self._tried(ask, f"marking {self}")

    async def clear(self, offset: int, length: int) -> None:
        """Make pages zeros that take no space."""

        async def ask(client: BlobClient) -> None:
            await client.clear_page(offset, length)

        await self._tried(ask, f"clearing bytes [{offset}, {offset + length}) of {self}")

    def __str__(self) -> str:
        return self.name if self.snapshot is None else f"snapshot {self.snapshot} of {self.name}"

    # -- how -----

    async def _tried(self, ask: Callable[[BlobClient], Awaitable[T]], what: str) -> T:
        async def request() -> T:
            return await ask(await self._way.client(self.snapshot))

        return await tried(request, what, self._way.renewed, self._blame)

    async def _read(self, offset: int, length: int, sections: Sequence[Section], client: BlobClient) -> None:
        """The request below the SDK's ``download_blob``, which asks for the blob's whole list of pages with
        every range, and joins what comes before it is copied.
        """
        response, body = await client._client.blob.download(
            snapshot=self.snapshot,
            range=f"bytes={offset}-{offset + length - 1}",
            cls=_with_response,
        )
        try:
            if await _scatter(body, sections) != length:
                raise IncompleteReadError(f"the answer has other than {length} bytes", response=response)
        except BaseException:  # cancelled too: the rest of the answer must not be waited for
            response.internal_response.close()
            raise

    async def _ranges(self, what: str, since: str | None = None) -> Diff:
        async def ask(client: BlobClient) -> Diff:
            written, cleared = Coverage(), Coverage()
            if since is not None and "://" in since:
                await _changed_in_managed_disk(client, self.snapshot, since, written, cleared)
                return Diff(written.intervals(), cleared.intervals())
            async for found in client.list_page_ranges(previous_snapshot=since):
                (cleared if found.cleared else written).add(cast(int, found.start), cast(int, found.end) + 1)
            return Diff(written.intervals(), cleared.intervals())

        return await self._tried(ask, what)


async def _changed_in_managed_disk(
    client: BlobClient, snapshot: str | None, since: str, written: Coverage, cleared: Coverage
) -> None:
    """What changed since the snapshot at a URL, list by list of up to 10,000 ranges.

    The request below the SDK's own, which takes the first list for all of it.
    """
    marker: str | None = None
    while True:
        found = await client._client.page_blob.get_page_ranges_diff(
            snapshot=snapshot, prev_snapshot_url=since, marker=marker
        )
        for pages, into in ((found.page_range, written), (found.clear_range, cleared)):
            for page in pages or ():
                into.add(page.start, page.end + 1)
        marker = found.next_marker
        if not marker:
            return


async def snapshots(account: Account, address: BlobAddress) -> list[Snapshot]:
    """All snapshots of a blob with their metadata, oldest first. Raises as ``PageBlob``."""

    async def request() -> list[Snapshot]:
        container = await account.container(address.container)
        found = container.list_blobs(name_starts_with=address.blob, include=["snapshots", "metadata"])
        return [
            Snapshot(item.snapshot, moment_ns(item.snapshot), dict(item.metadata or {}))
            async for item in found
            if item.snapshot and item.name == address.blob
        ]

    made = await tried(request, f"listing the snapshots of {address}", account.renewed, SourceError)
    return sorted(made, key=lambda snapshot: snapshot.moment_ns)


def moment_ns(snapshot: str) -> int:
    """The moment that a snapshot's id names, in ns since 1970 UTC; ``ValueError`` if it names none."""
    moment = datetime.fromisoformat(_FRACTION.sub(r"\1", snapshot))
    return (moment - _EPOCH) // _MICROSECOND * 1000


async def _scatter(body: AsyncIterator[bytes], sections: Sequence[Section]) -> int:
    """Fill the sections with what comes; returns how much came: at most one part more than wanted."""
    came, waiting = 0, iter(sections)
    section: Section = 0
    room = 0
    async for part in body:
        came += len(part)
        at = 0
        while at < len(part):
            while room == 0:
                section = next(waiting, -1)
                if section == -1:
                    return came
                room = _length(section)
            count = min(room, len(part) - at)
            if isinstance(section, memoryview):
                first = len(section) - room
                section[first : first + count] = part[at : at + count]
            at += count
            room -= count
    return came


def _length(section: Section) -> int:
    return section if isinstance(section, int) else len(section)


def _with_response(response: Any, body: AsyncIterator[bytes], _: object) -> tuple[Any, AsyncIterator[bytes]]:
    return response.http_response, body


def _bare(since: str) -> str:
    """Without the query, which authorises who knows it."""
    return quote(since.partition("?")[0], safe=":/.-")
