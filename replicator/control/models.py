"""The shapes of what the API takes and gives: strict, without unknown fields, bounded in every length.

They are what the OpenAPI document shows, and what repositories return. Times are RFC 3339 in UTC, kept as ns;
names are the caller's, ids are ours. Not here: which route takes which (``routes.py``).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from replicator.certificates import ServerKind

COUNT_MAX = 2**53 - 1  # what JavaScript holds exactly
PAGE_MAX = 200
DISKS_MAX = 64

T = TypeVar("T")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Role(StrEnum):
    """What an operator may do; each may do what those before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


class Severity(StrEnum):
    """How much an event matters."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


def _moment(ns: Any) -> Any:
    return _EPOCH + timedelta(microseconds=ns // 1000) if isinstance(ns, int) else ns


Moment: TypeAlias = Annotated[datetime, BeforeValidator(_moment)]
Name: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Line: TypeAlias = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
Count: TypeAlias = Annotated[int, Field(ge=0, le=COUNT_MAX)]


def _id(prefix: str) -> StringConstraints:
    return StringConstraints(pattern=f"^{prefix}-[0-9a-f]{{32}}$")


ServerId: TypeAlias = Annotated[str, _id("(ps|mt|cs)")]
PolicyId: TypeAlias = Annotated[str, _id("pol")]
ConnectionId: TypeAlias = Annotated[str, _id("con")]
GroupId: TypeAlias = Annotated[str, _id("grp")]
MachineId: TypeAlias = Annotated[str, _id("vm")]
OperatorId: TypeAlias = Annotated[str, _id("op")]
TokenId: TypeAlias = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]


class Model(BaseModel):
    """What all shapes have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Page(Model, Generic[T]):
    """A part of a list. ``next``: the cursor of the following part; null at the end."""

    items: list[T]
    next: str | None


class Problem(Model):
    """Why a request was refused (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str
    cause: str
    fix: str


# ------------------------------------------------------------------ who is trusted


class ServerWanted(Model):
    """What an operator says of a server. ``address``: HOST:PORT where others reach it; empty: not known."""

    name: Line
    address: Line


class Server(ServerWanted):
    """A process server, master target or control server that has joined."""

    id: ServerId
    kind: ServerKind
    version: str
    joined: Moment
    revoked: Moment | None
    revision: int


class TokenWanted(Model):
    """A token for one server to join with."""

    kind: Literal[ServerKind.PROCESS_SERVER, ServerKind.MASTER_TARGET]
    note: Line = ""
    life_s: Annotated[int, Field(ge=60, le=7 * 86400)] = 3600


class JoinToken(Model):
    """A token that waits to be used, or was used and may be repeated by the same key until it expires."""

    id: TokenId
    kind: ServerKind
    note: str
    server_id: ServerId
    created_by: str
    created: Moment
    expires: Moment
    used: bool


class MadeToken(JoinToken):
    """A new one. ``token``: its text, told once: null when the answer is repeated by its idempotency key."""

    token: str | None


class OperatorWanted(Model):
    """Somebody, or something, that uses the API."""

    name: Name
    role: Role
    life_s: Annotated[int, Field(ge=60, le=3660 * 86400)] | None = None


class Operator(Model):
    """An operator. Its token is kept as a hash."""

    id: OperatorId
    name: Name
    role: Role
    created: Moment
    expires: Moment | None
    revoked: Moment | None
    revision: int


class MadeOperator(Operator):
    """A new one. ``token``: told once: null when the answer is repeated by its idempotency key."""

    token: str | None


# ------------------------------------------------------------------ what is replicated, and how


class PolicyWanted(Model):
    """How a group is replicated. ``rate_bytes_s``: the most that it may send; null: no limit."""

    name: Name
    interval_s: Annotated[int, Field(ge=10, le=7 * 86400)] = 300
    keep_s: Annotated[int, Field(ge=0, le=366 * 86400)] = 86400
    log_bytes: Annotated[int, Field(ge=1 << 30, le=COUNT_MAX)] = 16 << 30
    consistency: Literal["application", "crash", "per-disk"] = "crash"
    rate_bytes_s: Annotated[int, Field(ge=1, le=COUNT_MAX)] | None = None


class Policy(PolicyWanted):
    """A policy."""

    id: PolicyId
    revision: int


class ConnectionWanted(Model):
    """Where machines are found. ``secret``: the name of a credential on the servers that use it."""

    name: Name
    kind: Literal["azure", "vcenter", "esxi"]
    address: Line
    account: Line = ""
    secret: Name


class Connection(ConnectionWanted):
    """A connection."""

    id: ConnectionId
    revision: int


class Disk(Model):
    """A disk of a machine. ``source``: what its process server reads: a path, URL or Azure resource id."""

    name: Name
    source: Annotated[str, StringConstraints(min_length=1, max_length=2048, pattern=r"^[^\x00-\x1f\x7f]+$")]
    size_bytes: Count


class MachineWanted(Model):
    """A protected machine. ``reference``: what its connection knows it by; ``group``: null: in none."""

    name: Name
    reference: Line = ""
    connection: ConnectionId | None = None
    group: GroupId | None = None
    disks: Annotated[list[Disk], Field(max_length=DISKS_MAX)] = []


class Machine(MachineWanted):
    """A machine."""

    id: MachineId
    revision: int


class GroupWanted(Model):
    """Machines that are replicated together, by whom to whom."""

    name: Name
    policy: PolicyId | None = None
    process_server: ServerId | None = None
    master_target: ServerId | None = None
    paused: bool = False


class Group(GroupWanted):
    """A group. ``generation``: of its latest signed assignment; 0: it has none."""

    id: GroupId
    generation: int
    revision: int


class RecoveryPoint(Model):
    """A recovery point, as its master target announced it."""

    master_target: str
    group: str
    epoch: str
    time: Moment
    sealed: Moment
    consistency: str
    skew_ms: int
    disks: list[str]


# ------------------------------------------------------------------ what happened, and the server itself


class Event(Model):
    """Something that an operator may want to know."""

    seq: int
    time: Moment
    severity: Severity
    code: str
    thing: str
    message: str
    cause: str
    fix: str


class AuditEntry(Model):
    """Something that was done, chained to what was done before it."""

    seq: int
    time: Moment
    actor: str
    action: str
    thing: str
    details: dict[str, Any]
    previous_sha256: str
    sha256: str


class AuditVerdict(Model):
    """Whether the audit log is whole. ``broken_at``: the number of the first entry that does not fit."""

    entries: int
    sha256: str
    whole: bool
    broken_at: int | None


class SettingsWanted(Model):
    """What holds for the whole installation."""

    renewal_grace_days: Annotated[int, Field(ge=0, le=366)] = 30
    events_keep_days: Annotated[int, Field(ge=1, le=3660)] = 90


class Settings(SettingsWanted):
    """The settings."""

    revision: int


class Readiness(Model):
    """``ready``: the server can do its work; ``state``: in one word; ``problems``: what stands in its way."""

    ready: bool
    state: str
    problems: list[dict[str, str]]
