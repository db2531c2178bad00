"""What snapshots of disks and restore points of machines have in common: whose they are, access to what they
hold, and the wait for the next one.

Not here: how Azure is asked (``compute.py``, ``restore_points.py``).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import parse_qs, urlsplit

from azure.mgmt.compute import models

from replicator.azure.arm import refused
from replicator.azure.limits import SnapshotLimits, wait_s
from replicator.clock import Clock
from replicator.errors import SourceError

GRANT_S: Final = 24 * 3600  # of one SAS: a full copy of a large disk takes longer, and renews it
RENEW_S: Final = 1800  # before it ends: a read that has begun shall end with the URL that it began with

TAG_GROUP: Final = "replicator-group"
TAG_EPOCH: Final = "replicator-epoch"
TAG_INSTALLATION: Final = "replicator-installation"

_EXPIRES: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d)?Z")


@dataclass(frozen=True, slots=True)
class Tag:
    """Whose a snapshot is, and of what: what is tagged so is ours to delete, and nothing else is.

    Attributes:
        group: of the disks that are replicated together.
        epoch: its id.
        installation: of the target, so that two installations that read one disk leave one another alone.
    """

    group: str
    epoch: bytes
    installation: str

    def as_tags(self) -> dict[str, str]:
        """As tags of a resource."""
        return {
            TAG_GROUP: self.group,
            TAG_EPOCH: self.epoch.hex(),
            TAG_INSTALLATION: self.installation,
        }

    @classmethod
    def of(cls, tags: Mapping[str, str] | None) -> Tag | None:
        """What tags say; None if they are not ours."""
        found = [(tags or {}).get(name) for name in (TAG_GROUP, TAG_EPOCH, TAG_INSTALLATION)]
        group, epoch, installation = found
        if group is None or epoch is None or installation is None:
            return None
        try:
            return cls(group, bytes.fromhex(epoch), installation)
        except ValueError:
            return None


@dataclass(frozen=True, slots=True)
class Grant:
    """Access to a snapshot's blob; the URL is a secret. ``ends``: when it stops, None if it does not say."""

    url: str = field(repr=False)
    ends: datetime | None


class Renewed:
    """A URL that is renewed before it ends, for who reads for longer than one grant lasts.

    Args:
        grant: opens the access, or tells the one that is open.
        revoke: ends it.
        clock: tells when it is time.
    """

    def __init__(
        self, grant: Callable[[], Awaitable[Grant]], revoke: Callable[[], Awaitable[None]], clock: Clock
    ) -> None:
        self._granting = grant
        self._revoke = revoke
        self._clock = clock
        self._grant: Grant | None = None
        self._renewing = asyncio.Lock()

    async def url(self) -> str:
        """The URL to be used now; a secret.

        Azure answers with the same URL as long as a grant lasts: to renew one it is ended first. Reads that
        this breaks are repeated, range by range, with the URL that is asked for then.

        Raises:
            Whatever ``grant`` and ``revoke`` raise.
        """
        async with self._renewing:
            if self._grant is None:
                self._grant = await self._granting()
            if self._ends_soon(self._grant):
                await self._revoke()
                self._grant = await self._granting()
            return self._grant.url

    async def close(self) -> None:
        """End the access, if there was one. Raises what ``revoke`` raises."""
        async with self._renewing:
            if self._grant is not None:
                await self._revoke()
            self._grant = None

    def _ends_soon(self, grant: Grant) -> bool:
        return grant.ends is not None and grant.ends - self._clock.now() < timedelta(seconds=RENEW_S)


def grant_of(what: str, access: models.AccessUri | None) -> Grant:
    """What Azure answers to a wish for access. ``SourceError`` (``compute.refused``) if that is no URL."""
    url = access.access_sas if access is not None else None
    if not url:
        raise refused(what, "the answer has no URL")
    told = parse_qs(urlsplit(url).query).get("se", [""])[0]
    ends = datetime.fromisoformat(told).astimezone(UTC) if _EXPIRES.fullmatch(told) else None
    return Grant(url, ends)


def limit_reached(what: str, limits: SnapshotLimits, held: int) -> SourceError:
    """As many exist as may."""
    return SourceError(
        "compute.limit",
        f"{what} is not possible: there are {held} {limits.name}, and Azure keeps {limits.held} at most",
        cause="others take snapshots of this disk, too, and do not delete them",
        fix="delete some that nobody needs; `replicator` deletes its own",
    )


async def pause(
    limits: SnapshotLimits, taken_ns: Sequence[int], clock: Clock, tell: Callable[[str], None], what: str
) -> None:
    """Wait until one more may be taken."""
    seconds = wait_s(limits, taken_ns, clock.now_ns())
    if seconds > 0:
        tell(f"{what} waits {seconds:.0f} s: Azure takes {limits.count} in {limits.window_s} s")
        await asyncio.sleep(seconds)
