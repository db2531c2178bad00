"""The first schema: who is trusted, what is replicated, what happened."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make every table."""
    _trust()
    _settings()
    _what_is_replicated()
    _what_happened()
    for name, value, hashed in (
        ("audit", 0, "0" * 64),
        ("event", 0, ""),
        ("generation", 0, ""),
        ("settings", 1, ""),
    ):
        op.execute(f"INSERT INTO counters VALUES ('{name}', {value}, '{hashed}')")  # noqa: S608 - literals


def _text(name: str, *, optional: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=optional)


def _number(name: str, *, optional: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), autoincrement=False, nullable=optional)


def _create(table: str, *columns: sa.Column[str] | sa.Column[int], key: str, unique: str = "") -> None:
    """``key``: columns of the primary key. What names end in ``:TABLE`` refers to its id."""
    constraints: list[sa.Constraint] = [sa.PrimaryKeyConstraint(*key.split(), name=f"pk_{table}")]
    if unique:
        constraints.append(sa.UniqueConstraint(unique, name=f"uq_{table}_{unique}"))
    for column in columns:
        name, _, target = column.name.partition(":")
        if target:
            column.name = column.key = name
            constraints.append(sa.ForeignKeyConstraint([name], [f"{target}.id"], name=f"fk_{table}_{name}"))
    op.create_table(table, *columns, *constraints)


def _trust() -> None:
    _create(
        "servers",
        *map(_text, ("id", "kind", "name", "address", "version")),
        _number("joined_ns"),
        _number("revoked_ns", optional=True),
        _number("revision"),
        key="id",
    )
    tokens = ("id", "kind", "note", "secret_sha256", "spki_sha256", "server_id", "created_by")
    _create("join_tokens", *map(_text, tokens), _number("created_ns"), _number("expires_ns"), key="id")
    _create(
        "operators",
        *map(_text, ("id", "name", "role", "secret_sha256")),
        _number("created_ns"),
        _number("expires_ns", optional=True),
        _number("revoked_ns", optional=True),
        _number("revision"),
        key="id",
        unique="name",
    )


def _settings() -> None:
    _create(
        "policies",
        *map(_text, ("id", "name")),
        *map(_number, ("interval_s", "keep_s", "log_bytes")),
        _text("consistency"),
        _number("rate_bytes_s", optional=True),
        _number("revision"),
        key="id",
        unique="name",
    )
    connections = ("id", "name", "kind", "address", "account", "secret")
    _create("connections", *map(_text, connections), _number("revision"), key="id", unique="name")
    _create("settings", _text("name"), _text("value"), key="name")
    _create("counters", _text("name"), _number("value"), _text("sha256"), key="name")


def _what_is_replicated() -> None:
    links = ("policy:policies", "process_server:servers", "master_target:servers")
    _create(
        "groups",
        *map(_text, ("id", "name")),
        *(_text(name, optional=True) for name in links),
        sa.Column("paused", sa.Boolean(), nullable=False),
        _number("generation"),
        _number("revision"),
        key="id",
        unique="name",
    )
    _create(
        "machines",
        *map(_text, ("id", "name", "reference")),
        _text("connection:connections", optional=True),
        _text("replication_group:groups", optional=True),
        _number("revision"),
        key="id",
        unique="name",
    )
    for table, name in (
        *(("groups", link.partition(":")[0]) for link in links),
        ("machines", "connection"),
        ("machines", "replication_group"),
    ):
        op.create_index(f"ix_{table}_{name}", table, [name])
    _create(
        "disks",
        *map(_text, ("machine:machines", "name")),
        _number("position"),
        _text("source"),
        _number("size_bytes"),
        key="machine name",
    )
    _create(
        "assignments",
        _text("group_id:groups"),
        _number("generation"),
        *map(_text, ("process_server", "master_target")),
        *map(_number, ("issued_ns", "expires_ns")),
        _text("signed"),
        key="group_id generation",
    )


def _what_happened() -> None:
    _create(
        "recovery_points",
        *map(_text, ("master_target", "group_name", "epoch")),
        *map(_number, ("time_ns", "sealed_ns")),
        _text("consistency"),
        _number("skew_ms"),
        _text("disks"),
        key="master_target group_name epoch",
    )
    op.create_index("ix_recovery_points_group_name", "recovery_points", ["group_name", "sealed_ns"])
    events = ("severity", "code", "thing", "message", "cause", "fix")
    _create("events", _number("seq"), _number("time_ns"), *map(_text, events), key="seq")
    audit = ("actor", "action", "thing", "details", "previous_sha256", "sha256")
    _create("audit", _number("seq"), _number("time_ns"), *map(_text, audit), key="seq")
    _create(
        "idempotency",
        *map(_text, ("actor", "key", "request_sha256")),
        _number("status"),
        *map(_text, ("headers", "body")),
        _number("created_ns"),
        key="actor key",
    )
    op.create_index("ix_idempotency_created_ns", "idempotency", ["created_ns"])
