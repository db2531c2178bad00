"""What a route is, what its handler gets, and what it gives: the types of the route table.

A handler works inside one transaction and knows nothing of HTTP but what stands here. A raw one (an event
stream, a text) makes its own answer. Not here: the table (``routes.py``), how a request is read
(``reading.py``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from aiohttp import web
from pydantic import TypeAdapter
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.clock import Clock
from replicator.control import audit
from replicator.control.auth import Access, Caller, Shown
from replicator.control.database import Database
from replicator.control.feed import Feed
from replicator.control.metrics import Metrics
from replicator.control.models import Model
from replicator.control.repositories import events
from replicator.control.repositories.events import Happening
from replicator.control.repositories.rows import Change, Window


@dataclass(frozen=True, slots=True)
class Parts:
    """What the API is made from.

    Attributes:
        pin: SPKI SHA-256 of the installation's authority, 32 bytes: what join tokens carry.
        certificate_of: the certificate (DER) that TLS has checked for a request, or None.
    """

    database: Database
    clock: Clock
    pin: bytes
    certificate_of: Callable[[web.Request], bytes | None]
    feed: Feed = field(default_factory=Feed)
    metrics: Metrics = field(default_factory=Metrics)

    def shown(self, request: web.Request) -> Shown:
        """What a request shows of its sender."""
        return Shown(request.headers.get("Authorization"), self.certificate_of(request))


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered.

    Attributes:
        body: None: nothing but the status.
        told: sent instead of ``body`` this once; what is kept for repetitions is ``body``.
        items: a part of a list, instead of a body. following: the key to go on after; None: it ends there.
        revision: of what the body shows: its ETag.
        location: path of what was made.
    """

    body: Model | None = None
    items: Sequence[Model] | None = None
    following: str | int | None = None
    told: Model | None = None
    revision: int | None = None
    location: str = ""


Handle: TypeAlias = "Callable[[Call], Awaitable[Reply]]"
Serve: TypeAlias = Callable[[web.Request, Parts], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the route table.

    Attributes:
        path: as OpenAPI writes it; its only parameter is ``{id}``.
        does: the handler: in a transaction, or raw.
        body: what it takes. answer: what it gives, or each item of a list; None: nothing.
        status: of success.
        id_type: what ``{id}`` looks like.
        conditional: wants If-Match.
        paged: the type of the key that pages go by.
        filters: query parameters beside those of pages.
        media_type: of a raw answer.
    """

    method: str
    path: str
    access: Access
    summary: str
    does: Handle | None = None
    raw: Serve | None = None
    body: type[Model] | None = None
    answer: type[Model] | None = None
    status: int = 200
    id_type: Any = None
    conditional: bool = False
    paged: type[int] | type[str] | None = None
    filters: Mapping[str, TypeAdapter[Any]] = field(default_factory=dict)
    media_type: str = "application/json"

    @property
    def changes(self) -> bool:
        """Whether it changes something."""
        return self.method != "GET"

    @property
    def shows_revision(self) -> bool:
        """Whether its answer is one thing with a revision, told as its ETag."""
        one = self.answer if self.paged is None else None
        return one is not None and "revision" in one.model_fields


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for, checked and taken apart.

    Attributes:
        asked: id in the path ("" where there is none), and the revision that If-Match names.
        body: of the route's model, or None.
        filters: by the names that the route has.
        key: the idempotency key, or None. digest: of all that makes the request the same, hex.
        known: the ETag that the sender has already (If-None-Match), or None.
    """

    route: Route
    asked: Change
    body: Model | None
    window: Window
    filters: Mapping[str, Any]
    key: str | None
    digest: str
    known: str | None


@dataclass(frozen=True, slots=True)
class Call:
    """A request to be done.

    Attributes:
        connection: the transaction that it is done in; a GET's changes nothing.
    """

    parts: Parts
    connection: AsyncConnection
    caller: Caller
    now_ns: int
    wanted: Wanted

    @property
    def asked(self) -> Change:
        """What the path and If-Match name."""
        return self.wanted.asked

    @property
    def body(self) -> Any:
        """The body, of the route's model."""
        return self.wanted.body

    async def note(self, action: str, thing: str, **details: object) -> None:
        """Say in the audit log what is being done."""
        await audit.append(
            self.connection, audit.Deed(self.caller.actor, action, thing, details), self.now_ns
        )

    async def tell(self, happening: Happening) -> None:
        """Tell an event; those who listen hear of it when the transaction is over."""
        await events.append(self.connection, happening, self.now_ns)
