"""The five routes of an aggregate: list, make, show, change, delete. What differs is in its repository."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import TypeAdapter
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control.auth import Access
from replicator.control.models import Model
from replicator.control.repositories.rows import Change
from replicator.control.route import Call, Handle, Reply, Route

API: Final = "/api/v1"


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Five functions of a repository, and what they are about.

    Attributes:
        name: what one is called. path: below API.
        wanted: what is taken. model: what is given.
    """

    name: str
    path: str
    wanted: type[Model]
    model: type[Model]
    id_type: Any
    page: Handle
    get: Callable[[AsyncConnection, str], Awaitable[Any]]
    create: Callable[[AsyncConnection, Any], Awaitable[Any]]
    replace: Callable[[AsyncConnection, Change, Any], Awaitable[Any]]
    delete: Callable[[AsyncConnection, Change], Awaitable[None]]
    filters: Mapping[str, TypeAdapter[Any]] = field(default_factory=dict)

    async def show(self, call: Call) -> Reply:
        """GET of one."""
        found = await self.get(call.connection, call.asked.id)
        return Reply(found, revision=found.revision)

    async def make(self, call: Call) -> Reply:
        """POST."""
        made = await self.create(call.connection, call.body)
        await call.note(f"create {self.name}", made.id, **call.body.model_dump(mode="json"))
        return Reply(made, revision=made.revision, location=f"{API}/{self.path}/{made.id}")

    async def change(self, call: Call) -> Reply:
        """PUT."""
        made = await self.replace(call.connection, call.asked, call.body)
        await call.note(f"change {self.name}", made.id, **call.body.model_dump(mode="json"))
        return Reply(made, revision=made.revision)

    async def drop(self, call: Call) -> Reply:
        """DELETE."""
        await self.delete(call.connection, call.asked)
        await call.note(f"delete {self.name}", call.asked.id)
        return Reply()

    def routes(self) -> tuple[Route, ...]:
        """List and show for viewers, the rest for operators."""
        path, one, viewer, operator = (
            f"{API}/{self.path}",
            f"{API}/{self.path}/{{id}}",
            Access.VIEWER,
            Access.OPERATOR,
        )
        name, model, taken = self.name, self.model, self.id_type
        return (
            Route(
                "GET",
                path,
                viewer,
                f"List every {name}",
                self.page,
                answer=model,
                paged=str,
                filters=self.filters,
            ),
            Route(
                "POST",
                path,
                operator,
                f"Make a {name}",
                self.make,
                body=self.wanted,
                answer=model,
                status=201,
            ),
            Route("GET", one, viewer, f"Show a {name}", self.show, answer=model, id_type=taken),
            Route(
                "PUT",
                one,
                operator,
                f"Change a {name}",
                self.change,
                body=self.wanted,
                answer=model,
                id_type=taken,
                conditional=True,
            ),
            Route(
                "DELETE",
                one,
                operator,
                f"Delete a {name}",
                self.drop,
                status=204,
                id_type=taken,
                conditional=True,
            ),
        )
