"""The control server's database: SQLite in a file, or PostgreSQL by URL, migrated when it is opened.

SQLite has one connection that writes and checkpoints; a few others only read. Releases before 3.51.3 can
damage a WAL that two connections checkpoint. Every transaction goes through ``read`` or ``write``, where what
a driver raises becomes an error of ours. Not here: the tables (``tables.py``) and what stands in them
(``repositories/``).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, TimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from replicator.errors import ReplicatorError, SpaceError, StateError, UsageError
from replicator.files import Files

READERS: Final = 4
CONNECTIONS: Final = 8  # to PostgreSQL, of one control server
WAIT_S: Final = 10  # for a connection of the pool, and for another process that writes
_MIGRATIONS: Final = Path(__file__).with_name("migrations")
_MIGRATION_LOCK: Final = (
    0x7265706C  # an advisory lock of PostgreSQL's: of two servers that start, one migrates
)


class Database:
    """An open database. Make one with ``open_database``; ``close`` it."""

    def __init__(
        self, writer: AsyncEngine, reader: AsyncEngine, where: str, let_go: Callable[[], None]
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._let_go = let_go
        self.where = where

    @property
    def is_shared(self) -> bool:
        """Whether another control server may write to it, too."""
        return self._writer.dialect.name == "postgresql"

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that changes nothing and sees one state of the database.

        Raises:
            StateError: ``store.unavailable``. SpaceError: ``store.full``.
        """
        with _told(self.where):
            async with self._reader.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction: durable at the end of the block, gone without a trace if the block raises.

        Raises:
            UsageError: ``store.conflict``: another one has just taken a name, or refers to what is deleted.
            StateError: ``store.unavailable``. SpaceError: ``store.full``.
        """
        with _told(self.where):
            async with self._writer.begin() as connection:
                yield connection

    async def close(self) -> None:
        """Close all connections; that which writes last, as it alone may checkpoint. Idempotent."""
        if self._reader is not self._writer:
            await self._reader.dispose()
        await self._writer.dispose()
        let_go, self._let_go = self._let_go, lambda: None
        let_go()


async def open_database(
    url: str, files: Files, password: str | None = None, *, target: str | None = "head"
) -> Database:
    """Open the database at ``sqlite:///PATH`` or ``postgresql://USER@HOST/NAME`` and migrate it.

    Args:
        url: without a password: it may stand in a log.
        files: the I/O seam, to make SQLite's file private.
        password: for PostgreSQL, from a credential.
        target: the revision to migrate to. None: the database has to be there, nothing is changed, and
            ``write`` is not for it: another process may be the one that writes.

    Raises:
        UsageError: ``store.url_wrong``.
        StateError: ``store.unavailable``, ``store.newer``, ``store.in_use``. SpaceError: ``store.full``.
    """
    parsed = _parse(url)
    where = parsed.render_as_string()
    if parsed.get_backend_name() == "sqlite":
        let_go = _hold(files, parsed, where) if target is not None else lambda: None
        database = _open_sqlite(parsed, where, let_go)
    else:
        # Repeatable read: what a list or a backup reads in several steps is one state.
        options: dict[str, Any] = {"pool_size": CONNECTIONS, "pool_timeout": WAIT_S, "pool_pre_ping": True}
        driver = parsed.set(drivername="postgresql+psycopg", password=password)
        engine = create_async_engine(driver, **options)
        reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        database = Database(engine, reader, where, lambda: None)
    try:
        if target is not None:
            async with database.write() as connection:
                await migrate(connection, where, target)
    except BaseException:
        await database.close()
        raise
    return database


async def migrate(connection: AsyncConnection, where: str, target: str = "head") -> None:
    """Take the steps from the present revision to ``target``, all or none.

    Raises:
        StateError: ``store.newer``: the database is of a release that knows more steps.
    """
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    await connection.run_sync(_migrate, where, target)


async def revision_of(connection: AsyncConnection) -> str:
    """The revision of the schema, as the modules in ``migrations/versions`` name it; empty: no tables yet."""
    return await connection.run_sync(_revision_of) or ""


def is_known(revision: str) -> bool:
    """Whether this release has a step of this name."""
    return revision in {step.revision for step in _steps().walk_revisions()}


def _steps() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


def _revision_of(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _migrate(connection: Connection, where: str, target: str) -> None:
    script = _steps()
    present = _revision_of(connection)
    if present is not None and not is_known(present):
        raise StateError(
            "store.newer",
            f"{where} has the schema {present}, which this release does not know",
            cause="a newer release has used this database",
            fix="install that release again, or restore a backup that this one made",
        )

    def steps(revision: Any, _: Any) -> Any:
        return script._upgrade_revs(target, revision)

    with EnvironmentContext(Config(), script, fn=steps) as environment:
        # Both databases take changes of the schema back with their transaction.
        environment.configure(connection=connection, transactional_ddl=True, transaction_per_migration=False)
        environment.run_migrations()


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise _url_wrong("it cannot be read") from None
    if parsed.drivername not in ("sqlite", "postgresql"):
        raise _url_wrong(f"{parsed.drivername} is not known")
    if parsed.password is not None:
        raise _url_wrong("it holds a password")
    if not parsed.database or parsed.database == ":memory:":
        raise _url_wrong("it names no database")
    return parsed


def _url_wrong(reason: str) -> UsageError:
    return UsageError(
        "store.url_wrong",
        f"the database's URL cannot be used: {reason}",
        cause="a slip in the configuration",
        fix="give sqlite:////absolute/path or postgresql://USER@HOST/NAME, and the password as a credential",
    )


def _hold(files: Files, url: URL, where: str) -> Callable[[], None]:
    """Be the one process that writes to a file of SQLite, made private if it is missing; what lets go of it.

    An existing file is not opened here: closing a descriptor of it would drop the locks SQLite has on it.
    """
    path = url.database or ""
    with _told(where):
        lock = files.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileExistsError):
                files.close(files.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except BlockingIOError:
            files.close(lock)
            raise _in_use(where) from None
        except OSError:
            files.close(lock)
            raise
    return partial(files.close, lock)


def _in_use(where: str) -> StateError:
    return StateError(
        "store.in_use",
        f"the database {where} is another process's",
        cause="a control server runs with it already: only one may write to a file of SQLite",
        fix="stop that one first; for several control servers use PostgreSQL",
    )


def _open_sqlite(url: URL, where: str, let_go: Callable[[], None]) -> Database:
    # Never made by the driver: its mode would be everybody's.
    there = f"file:{quote(url.database or '')}?mode=rw"
    driver = url.set(drivername="sqlite+aiosqlite", database=there, query={"uri": "true"})
    pragmas = ("foreign_keys = ON", f"busy_timeout = {WAIT_S * 1000}")
    writer = create_async_engine(driver, pool_size=1, max_overflow=0, pool_timeout=WAIT_S)
    _prepare(writer, "BEGIN IMMEDIATE", (*pragmas, "journal_mode = WAL", "synchronous = FULL"))
    reader = create_async_engine(driver, pool_size=READERS, max_overflow=0, pool_timeout=WAIT_S)
    _prepare(reader, "BEGIN", (*pragmas, "query_only = ON", "wal_autocheckpoint = 0"))
    return Database(writer, reader, where, let_go)


def _prepare(engine: AsyncEngine, begin: str, pragmas: tuple[str, ...]) -> None:
    """Have connections set up so, and transactions begun so: the driver's own BEGIN leaves DDL out."""

    @event.listens_for(engine.sync_engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except ReplicatorError:
        raise
    except IntegrityError as error:
        raise _conflict() from error
    except (DBAPIError, TimeoutError, OSError) as error:
        raise _unavailable(where, error) from error


def _conflict() -> UsageError:
    return UsageError(
        "store.conflict",
        "the change does not fit what another request has just changed",
        cause="the same name was taken, or what it refers to was deleted, at the same moment",
        fix="read the things in question again, then decide anew",
    )


def _unavailable(where: str, error: DBAPIError | TimeoutError | OSError) -> StateError | SpaceError:
    reason = str(error.orig if isinstance(error, DBAPIError) else error).strip().partition("\n")[0]
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or getattr(getattr(error, "orig", None), "sqlite_errorname", "") == "SQLITE_FULL":
        return SpaceError(
            "store.full",
            f"the database {where} has no space left: {reason}",
            cause="the file system is full",
            fix="free some space there: the control server goes on by itself, nothing is lost",
        )
    return StateError(
        "store.unavailable",
        f"the database {where} cannot be used: {reason}",
        cause="it is down or not reachable, its file has another owner, or its disk is failing",
        fix="see that the database runs and that this user may use it; replication goes on meanwhile",
    )
