"""`replicator control`: the command line around backup, restore and the check of the audit log."""

import json
import subprocess
from pathlib import Path
from typing import Any

from sqlalchemy import text

from replicator.control import audit
from replicator.control.audit import Deed
from replicator.control.database import Database, open_database
from replicator.files import Files
from tests.agents.harness import BOUND_S, COMMAND
from tests.replicator.trust import Installation, SetClock, mode_of


def control(*arguments: object) -> tuple[int, Any]:
    """Exit status, and the JSON document."""
    command = [*COMMAND, "control", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND_S)
    return done.returncode, json.loads(done.stdout)


async def test_a_running_database_is_backed_up_restored_elsewhere_and_found_whole(
    database: Database, url: str, tmp_path: Path
) -> None:
    async with database.write() as connection:
        for number in range(3):
            await audit.append(connection, Deed("op", "do", str(number), {}), number)
    state = tmp_path / "authority"
    Installation(state, SetClock())
    backup, other, new_state = tmp_path / "b", f"sqlite:///{tmp_path / 'new.sqlite'}", tmp_path / "new"
    status, made = control("backup", backup, "--database", url, "--state", state)
    assert (status, made["authority"], made["bytes"]) == (0, True, backup.stat().st_size)
    status, restored = control("restore", backup, "--database", other, "--state", new_state)
    assert (status, restored) == (0, {"rows": made["rows"], "authority": True, "audit_whole": True})
    kept = new_state / "authority.json"
    assert (kept.read_bytes(), mode_of(kept)) == ((state / "authority.json").read_bytes(), 0o600)
    status, found = control("audit", "--database", other)
    assert (status, found["whole"], found["entries"]) == (0, True, 4)
    status, refusal = control("restore", backup, "--database", other)
    assert (status, refusal["error"]["code"]) == (2, "backup.not_empty")
    status, refusal = control("restore", backup, "--database", other, "--state", state)
    assert (status, refusal["error"]["code"]) == (2, "backup.authority_there")
    async with database.write() as connection:  # it was in use all the time, and still is
        await audit.append(connection, Deed("op", "do", "after", {}), 9)


async def test_a_broken_audit_log_fails_the_command(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.sqlite'}"
    database = await open_database(url, Files())
    async with database.write() as connection:
        await audit.append(connection, Deed("op", "do", "it", {}), 1)
        await connection.execute(text("DROP TRIGGER audit_no_UPDATE"))
        await connection.execute(text("UPDATE audit SET actor = 'another'"))
    await database.close()
    status, found = control("audit", "--database", url)
    assert (status, found["whole"], found["broken_at"]) == (1, False, 1)


def test_what_is_not_there_is_told_and_not_made(tmp_path: Path) -> None:
    missing = tmp_path / "missing.sqlite"
    status, refusal = control("audit", "--database", f"sqlite:///{missing}")
    assert (status, refusal["error"]["code"]) == (1, "store.unavailable")
    assert not missing.exists()
    (tmp_path / "a.sqlite").touch()
    url = f"sqlite:///{tmp_path / 'a.sqlite'}"
    status, refusal = control("backup", tmp_path / "b", "--database", url, "--state", tmp_path / "empty")
    assert (status, refusal["error"]["code"]) == (2, "backup.no_authority")
    status, refusal = control("audit", "--database", url, "--password-file", tmp_path / "none")
    assert (status, refusal["error"]["code"]) == (2, "store.password_file")
