"""What the API refuses, and the HTTP status of every error that it tells.

An answer that is no success is a problem document (RFC 9457), with our ``code``, ``cause`` and ``fix``
(``replicator/health.py`` makes it). Not here: when something is refused.
"""

from __future__ import annotations

from typing import Final

from replicator.errors import ReplicatorError, SpaceError, StateError, TrustError, UsageError

CONTENT_TYPE: Final = "application/problem+json"
_STATUS: Final = {
    "api.malformed": 400,
    "api.unauthenticated": 401,
    "api.forbidden": 403,
    "api.not_found": 404,
    "api.method_unknown": 405,
    "api.conflict": 409,
    "store.conflict": 409,
    "token.too_many": 409,
    "api.too_slow": 408,
    "api.changed": 412,
    "api.too_large": 413,
    "api.media_type": 415,
    "api.key_reused": 422,
    "api.if_match_missing": 428,
    "api.too_many_streams": 429,
    "api.defect": 500,
}


def status_of(error: ReplicatorError) -> int:
    """The HTTP status of an error: what is not the asker's fault is 503, or 507 when space is short."""
    return _STATUS.get(error.code, 507 if isinstance(error, SpaceError) else 503)


def malformed(what: str) -> UsageError:
    """``what``: which part of the request, and what is wrong with it."""
    return UsageError(
        "api.malformed",
        f"the request does not fit: {what}",
        cause="a mistake in the client, or a client of another release",
        fix="compare it with /api/v1/openapi.json of this server",
    )


def unauthenticated(reason: str) -> TrustError:
    """Nobody that we know has shown an identity; ``reason`` goes to the log and to the asker alike."""
    return TrustError(
        "api.unauthenticated",
        f"no identity that is accepted here: {reason}",
        cause="no operator's token and no certificate was shown, or it has expired or was revoked",
        fix="send `Authorization: Bearer TOKEN` with a token that an administrator has made for you",
    )


def undecided() -> StateError:
    """Whether the asker may do so cannot be found out: that is a no."""
    return StateError(
        "api.undecided",
        "the request is refused: who asks cannot be looked up",
        cause="the database cannot be used; the server's log says why",
        fix="put the database right, then try again; replication goes on meanwhile",
    )


def forbidden(actor: str, wanted: str) -> TrustError:
    """``wanted``: whom the route is for."""
    return TrustError(
        "api.forbidden",
        f"{actor} may not do this: it is for {wanted}",
        cause="the role of this identity allows less",
        fix="use another operator's token, or ask an administrator",
    )


def not_found(what: str) -> UsageError:
    """``what``: kind and id."""
    return UsageError(
        "api.not_found",
        f"there is no {what}",
        cause="it was deleted, or the id or path is mistyped",
        fix="list what there is and take an id from there",
    )


def method_unknown(method: str, path: str) -> UsageError:
    """The path is known, with other methods."""
    return UsageError(
        "api.method_unknown",
        f"{path} knows no {method}",
        cause="a mistake in the client",
        fix="compare it with /api/v1/openapi.json of this server",
    )


def conflict(message: str, fix: str) -> UsageError:
    """The request is well made, and does not fit what there is."""
    return UsageError(
        "api.conflict", message, cause="it contradicts what the control server already knows", fix=fix
    )


def changed(what: str) -> UsageError:
    """The revision in If-Match is not the present one."""
    return UsageError(
        "api.changed",
        f"{what} has changed since it was read",
        cause="somebody else has changed it",
        fix="read it again, and send the change with the ETag of that answer",
    )


def if_match_missing() -> UsageError:
    """A change without saying of what."""
    return UsageError(
        "api.if_match_missing",
        "a change wants the header If-Match",
        cause="without it, a change of somebody else could be lost",
        fix="send the ETag of the answer that you have read, or * to change it whatever it is",
    )


def too_large(limit_bytes: int) -> UsageError:
    """A body past the limit."""
    return UsageError(
        "api.too_large",
        f"the body has more than {limit_bytes} bytes",
        cause="a mistake in the client: no request needs as many",
        fix="send less at a time",
    )


def too_slow(limit_s: int) -> UsageError:
    """A body that does not come."""
    return UsageError(
        "api.too_slow",
        f"the body of the request did not come within {limit_s} s",
        cause="the client or the line stalled",
        fix="send the request again",
    )


def too_many_streams(limit: int) -> UsageError:
    """More listeners than are served."""
    return UsageError(
        "api.too_many_streams",
        f"{limit} streams of events are open already",
        cause="clients that open one after the other and close none",
        fix="close some of them, or read the events page by page",
    )


def media_type() -> UsageError:
    """A body that is not said to be JSON."""
    return UsageError(
        "api.media_type",
        "the body is not of the type application/json",
        cause="the header Content-Type is missing or names another type",
        fix="send JSON, with `Content-Type: application/json`",
    )


def key_reused() -> UsageError:
    """An idempotency key that belongs to another request."""
    return UsageError(
        "api.key_reused",
        "this Idempotency-Key was sent before, with another request",
        cause="the client uses a key again for something else",
        fix="make a fresh key for every new request; send the same one only to repeat a request",
    )


def defect() -> StateError:
    """Something that is no error of ours was raised."""
    return StateError(
        "api.defect",
        "the request failed in a way that the server does not know",
        cause="a defect in it",
        fix="report it with the server's log, which names the place",
    )
