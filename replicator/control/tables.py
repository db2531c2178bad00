"""The tables of the control server, as data: one schema on SQLite and PostgreSQL.

Only types that both have alike: TEXT, BIGINT, BOOLEAN; times are ns since 1970 UTC; what has a shape of its
own is JSON in a TEXT. A ``revision`` counts the changes of a row: ETags are made of it. How a database gets
here from an older release: ``migrations/``. A test compares what they make with this module.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, MetaData, Table, Text

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)


def _text(name: str, *, key: bool = False, unique: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=key, nullable=False, unique=unique or None)


def _number(name: str, *, key: bool = False, optional: bool = False) -> Column[int]:
    return Column(name, BigInteger, primary_key=key, nullable=optional, autoincrement=False)


servers = Table(
    "servers",
    metadata,
    _text("id", key=True),
    _text("kind"),
    _text("name"),
    _text("address"),  # HOST:PORT where others reach it; empty: not known
    _text("version"),
    _number("joined_ns"),
    _number("revoked_ns", optional=True),
    _number("revision"),
)

join_tokens = Table(
    "join_tokens",
    metadata,
    _text("id", key=True),
    _text("kind"),
    _text("note"),
    _text("secret_sha256"),
    _text("spki_sha256"),  # empty: not bound to a key yet
    _text("server_id"),  # the identity that it gives
    _text("created_by"),
    _number("created_ns"),
    _number("expires_ns"),
)

operators = Table(
    "operators",
    metadata,
    _text("id", key=True),
    _text("name", unique=True),
    _text("role"),
    _text("secret_sha256"),
    _number("created_ns"),
    _number("expires_ns", optional=True),
    _number("revoked_ns", optional=True),
    _number("revision"),
)

policies = Table(
    "policies",
    metadata,
    _text("id", key=True),
    _text("name", unique=True),
    _number("interval_s"),
    _number("keep_s"),
    _number("log_bytes"),
    _text("consistency"),
    _number("rate_bytes_s", optional=True),
    _number("revision"),
)

connections = Table(
    "connections",
    metadata,
    _text("id", key=True),
    _text("name", unique=True),
    _text("kind"),
    _text("address"),
    _text("account"),
    _text("secret"),  # the name of a systemd credential; the secret itself is never here
    _number("revision"),
)

groups = Table(
    "groups",
    metadata,
    _text("id", key=True),
    _text("name", unique=True),
    Column("policy", Text, ForeignKey(policies.c.id), nullable=True, index=True),
    Column("process_server", Text, ForeignKey(servers.c.id), nullable=True, index=True),
    Column("master_target", Text, ForeignKey(servers.c.id), nullable=True, index=True),
    Column("paused", Boolean, nullable=False),
    _number("generation"),  # of its latest assignment; 0: none yet
    _number("revision"),
)

machines = Table(
    "machines",
    metadata,
    _text("id", key=True),
    _text("name", unique=True),
    _text("reference"),  # what the connection knows it by
    Column("connection", Text, ForeignKey(connections.c.id), nullable=True, index=True),
    Column("replication_group", Text, ForeignKey(groups.c.id), nullable=True, index=True),
    _number("revision"),
)

disks = Table(
    "disks",
    metadata,
    Column("machine", Text, ForeignKey(machines.c.id), primary_key=True, nullable=False),
    _text("name", key=True),
    _number("position"),
    _text("source"),
    _number("size_bytes"),
)

assignments = Table(
    "assignments",
    metadata,
    Column("group_id", Text, ForeignKey(groups.c.id), primary_key=True, nullable=False),
    _number("generation", key=True),
    _text("process_server"),
    _text("master_target"),
    _number("issued_ns"),
    _number("expires_ns"),
    _text("signed"),
)

# A mirror of what master targets announce. The group goes by its name, as on the wire: a master target may
# hold points of one that this database, restored from a backup, does not know any more.
recovery_points = Table(
    "recovery_points",
    metadata,
    _text("master_target", key=True),
    _text("group_name", key=True),
    _text("epoch", key=True),
    _number("time_ns"),
    _number("sealed_ns"),
    _text("consistency"),
    _number("skew_ms"),
    _text("disks"),
    Index("ix_recovery_points_group_name", "group_name", "sealed_ns"),
)

events = Table(
    "events",
    metadata,
    _number("seq", key=True),
    _number("time_ns"),
    _text("severity"),
    _text("code"),
    _text("thing"),
    _text("message"),
    _text("cause"),
    _text("fix"),
)

audit = Table(
    "audit",
    metadata,
    _number("seq", key=True),
    _number("time_ns"),
    _text("actor"),
    _text("action"),
    _text("thing"),
    _text("details"),
    _text("previous_sha256"),
    _text("sha256"),
)

settings = Table("settings", metadata, _text("name", key=True), _text("value"))

# One row a sequence: taking the next number locks the row until the end of the transaction, so that numbers
# become visible in their order, which a sequence of PostgreSQL's does not promise.
counters = Table("counters", metadata, _text("name", key=True), _number("value"), _text("sha256"))

idempotency = Table(
    "idempotency",
    metadata,
    _text("actor", key=True),
    _text("key", key=True),
    _text("request_sha256"),
    _number("status"),
    _text("headers"),
    _text("body"),
    _number("created_ns"),
    Index("ix_idempotency_created_ns", "created_ns"),
)
