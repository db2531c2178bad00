"""A backup of a running database, restored to either kind: everything is back, or nothing was touched."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from sqlalchemy import select

from replicator.control import audit, backup
from replicator.control.audit import Deed
from replicator.control.database import Database, open_database, revision_of
from replicator.control.models import GroupWanted, OperatorWanted, PolicyWanted, Role
from replicator.control.repositories import groups, operators, points, servers
from replicator.control.repositories.named import POLICIES
from replicator.control.repositories.points import Announced
from replicator.control.repositories.rows import Window
from replicator.control.tables import metadata
from replicator.files import Files
from replicator.workers import Workers
from tests.control.conftest import KINDS
from tests.control.postgresql import Cluster
from tests.replicator.trust import SetClock, mode_of, refused


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers() as threads:
        yield threads


@pytest.fixture(params=KINDS)
def other_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of another empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'other.sqlite'}"
    running: Cluster = request.getfixturevalue("postgresql")
    return running.new()


async def fill(database: Database, clock: SetClock) -> str:
    """Something in many tables; an operator's token."""
    async with database.write() as connection:
        for server in ("ps-" + "a" * 32, "mt-" + "b" * 32):
            await servers.joined(connection, server, 1)
        policy = await POLICIES.create(connection, PolicyWanted(name="daily", rate_bytes_s=None))
        wanted = GroupWanted(
            name="web",
            policy=policy.id,
            process_server="ps-" + "a" * 32,
            master_target="mt-" + "b" * 32,
            paused=True,
        )
        group = await groups.create(connection, wanted)
        await groups.assign(connection, group, (1, 2), lambda made: f"signed {made.generation}")
        point = Announced("0" * 32, 1, 2**62, "crash", 0, ("a", "\u00fc\n"))
        await points.announced(connection, "mt-" + "b" * 32, "web", [point])
        _, token = await operators.create(
            connection, OperatorWanted(name="ann", role=Role.ADMIN), clock.now_ns()
        )
        for number in range(1200):
            await audit.append(connection, Deed("op", "do", str(number), {}), number)
    return token


async def content(database: Database) -> dict[str, Any]:
    async with database.read() as connection:
        return {
            name: (await connection.execute(select(table).order_by(*table.primary_key))).all()
            for name, table in metadata.tables.items()
        }


async def test_what_was_backed_up_is_restored_on_either_kind(
    database: Database, other_url: str, tmp_path: Path, workers: Workers, clock: SetClock
) -> None:
    token = await fill(database, clock)
    before = await content(database)
    path = tmp_path / "backups" / "control.backup"
    parts: Any = {"files": Files(), "workers": workers, "clock": clock}
    made = await backup.backup(database, path, attachments={"authority.json": b"\x00secret"}, **parts)
    assert made.rows == sum(map(len, before.values()))
    assert (path.stat().st_size, mode_of(path)) == (made.bytes, 0o600)
    restored = await backup.restore(other_url, path, **parts)
    assert restored.attachments == {"authority.json": b"\x00secret"}
    assert (restored.rows, restored.audit.whole, restored.audit.entries) == (made.rows, True, 1200)
    other = await open_database(other_url, Files())
    try:
        after = await content(other)
        assert after.pop("audit")[:-1] == before.pop("audit")  # the restore itself is noted
        assert {**after, "counters": None} == {**before, "counters": None}
        async with other.write() as connection:
            assert await operators.bearer(connection, token, clock.now_ns()) is not None
            assert (await audit.verify(connection)).whole
            group, _ = await groups.page(connection, Window())
            again = await groups.assign(connection, group[0], (3, 4), lambda _: "signed")
        # Whatever was assigned after the backup was made ranks below what is assigned now.
        assert again.generation > group[0].generation + 1_000_000
    finally:
        await other.close()


