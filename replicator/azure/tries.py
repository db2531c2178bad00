"""One request to a blob, tried again where that helps; what is final in our own words.

Each range, list or snapshot is tried by itself, so that what goes wrong late in a large blob costs one range.
The SDK's own tries are off: they do not heed Retry-After, and do not know that a credential was renewed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    DecodeError,
    HttpResponseError,
    ServiceRequestError,
    ServiceResponseError,
)

from replicator.errors import LinkError, ReplicatorError, SourceError, TargetError, TrustError

T = TypeVar("T")

TRIES: Final = 7  # with the waits between them some 20 s; whoever sends goes on trying after that
FIRST_WAIT_S: Final = 0.2
LONGEST_WAIT_S: Final = 10.0
RETRY_AFTER_MAX_S: Final = 120.0  # what a service may ask for; more is as good as a failure

_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
_THROTTLED: Final = frozenset({429, 503})
_DENIED: Final = frozenset({401, 403})


async def tried(
    request: Callable[[], Awaitable[T]],
    what: str,
    renewed: Callable[[], Awaitable[bool]],
    blame: type[SourceError] | type[TargetError],
) -> T:
    """What ``request`` returns, after as many tries as are of use.

    Args:
        request: begins anew each time.
        what: what is asked, of which thing, for messages.
        renewed: after a refusal: whether there is a newer credential to try with.
        blame: the class of what this blob's own state makes impossible.

    Raises:
        LinkError: ``azure.throttled``, ``azure.unreachable``. TrustError: ``azure.denied``.
        SourceError or TargetError, by ``blame``: ``azure.missing``, ``azure.refused``.
    """
    tries = 0
    while True:
        tries += 1
        try:
            return await request()
        except AzureError as error:
            wait_s = _wait_s(error, tries)
            if _status(error) in _DENIED and tries < TRIES and await renewed():
                wait_s = 0.0
            if wait_s is None:
                raise in_our_words(error, what, blame) from error
        await asyncio.sleep(wait_s)


def error_code(error: AzureError) -> str:
    """The service's own name for what is wrong; empty if it gave none."""
    return _header(error, "x-ms-error-code")


def in_our_words(
    error: AzureError, what: str, blame: type[SourceError] | type[TargetError]
) -> ReplicatorError:
    """An error of the SDK as one of ours, by what is to be done about it."""
    status, why = _status(error), error_code(error) or _first_line(error)
    if isinstance(error, ClientAuthenticationError) or status in _DENIED:
        return TrustError(
            "azure.denied",
            f"{what} was refused: {why}",
            cause="the credential has ended or lacks a right, or the account's firewall forbids this machine",
            fix="renew the credential, or give this identity the rights that docs/azure.md lists",
        )
    if status in _THROTTLED:
        return LinkError(
            "azure.throttled",
            f"{what} was put off {TRIES} times: {why}",
            cause="the blob or its account gets more requests than Azure takes",
            fix="nothing is lost; if it stays so, let fewer disks of this account run at a time",
        )
    if status is None or status in _PASSING or status < 400:
        return LinkError(
            "azure.unreachable",
            f"{what} failed: {why}",
            cause="the storage account cannot be reached: name, network, proxy or private endpoint",
            fix="check the account's name, and that this machine reaches it on port 443",
        )
    if status == 404:
        return blame(
            "azure.missing",
            f"{what} failed: {why}",
            cause="the blob, its container or its snapshot is not there, or was deleted meanwhile",
            fix="check account, container and blob; a deleted snapshot costs a comparison, no data",
        )
    return blame(
        "azure.refused",
        f"{what} failed: {why} ({status})",
        cause="Azure does not do this with this blob, in this state",
        fix="look at the blob in the portal: its type, its lease and its tier",
    )


def _status(error: AzureError) -> int | None:
    return error.status_code if isinstance(error, HttpResponseError) else None


def _first_line(error: AzureError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _wait_s(error: AzureError, tries: int) -> float | None:
    """How long until the next try; None: there is no use in one."""
    passing = isinstance(error, ServiceRequestError | ServiceResponseError | DecodeError)
    if not passing and (isinstance(error, ClientAuthenticationError) or _status(error) not in _PASSING):
        return None
    if tries >= TRIES:
        return None
    asked_s = _retry_after_s(error)
    if asked_s is not None:
        return asked_s if asked_s <= RETRY_AFTER_MAX_S else None
    wait_s = min(FIRST_WAIT_S * 2.0 ** (tries - 1), LONGEST_WAIT_S)
    return wait_s * random.uniform(0.8, 1.2)  # noqa: S311 - spreads, guards nothing


def _retry_after_s(error: AzureError) -> float | None:
    """What the answer asks for, in seconds (RFC 9110, 10.2.3); a date counts as not said."""
    text = _header(error, "Retry-After")
    return float(text) if text.isdecimal() else None


def _header(error: AzureError, name: str) -> str:
    response: Any = error.response if isinstance(error, HttpResponseError) else None
    return str(response.headers.get(name, "")) if response is not None else ""
