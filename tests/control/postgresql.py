"""A PostgreSQL server of the tests' own: in a temporary folder, by its own user, with a socket there."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

DATABASES = 4  # more than a test has in use; each is 300 files, so they are used again


class Cluster:
    """A running server. `new` empties a database and gives its URL."""

    def __init__(self, folder: Path, as_user: dict[str, Any]) -> None:
        self.folder = folder
        self._as_user = as_user
        self._given = 0

    def new(self) -> str:
        name = f"control_{self._given % DATABASES}"
        if self._given < DATABASES:
            self._execute("postgres", sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        else:
            self._execute(name, sql.SQL("DROP SCHEMA public CASCADE"))
            self._execute(name, sql.SQL("CREATE SCHEMA public"))
        self._given += 1
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def _execute(self, database: str, statement: sql.SQL | sql.Composed) -> None:
        where: dict[str, Any] = {"host": str(self.folder), "user": "postgres", "dbname": database}
        with psycopg.connect(**where, autocommit=True) as connection:
            connection.execute(statement)

    def control(self, *arguments: str) -> None:
        command = [
            "pg_ctl",
            "-D",
            str(self.folder / "data"),
            "-l",
            str(self.folder / "log"),
            "-s",
            *arguments,
        ]
        subprocess.run(command, check=True, cwd=self.folder, **self._as_user)

    def start(self) -> None:
        # No sync: what is tested here is what stands in the tables, not that PostgreSQL keeps it.
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off -c max_connections=60"
        self.control("-w", "-o", options, "start")

    def stop(self) -> None:
        self.control("-m", "immediate", "-w", "stop")


@contextmanager
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:  # which PostgreSQL does not run as
        shutil.chown(folder, "postgres", "postgres")
        as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    running = Cluster(folder, as_user)
    try:
        command = ["initdb", "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8"]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **as_user)
        running.start()
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder)