async def test_a_backup_is_one_state_while_others_write(
    database: Database, other_url: str, tmp_path: Path, workers: Workers, clock: SetClock
) -> None:
    """Each change makes a policy and a group that refers to it: a torn backup has one without the other."""
    stop = asyncio.Event()
    made = 0

    async def keep_writing() -> None:
        nonlocal made
        while not stop.is_set():
            async with database.write() as connection:
                policy = await POLICIES.create(connection, PolicyWanted(name=f"p-{made}"))
                await groups.create(connection, GroupWanted(name=f"g-{made}", policy=policy.id))
            made += 1

    writing = asyncio.create_task(keep_writing())
    parts: Any = {"files": Files(), "workers": workers, "clock": clock}
    for number in range(5):
        await backup.backup(database, tmp_path / f"{number}", **parts)
    stop.set()
    await writing
    assert made > 5
    await backup.restore(other_url, tmp_path / "4", **parts)
    other = await open_database(other_url, Files())
    found = await content(other)
    await other.close()
    assert {row.policy for row in found["groups"]} == {row.id for row in found["policies"]}
    assert found["groups"]


async def test_a_used_database_is_not_overwritten(
    database: Database, url: str, tmp_path: Path, workers: Workers, clock: SetClock
) -> None:
    await fill(database, clock)
    before = await content(database)
    parts: Any = {"files": Files(), "workers": workers, "clock": clock}
    await backup.backup(database, tmp_path / "b", **parts)
    await database.close()
    with refused("backup.not_empty"):
        await backup.restore(url, tmp_path / "b", **parts)
    again = await open_database(url, Files())
    assert await content(again) == before
    await again.close()


async def test_a_damaged_backup_restores_nothing(tmp_path: Path, workers: Workers, clock: SetClock) -> None:
    parts: Any = {"files": Files(), "workers": workers, "clock": clock}
    database = await open_database(f"sqlite:///{tmp_path / 'a.sqlite'}", Files())
    await fill(database, clock)
    path, wrong = tmp_path / "b", tmp_path / "wrong"
    await backup.backup(database, path, **parts)
    await database.close()
    whole = path.read_bytes()
    plain = zstandard.ZstdDecompressor().stream_reader(whole).read()
    lines = plain.splitlines(keepends=True)

    def packed(*chosen: bytes) -> bytes:
        return zstandard.ZstdCompressor().compress(b"".join(chosen))

    damages = [
        b"",
        whole[: len(whole) // 2],
        b"not a backup",
        packed(b"{}\n"),
        packed(*lines[:-1]),
        packed(*lines[:5], *lines[6:]),
        packed(*lines[:5], lines[6], lines[5], *lines[7:]),
        packed(plain.replace(b'"crash"', b'"clash"')),
        packed(lines[-1]),
        packed(plain.replace(b"control backup 1", b"control backup 9")),
    ]
    for number, damage in enumerate(damages):
        wrong.write_bytes(damage)
        with refused("backup.damaged"):
            await backup.restore(f"sqlite:///{tmp_path / 'c.sqlite'}", wrong, **parts)
        assert not (tmp_path / "c.sqlite").exists(), number
    with refused("state.unusable"):
        await backup.restore(f"sqlite:///{tmp_path / 'c.sqlite'}", tmp_path / "missing", **parts)


async def test_a_backup_of_a_newer_release_is_refused(
    tmp_path: Path, workers: Workers, clock: SetClock
) -> None:
    parts: Any = {"files": Files(), "workers": workers, "clock": clock}
    database = await open_database(f"sqlite:///{tmp_path / 'a.sqlite'}", Files())
    async with database.write() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    await backup.backup(database, tmp_path / "b", **parts)
    await database.close()
    with refused("backup.newer"):
        await backup.restore(f"sqlite:///{tmp_path / 'c.sqlite'}", tmp_path / "b", **parts)
    assert not (tmp_path / "c.sqlite").exists()


async def test_a_backup_of_an_older_schema_is_brought_up(
    other_url: str, tmp_path: Path, workers: Workers, clock: SetClock
) -> None:
    parts: Any = {"files": Files(), "workers": workers, "clock": clock}
    old = await open_database(f"sqlite:///{tmp_path / 'old.sqlite'}", Files(), target="0001")
    await fill(old, clock)
    await backup.backup(old, tmp_path / "b", **parts)
    await old.close()
    restored = await backup.restore(other_url, tmp_path / "b", **parts)
    assert restored.audit.whole
    new = await open_database(other_url, Files())
    async with new.read() as connection:
        assert await revision_of(connection) == "0002"
    await new.close()
