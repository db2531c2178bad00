"""The route table: every path of the API, whom it is for, what it takes and what it gives.

The server's routes, the OpenAPI document and the tests of authorisation are made from ``ROUTES``. Handlers
check nothing that the table says. Not here: how a request becomes a call (``reading.py``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias

from pydantic import TypeAdapter

from replicator.certificates import ServerKind
from replicator.control import audit, models, raw
from replicator.control.auth import Access
from replicator.control.crud import API, Aggregate
from replicator.control.metrics import CONTENT_TYPE as METRICS_TYPE
from replicator.control.models import MadeOperator, MadeToken, Severity
from replicator.control.repositories import (
    events,
    groups,
    join_tokens,
    machines,
    operators,
    points,
    servers,
    settings,
)
from replicator.control.repositories.events import Happening
from replicator.control.repositories.named import CONNECTIONS, POLICIES
from replicator.control.route import Call, Handle, Reply, Route

Page: TypeAlias = Callable[..., Awaitable[tuple[Sequence[Any], str | int | None]]]

# ------------------------------------------------------------------ lists


def _list(page: Page, by: str = "") -> Handle:
    """A handler that answers with a part of a list; ``by``: the query parameter that narrows it."""

    async def handle(call: Call) -> Reply:
        narrowed = (call.wanted.filters.get(by),) if by else ()
        found, following = await page(call.connection, call.wanted.window, *narrowed)
        return Reply(items=found, following=following)

    return handle


# ------------------------------------------------------------------ who is trusted


async def _show_server(call: Call) -> Reply:
    found = await servers.get(call.connection, call.asked.id)
    return Reply(found, revision=found.revision)


async def _change_server(call: Call) -> Reply:
    made = await servers.replace(call.connection, call.asked, call.body)
    await call.note("change server", made.id, **call.body.model_dump())
    return Reply(made, revision=made.revision)


async def _revoke_server(call: Call) -> Reply:
    revoked, newly = await servers.revoke(call.connection, call.asked, call.now_ns)
    if newly:
        message = f"the identity {revoked.id} is revoked"
        await call.note("revoke server", revoked.id)
        await call.tell(Happening(Severity.WARNING, "identity.revoked", revoked.id, message))
    return Reply(revoked, revision=revoked.revision)


async def _make_token(call: Call) -> Reply:
    shown, token = await join_tokens.create(
        call.connection, call.body, call.parts.pin, call.caller.actor, call.now_ns
    )
    await call.note("create join token", shown.id, kind=shown.kind, server=shown.server_id, note=shown.note)
    fields = shown.model_dump()
    return Reply(MadeToken(**fields, token=None), told=MadeToken(**fields, token=token.to_text()))


async def _withdraw_token(call: Call) -> Reply:
    await join_tokens.withdraw(call.connection, call.asked.id)
    await call.note("withdraw join token", call.asked.id)
    return Reply()


async def _show_operator(call: Call) -> Reply:
    found = await operators.get(call.connection, call.asked.id)
    return Reply(found, revision=found.revision)


async def _make_operator(call: Call) -> Reply:
    made, token = await operators.create(call.connection, call.body, call.now_ns)
    await call.note("create operator", made.id, name=made.name, role=made.role)
    fields = made.model_dump()
    return Reply(
        MadeOperator(**fields, token=None),
        told=MadeOperator(**fields, token=token),
        revision=made.revision,
        location=f"{API}/operators/{made.id}",
    )


async def _revoke_operator(call: Call) -> Reply:
    revoked = await operators.revoke(call.connection, call.asked, call.now_ns)
    await call.note("revoke operator", revoked.id, name=revoked.name)
    return Reply(revoked, revision=revoked.revision)


# ------------------------------------------------------------------ the server itself


async def _show_settings(call: Call) -> Reply:
    found = await settings.get(call.connection)
    return Reply(found, revision=found.revision)


async def _change_settings(call: Call) -> Reply:
    made = await settings.replace(call.connection, call.asked, call.body)
    await call.note("change settings", "settings", **call.body.model_dump())
    return Reply(made, revision=made.revision)


async def _verify_audit(call: Call) -> Reply:
    return Reply(await audit.verify(call.connection))


# ------------------------------------------------------------------ the table

_AGGREGATES: Final = (
    Aggregate(
        "policy", "policies", models.PolicyWanted, models.Policy, models.PolicyId, _list(POLICIES.some),
        POLICIES.get, POLICIES.create, POLICIES.replace, POLICIES.delete,
    ),
    Aggregate(
        "connection", "connections", models.ConnectionWanted, models.Connection, models.ConnectionId,
        _list(CONNECTIONS.some), CONNECTIONS.get, CONNECTIONS.create, CONNECTIONS.replace, CONNECTIONS.delete,
    ),
    Aggregate(
        "group", "groups", models.GroupWanted, models.Group, models.GroupId, _list(groups.page),
        groups.get, groups.create, groups.replace, groups.delete_group,
    ),
    Aggregate(
        "machine", "machines", models.MachineWanted, models.Machine, models.MachineId,
        _list(machines.page, "group"), machines.get, machines.create, machines.replace,
        machines.delete_machine,
        filters={"group": TypeAdapter(models.GroupId)},
    ),
)  # fmt: skip

_TRUST: Final = (
    Route("GET", f"{API}/servers", Access.VIEWER, "List every server",
          _list(servers.page, "kind"), answer=models.Server, paged=str,
          filters={"kind": TypeAdapter(ServerKind)}),
    Route("GET", f"{API}/servers/{{id}}", Access.VIEWER, "Show a server", _show_server, answer=models.Server,
          id_type=models.ServerId),
    Route("PUT", f"{API}/servers/{{id}}", Access.OPERATOR, "Name a server, and say where it is reached",
          _change_server, body=models.ServerWanted, answer=models.Server, id_type=models.ServerId,
          conditional=True),
    Route("POST", f"{API}/servers/{{id}}/revoke", Access.ADMIN, "Take its identity from a server, for good",
          _revoke_server, answer=models.Server, id_type=models.ServerId, conditional=True),
    Route("GET", f"{API}/tokens", Access.OPERATOR, "List the join tokens", _list(join_tokens.page),
          answer=models.JoinToken, paged=str),
    Route("POST", f"{API}/tokens", Access.ADMIN, "Make a join token for one server", _make_token,
          body=models.TokenWanted, answer=MadeToken, status=201),
    Route("DELETE", f"{API}/tokens/{{id}}", Access.ADMIN, "Withdraw a join token", _withdraw_token,
          status=204, id_type=models.TokenId),
    Route("GET", f"{API}/operators", Access.ADMIN, "List every operator", _list(operators.page),
          answer=models.Operator, paged=str),
    Route("POST", f"{API}/operators", Access.ADMIN, "Make an operator", _make_operator,
          body=models.OperatorWanted, answer=MadeOperator, status=201),
    Route("GET", f"{API}/operators/{{id}}", Access.ADMIN, "Show an operator", _show_operator,
          answer=models.Operator, id_type=models.OperatorId),
    Route("POST", f"{API}/operators/{{id}}/revoke", Access.ADMIN, "Refuse an operator's token from now on",
          _revoke_operator, answer=models.Operator, id_type=models.OperatorId, conditional=True),
)  # fmt: skip

_WATCH: Final = (
    Route("GET", f"{API}/recovery-points", Access.VIEWER, "List the recovery points that were announced",
          _list(points.page, "group"), answer=models.RecoveryPoint, paged=str,
          filters={"group": TypeAdapter(models.Line)}),
    Route("GET", f"{API}/events", Access.VIEWER, "List what happened, oldest first", _list(events.page),
          answer=models.Event, paged=int),
    Route("GET", f"{API}/events/stream", Access.VIEWER, "Follow what happens, as server-sent events",
          raw=raw.stream, media_type="text/event-stream"),
    Route("GET", f"{API}/audit", Access.ADMIN, "List the audit log, oldest first", _list(audit.page),
          answer=models.AuditEntry, paged=int),
    Route("GET", f"{API}/audit/verdict", Access.ADMIN, "Check the chain of the audit log", _verify_audit,
          answer=models.AuditVerdict),
    Route("GET", f"{API}/settings", Access.VIEWER, "Show the settings", _show_settings,
          answer=models.Settings),
    Route("PUT", f"{API}/settings", Access.ADMIN, "Change the settings", _change_settings,
          body=models.SettingsWanted, answer=models.Settings, conditional=True),
    Route("GET", f"{API}/openapi.json", Access.IDENTIFIED, "This document", raw=raw.openapi),
    Route("GET", "/healthz", Access.PUBLIC, "Whether the process answers", raw=raw.health,
          media_type="text/plain"),
    Route("GET", "/readyz", Access.IDENTIFIED, "Whether it can do its work", raw=raw.readiness,
          answer=models.Readiness),
    Route("GET", "/metrics", Access.IDENTIFIED, "Metrics for Prometheus", raw=raw.metrics,
          media_type=METRICS_TYPE),
)  # fmt: skip

ROUTES: Final = (*_TRUST, *(route for aggregate in _AGGREGATES for route in aggregate.routes()), *_WATCH)
