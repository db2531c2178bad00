"""Backup and restore of the control server's database, while it runs; from either kind of database to either.

A backup is one file of JSON lines, compressed with zstd: a head (format, schema revision, time,
attachments), each row of each table, and an end with the number of rows and the SHA-256 of every line before
it. It is read in one transaction: one state. Attachments are the files that belong to it, such as
``authority.json``: the file is as secret as they are. It is restored into an empty database, all or nothing,
at the revision that it was made at; then the migrations go on from there.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import zstandard
from sqlalchemy import Connection, MetaData, Table, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.clock import Clock
from replicator.control import audit
from replicator.control.database import Database, is_known, open_database, revision_of
from replicator.control.models import AuditVerdict
from replicator.control.repositories.rows import to_text
from replicator.control.tables import counters
from replicator.errors import StateError, UsageError
from replicator.files import Files, read_small_file
from replicator.private_directory import PrivateDirectory, checked_record, decode_record, unusable
from replicator.workers import Workers

FILE_MAX_BYTES: Final = 1 << 30
GENERATIONS_AHEAD: Final = 1 << 20
_FORMAT: Final = "replicator control backup 1"
_HEAD: Final = {"format": str, "revision": str, "time_ns": int, "attachments": dict}
_END: Final = {"rows": int, "sha256": str}
_ROWS_A_STEP: Final = 1000
_OWN_ROWS: Final = frozenset({"alembic_version", "counters"})  # which an empty database has


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that was made. ``rows``: of all tables."""

    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored. ``audit``: whether the audit log in it is whole."""

    rows: int
    made_ns: int
    attachments: Mapping[str, bytes]
    audit: AuditVerdict


async def backup(
    database: Database,
    path: Path,
    *,
    files: Files,
    workers: Workers,
    clock: Clock,
    attachments: Mapping[str, bytes] | None = None,
) -> Made:
    """Write a backup to ``path``, durably, replacing what is there; others go on meanwhile.

    Raises:
        StateError: ``store.unavailable``; ``state.unusable``: the file. SpaceError: ``state.full``.
    """
    writing = _Writing()
    async with database.read() as connection:
        head = {
            "format": _FORMAT,
            "revision": await revision_of(connection),
            "time_ns": clock.now_ns(),
            "attachments": {
                name: base64.b64encode(content).decode() for name, content in (attachments or {}).items()
            },
        }
        writing.add([to_text(head)])
        for table in await _tables(connection):
            rows = await connection.stream(select(table).order_by(*table.primary_key.columns))
            async for part in rows.mappings().partitions(_ROWS_A_STEP):
                lines = [to_text([table.name, dict(row)]) for row in part]
                await workers.run(writing.add, lines)
    content = await workers.run(writing.end)
    await workers.run(_store, files, path, content)
    return Made(writing.rows, len(content))


async def restore(
    url: str, path: Path, *, files: Files, workers: Workers, clock: Clock, password: str | None = None
) -> Restored:
    """Fill the empty (or not yet existing) database at ``url`` from a backup.

    Raises:
        UsageError: ``backup.not_empty``; ``store.url_wrong``.
        StateError: ``backup.damaged``, ``backup.newer``; as ``open_database``. Nothing is changed then.
    """
    content = await workers.run(_load, files, path)
    head = await workers.run(_checked, content, path)
    if not is_known(head["revision"]):
        raise _newer(path, head["revision"])
    database = await open_database(url, files, password, target=head["revision"])
    try:
        async with database.write() as connection:
            rows = await _fill(connection, database, content, head["revision"])
    finally:
        await database.close()
    database = await open_database(url, files, password)
    try:
        async with database.write() as connection:
            verdict = await audit.verify(connection)
            details = {"rows": rows, "made_ns": head["time_ns"]}
            await audit.append(
                connection, audit.Deed("restore", "restore", "database", details), clock.now_ns()
            )
            # Assignments that were given after the backup must not outrank those that come now.
            ahead = update(counters).where(counters.c.name == "generation")
            await connection.execute(ahead.values(value=counters.c.value + GENERATIONS_AHEAD))
    finally:
        await database.close()
    attachments = {name: base64.b64decode(text) for name, text in head["attachments"].items()}
    return Restored(rows, head["time_ns"], attachments, verdict)


# ------------------------------------------------------------------ tables


async def _tables(connection: AsyncConnection) -> Sequence[Table]:
    """All tables but Alembic's, those first that others refer to, as they are in the database."""

    def reflected(sync: Connection) -> Sequence[Table]:
        metadata = MetaData()
        metadata.reflect(sync)
        return [table for table in metadata.sorted_tables if table.name != "alembic_version"]

    return await connection.run_sync(reflected)


