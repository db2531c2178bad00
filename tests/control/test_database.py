"""The database: migrations end at the schema of tables.py, on both kinds; one writes, all tell our errors."""

import asyncio
import os
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import AsyncAdaptedQueuePool, Connection, insert, inspect, select, text

from replicator.control.database import Database, migrate, open_database, revision_of
from replicator.control.tables import metadata, settings
from replicator.files import Files
from tests.control.postgresql import Cluster
from tests.replicator.trust import mode_of, refused


def differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection), metadata))


def schema(connection: Connection) -> dict[str, object]:
    """Everything that a reader of the schema can tell, in words that both kinds have."""
    looking = inspect(connection)
    found: dict[str, object] = {}
    for table in sorted(looking.get_table_names()):
        columns = [
            (column["name"], str(column["type"]), column["nullable"]) for column in looking.get_columns(table)
        ]
        keys = sorted(
            (key["name"], key["constrained_columns"], key["referred_table"])
            for key in looking.get_foreign_keys(table)
        )
        unique = sorted((one["name"], one["column_names"]) for one in looking.get_unique_constraints(table))
        plain = sorted(
            (index["name"], index["column_names"])
            for index in looking.get_indexes(table)
            if not index["unique"]
        )
        primary = looking.get_pk_constraint(table)
        found[table] = (columns, keys, unique, plain, primary["name"], primary["constrained_columns"])
    return found


async def test_migrations_end_at_the_schema_of_the_code(database: Database) -> None:
    async with database.read() as connection:
        assert await connection.run_sync(differences) == []


async def test_every_step_from_the_first_revision_leads_to_the_schema(url: str) -> None:
    database = await open_database(url, Files())
    try:
        async with database.write() as connection:  # back to nothing, then step by step
            await connection.run_sync(metadata.drop_all)
            await connection.execute(text("DROP TABLE alembic_version"))
            if database.is_shared:
                await connection.execute(text("DROP FUNCTION audit_append_only CASCADE"))
        for revision in ("0001", "0002"):
            async with database.write() as connection:
                await migrate(connection, url, revision)
                assert await revision_of(connection) == revision
        async with database.read() as connection:
            assert await connection.run_sync(differences) == []
    finally:
        await database.close()


@pytest.mark.peer("postgres")
async def test_both_kinds_get_the_same_schema(tmp_path: Path, postgresql: Cluster) -> None:
    found = []
    for url in (f"sqlite:///{tmp_path / 'control.sqlite'}", postgresql.new()):
        database = await open_database(url, Files())
        try:
            async with database.read() as connection:
                found.append(await connection.run_sync(schema))
        finally:
            await database.close()
    assert len(found[0]) == len(metadata.tables) + 1
    # The one table that is Alembic's own has a type that it writes in another way.
    assert {**found[0], "alembic_version": None} == {**found[1], "alembic_version": None}


async def test_opening_again_changes_nothing_and_loses_nothing(url: str) -> None:
    present = []
    for _ in range(2):
        database = await open_database(url, Files())
        async with database.write() as connection:
            present = list((await connection.execute(select(settings))).all())
            if not present:
                await connection.execute(insert(settings).values(name="kept", value="1"))
        await database.close()
    assert present == [("kept", "1")]


@pytest.mark.peer("postgres")
async def test_two_that_open_postgresql_at_once_migrate_once(postgresql: Cluster) -> None:
    url = postgresql.new()
    opened = await asyncio.gather(*(open_database(url, Files()) for _ in range(3)))
    for database in opened:
        async with database.read() as connection:
            assert await revision_of(connection) == "0002"
    for database in opened:
        await database.close()


async def test_a_file_of_sqlite_has_one_owner_and_any_number_of_readers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a #b.sqlite'}"
    owner = await open_database(url, Files())
    with refused("store.in_use"):
        await open_database(url, Files())
    reader = await open_database(url, Files(), target=None)
    async with reader.read() as connection, owner.write() as writing:
        await writing.execute(insert(settings).values(name="new", value="1"))
        assert (await connection.execute(select(settings))).all() == []
    await reader.close()
    await owner.close()
    assert (tmp_path / "a #b.sqlite").exists()
    await (await open_database(url, Files())).close()


async def test_a_newer_database_is_refused_and_not_touched(url: str) -> None:
    database = await open_database(url, Files())
    async with database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await database.close()
    with refused("store.newer"):
        await open_database(url, Files())


async def test_a_block_that_raises_leaves_no_trace(database: Database) -> None:
    with pytest.raises(LookupError):
        async with database.write() as connection:
            await connection.execute(insert(settings).values(name="lost", value="1"))
            raise LookupError
    async with database.read() as connection:
        assert (await connection.execute(select(settings))).all() == []


async def test_what_reads_cannot_write(database: Database) -> None:
    with refused("store.unavailable"):
        async with database.read() as connection:
            await connection.execute(insert(settings).values(name="never", value="1"))


async def test_a_reader_sees_one_state_while_another_writes(database: Database) -> None:
    async with database.read() as reading:
        assert (await reading.execute(select(settings))).all() == []
        async with database.write() as writing:
            await writing.execute(insert(settings).values(name="new", value="1"))
        assert (await reading.execute(select(settings))).all() == []
    async with database.read() as reading:
        assert len((await reading.execute(select(settings))).all()) == 1


async def test_a_cancelled_writer_leaves_the_way_free(database: Database) -> None:
    inside = asyncio.Event()

    async def write() -> None:
        async with database.write() as connection:
            await connection.execute(insert(settings).values(name="cancelled", value="1"))
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(write())
    await inside.wait()
    task.cancel()
    await asyncio.wait([task])
    async with asyncio.timeout(5), database.write() as connection:
        assert (await connection.execute(select(settings))).all() == []


async def test_sqlite_is_private_and_keeps_a_wal(tmp_path: Path) -> None:
    path = tmp_path / "control.sqlite"
    old = os.umask(0)
    try:
        database = await open_database(f"sqlite:///{path}", Files())
    finally:
        os.umask(old)
    async with database.write() as connection:
        assert await connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert await connection.scalar(text("PRAGMA synchronous")) == 2
    assert {mode_of(file) for file in tmp_path.iterdir()} == {0o600}
    await database.close()


async def test_only_the_writer_of_sqlite_checkpoints(tmp_path: Path) -> None:
    database = await open_database(f"sqlite:///{tmp_path / 'control.sqlite'}", Files())
    async with database.read() as connection:
        assert await connection.scalar(text("PRAGMA wal_autocheckpoint")) == 0
        assert await connection.scalar(text("PRAGMA query_only")) == 1
    pool = database._writer.pool
    assert isinstance(pool, AsyncAdaptedQueuePool)
    assert (pool.size(), pool._max_overflow) == (1, 0)
    await database.close()


@pytest.mark.parametrize(
    "wrong",
    [
        "nonsense",
        "mysql://host/name",
        "postgresql://user:secret@host/name",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite+pysqlite:////tmp/x",
    ],
)
async def test_a_wrong_url_is_told_and_a_password_is_not_shown(wrong: str) -> None:
    with refused("store.url_wrong") as caught:
        await open_database(wrong, Files())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all", "postgresql://nobody@/none?host=/nowhere"])
async def test_a_database_that_cannot_be_reached_is_told(url: str) -> None:
    with refused("store.unavailable"):
        await open_database(url, Files())
