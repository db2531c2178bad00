"""What every conversation with Azure's management interface (ARM) shares: the client, the names of things,
and errors in our own words.

Not here: what is asked of it (``compute.py``, ``restore_points.py``, ``machine.py``), and what blobs hold
(``blob.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from azure.core.credentials_async import AsyncTokenCredential
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ServiceRequestError,
    ServiceResponseError,
)
from azure.mgmt.compute.aio import ComputeManagementClient

from replicator.errors import LinkError, ReplicatorError, SourceError, TrustError, UsageError

POLL_S: Final = 2.0  # between looks at what is under way, where Azure does not say; the SDK would take 30
RETRIES: Final = 8  # of one request; Azure's word on when (Retry-After) is kept to
# All of ours may be said twice, the SDK's list leaves POST out: grant, revoke, deallocate and start are that.
REPEATABLE: Final[dict[str, Any]] = {"retry_on_methods": frozenset({"GET", "PUT", "DELETE", "POST"})}

DISK_SCHEME: Final = "azure-disk://"
_PART: Final = r"[^/?#\s]{1,90}"
_ADDRESS: Final = re.compile(rf"{DISK_SCHEME}({_PART})/({_PART})/({_PART})")
_FIXED: Final = "subscriptions/resourceGroups/providers/Microsoft.Compute".lower().split("/")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ResourceRef:
    """A resource: its subscription, resource group, type below Microsoft.Compute, and name."""

    subscription: str
    group: str
    kind: str
    name: str

    @property
    def id(self) -> str:
        """As ARM writes it. Ids are compared without regard to case: ARM changes it as it likes."""
        return (
            f"/subscriptions/{self.subscription}/resourceGroups/{self.group}"
            f"/providers/Microsoft.Compute/{self.kind}/{self.name}"
        )

    @classmethod
    def of_id(cls, resource_id: str) -> ResourceRef:
        """The resource of an id; ``ValueError`` if it is not of Microsoft.Compute."""
        parts = resource_id.strip("/").split("/")
        fixed = [part.lower() for part in (*parts[0:5:2], *parts[5:6])]
        if len(parts) != 8 or fixed != _FIXED:
            raise ValueError(f"{resource_id!r} is no id of a compute resource")
        return cls(parts[1], parts[3], parts[6], parts[7])


def parse_disk_address(address: str) -> ResourceRef:
    """The managed disk that ``azure-disk://SUBSCRIPTION/GROUP/DISK`` names.

    Raises:
        UsageError: ``compute.address``.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise UsageError(
            "compute.address",
            f"{address[:200]!r} names no managed disk",
            cause="a part is missing, or there is one too many",
            fix="write azure-disk://SUBSCRIPTION/RESOURCE-GROUP/DISK, as the portal shows them",
        )
    return ResourceRef(found[1], found[2], "disks", found[3])


def connect(
    subscription: str, credential: AsyncTokenCredential, endpoint: str | None = None, **options: Any
) -> ComputeManagementClient:
    """A client of one subscription's compute resources; nothing is sent before it is used.

    Args:
        subscription: its id.
        credential: of azure-identity; stays the caller's.
        endpoint: of ARM, for clouds other than the public one.
        options: of the SDK: proxies, certificates, polling.
    """
    settings: dict[str, Any] = {
        "polling_interval": POLL_S,
        "retry_total": RETRIES,
        "retry_status": RETRIES,
        **options,
    }
    if endpoint is not None:
        settings |= {"base_url": endpoint, "credential_scopes": [f"{endpoint.rstrip('/')}/.default"]}
    return ComputeManagementClient(credential, subscription, **settings)


def moment_ns(moment: datetime | None, what: str) -> int:
    """A moment that Azure told, in ns since 1970. ``SourceError`` (``compute.refused``) if it told none."""
    if moment is None:
        raise refused(what, "the answer names no time")
    at = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    since = at - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000


@contextmanager
def asking(what: str) -> Iterator[None]:
    """What the SDK raises inside, in our words. ``what``: what was asked, on which thing.

    Raises:
        TrustError: ``compute.denied``. SourceError: ``compute.missing``, ``compute.conflict``,
            ``compute.refused``. LinkError: ``compute.throttled``, ``compute.unreachable``.
    """
    try:
        yield
    except ClientAuthenticationError as error:
        raise _denied(what, _reason(error)) from error
    except HttpResponseError as error:
        raise _answered(what, error) from error
    except (ServiceRequestError, ServiceResponseError) as error:
        raise _unreachable(what, str(error)) from error
    except AzureError as error:
        raise refused(what, _reason(error)) from error


def refused(what: str, why: str) -> SourceError:
    """Azure does not do what was asked."""
    return SourceError(
        "compute.refused",
        f"{what} failed: {why}",
        cause="Azure does not do this with this resource, in this state",
        fix="look at the resource in the portal; docs/azure.md says what is needed",
    )


def _answered(what: str, error: HttpResponseError) -> ReplicatorError:
    """By status; an operation that was accepted and failed later carries the status of the last look, 200."""
    status, why = error.status_code, _reason(error)
    if status == 403:
        return _denied(what, why)
    if status == 404:
        return SourceError(
            "compute.missing",
            f"{what} failed: {why}",
            cause="it was deleted or never existed, or this identity may not see it",
            fix="check subscription, resource group and name, and the role's scope",
        )
    if status == 409:
        return SourceError(
            "compute.conflict",
            f"{what} failed: {why}",
            cause="something else holds the resource: a lock, a move, a backup, an export",
            fix="wait for it to end, or end it, then give the same command again",
        )
    if status == 429:
        return LinkError(
            "compute.throttled",
            f"{what} was put off {RETRIES} times: {why}",
            cause="this subscription sends more requests than Azure takes",
            fix="let fewer cycles run at a time, or make them rarer",
        )
    if status is None or status >= 500:
        return _unreachable(what, why)
    return refused(what, why)


def _denied(what: str, why: str) -> TrustError:
    return TrustError(
        "compute.denied",
        f"{what} is not allowed: {why}",
        cause="the identity has no role for it at this scope, or its secret has expired",
        fix="give it the role of docs/azure.md on the resource group",
    )


def _unreachable(what: str, why: str) -> LinkError:
    return LinkError(
        "compute.unreachable",
        f"{what} failed: {why}",
        cause="Azure's management endpoint does not answer, or answers that it cannot just now",
        fix="check name resolution, proxy and firewall towards it, then give the same command again",
    )


def _reason(error: AzureError) -> str:
    """Azure's own words, on one line: the code and the message, and nothing of the request."""
    told = getattr(error, "error", None)
    code, message = getattr(told, "code", None), getattr(told, "message", None)
    text = f"{code}: {message}" if code and message else str(error.message or error)
    return " ".join(text.split())[:500]