async def _fill(connection: AsyncConnection, database: Database, content: bytes, revision: str) -> int:
    tables = {table.name: table for table in await _tables(connection)}
    present = await revision_of(connection)
    used = [
        name
        for name, table in tables.items()
        if name not in _OWN_ROWS and await connection.scalar(select(func.count()).select_from(table))
    ]
    if used or present != revision:
        raise _not_empty(database.where, used)
    await connection.execute(tables["counters"].delete())
    filled = 0
    for name, lines in groupby(_rows(content), key=lambda pair: pair[0]):
        rows = [row for _, row in lines]
        for start in range(0, len(rows), _ROWS_A_STEP):
            await connection.execute(insert(tables[name]), rows[start : start + _ROWS_A_STEP])
        filled += len(rows)
    return filled


# ------------------------------------------------------------------ the file


class _Writing:
    """Lines on their way into a backup."""

    def __init__(self) -> None:
        self.rows = -1  # the head is no row
        self._hash = sha256()
        self._compressor = zstandard.ZstdCompressor(level=9).compressobj()
        self._parts: list[bytes] = []

    def add(self, lines: Sequence[str]) -> None:
        text = "".join(f"{line}\n" for line in lines).encode()
        self._hash.update(text)
        self.rows += len(lines)
        self._parts.append(self._compressor.compress(text))

    def end(self) -> bytes:
        end = to_text({"rows": self.rows, "sha256": self._hash.hexdigest()})
        self._parts += [self._compressor.compress(f"{end}\n".encode()), self._compressor.flush()]
        return b"".join(self._parts)


def _store(files: Files, path: Path, content: bytes) -> None:
    with PrivateDirectory(files, path.parent).held() as held:
        held.replace(path.name, content)


def _load(files: Files, path: Path) -> bytes:
    with PrivateDirectory(files, path.parent).held() as held:
        try:
            return read_small_file(files, held.fd, path.name, FILE_MAX_BYTES)
        except OSError as error:
            raise unusable(path, "read", error) from error


def _lines(content: bytes) -> Iterator[bytes]:
    with zstandard.ZstdDecompressor().stream_reader(content) as reader:
        rest = b""
        while piece := reader.read(1 << 20):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    if rest:
        raise ValueError("it ends within a line")


def _rows(content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """(table, row) of a backup that was found to be whole."""
    for number, line in enumerate(_lines(content)):
        if number and line.startswith(b"["):
            name, row = json.loads(line)
            yield name, row


def _checked(content: bytes, path: Path) -> dict[str, Any]:
    """The head of a backup, all of which was read and found whole."""
    try:
        return _check(content)
    except (ValueError, zstandard.ZstdError) as error:
        raise _damaged(path, error) from None


def _check(content: bytes) -> dict[str, Any]:
    head: dict[str, Any] | None = None
    digest, count, before = sha256(), 0, b""
    for line in _lines(content):
        if head is None:
            head = decode_record(line, _HEAD)
        if before:
            digest.update(before + b"\n")
            count += 1
        before = line
    if head is None or head["format"] != _FORMAT:
        raise ValueError("it is no backup of this product")
    end = checked_record(json.loads(before), _END)
    if (end["rows"], end["sha256"]) != (count - 1, digest.hexdigest()):
        raise ValueError("its checksum is wrong")
    return head


def _damaged(path: Path, error: Exception) -> StateError:
    return StateError(
        "backup.damaged",
        f"{path} cannot be restored: {error}",
        cause="it was cut short or changed, or it is another file",
        fix="take another backup, or copy this one again from where it was made",
    )


def _newer(path: Path, revision: str) -> StateError:
    return StateError(
        "backup.newer",
        f"{path} has the schema {revision}, which this release does not know",
        cause="a newer release has made it",
        fix="restore it with that release",
    )


def _not_empty(where: str, used: Sequence[str]) -> UsageError:
    return UsageError(
        "backup.not_empty",
        f"the database {where} is not empty: {', '.join(used) or 'it has a newer schema'}",
        cause="a control server has used it; a restore never overwrites",
        fix="give a new database: a path where no file is, or a PostgreSQL database just created",
    )
