"""``replicator control``: what is done to the control server's database from outside."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from agents.cli.output import DONE, FAILED, document, in_units, say

T = TypeVar("T")

app = typer.Typer(help="The control server's database.", no_args_is_help=True, rich_markup_mode=None)

DatabaseUrl = Annotated[
    str,
    typer.Option("--database", help="sqlite:////PATH or postgresql://USER@HOST/NAME, without a password."),
]
PasswordFile = Annotated[
    Path | None, typer.Option("--password-file", readable=False, help="File with PostgreSQL's password.")
]
State = Annotated[
    Path | None,
    typer.Option("--state", readable=False, help="The control server's state directory, with its authority."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
AUTHORITY = "authority.json"
PASSWORD_MAX_BYTES = 4096


@app.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(readable=False, help="The backup; replaced if it is there.")],
    database: DatabaseUrl,
    password_file: PasswordFile = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Back up the database, while the control server runs, and the authority that lies in --state.

    The file is as secret as the authority in it.
    """
    from replicator.clock import Clock
    from replicator.control.backup import backup as make
    from replicator.control.database import open_database
    from replicator.files import Files
    from replicator.workers import Workers

    attachments = {AUTHORITY: _authority(state)} if state is not None else {}

    async def work(workers: Workers) -> Any:
        opened = await open_database(database, Files(), _password(password_file), target=None)
        try:
            return await make(
                opened, file, files=Files(), workers=workers, clock=Clock(), attachments=attachments
            )
        finally:
            await opened.close()

    made = _run(work)
    if as_json:
        document({"file": str(file), "rows": made.rows, "bytes": made.bytes, "authority": bool(attachments)})
    else:
        say(
            f"{made.rows} rows in {in_units(made.bytes)}" + ("" if attachments else "; without the authority")
        )


@app.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(readable=False, help="The backup.")],
    database: DatabaseUrl,
    password_file: PasswordFile = None,
    state: State = None,
    as_json: AsJson = False,
) -> int:
    """Restore a backup into an empty database, and its authority into --state. Nothing is overwritten."""
    from replicator.clock import Clock
    from replicator.control.backup import restore as fill
    from replicator.files import Files
    from replicator.private_directory import PrivateDirectory
    from replicator.workers import Workers

    if state is not None and (state / AUTHORITY).exists():
        raise _has_authority(state)

    async def work(workers: Workers) -> Any:
        parts: Any = {"files": Files(), "workers": workers, "clock": Clock()}
        return await fill(database, file, password=_password(password_file), **parts)

    restored = _run(work)
    authority = restored.attachments.get(AUTHORITY)
    if state is not None and authority is not None:
        with PrivateDirectory(Files(), state).held() as held:
            held.replace(AUTHORITY, authority)
    whole = restored.audit.whole
    if as_json:
        told = {"rows": restored.rows, "authority": authority is not None, "audit_whole": whole}
        document(told)
    else:
        say(f"{restored.rows} rows" + ("" if whole else "; the audit log in it is NOT whole"))
    return DONE if whole else FAILED


@app.command("audit")
def audit(database: DatabaseUrl, password_file: PasswordFile = None, as_json: AsJson = False) -> int:
    """Check the chain of the audit log; the last hash is to be compared with one noted elsewhere."""
    from replicator.control.audit import verify
    from replicator.control.database import open_database
    from replicator.files import Files
    from replicator.workers import Workers

    async def work(_: Workers) -> Any:
        opened = await open_database(database, Files(), _password(password_file), target=None)
        try:
            async with opened.read() as connection:
                return await verify(connection)
        finally:
            await opened.close()

    found = _run(work)
    if as_json:
        document(found.model_dump())
    elif found.whole:
        say(f"whole: {found.entries} entries, the last has the hash {found.sha256}")
    else:
        say(f"NOT whole: entry {found.broken_at} was changed, cut out or cut off")
    return DONE if found.whole else FAILED


def _run(work: Any) -> Any:
    import uvloop

    from replicator.workers import Workers

    with Workers() as workers:
        made: Coroutine[Any, Any, Any] = work(workers)
        return uvloop.run(made)


def _password(path: Path | None) -> str | None:
    from agents.text_file import read_text
    from replicator.errors import UsageError
    from replicator.files import Files

    if path is None:
        return None
    try:
        return read_text(Files(), path, PASSWORD_MAX_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "store.password_file",
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}",
            cause="there is no such file, or it is another user's",
            fix="give a file of mode 0600 that this user owns, with the password and nothing else",
        ) from None


def _authority(state: Path) -> bytes:
    from replicator.errors import UsageError
    from replicator.files import Files
    from replicator.private_directory import PrivateDirectory

    with PrivateDirectory(Files(), state).held() as held:
        found = held.read(AUTHORITY)
    if found is None:
        raise UsageError(
            "backup.no_authority",
            f"{state} holds no authority",
            cause="it is not the control server's state directory",
            fix="name the directory that its configuration names, or leave --state out and keep the "
            "authority elsewhere: without it every server has to join anew",
        )
    return found


def _has_authority(state: Path) -> Exception:
    from replicator.errors import UsageError

    return UsageError(
        "backup.authority_there",
        f"{state} holds an authority already",
        cause="a control server has run with this directory; a restore never overwrites",
        fix="move it away, or name a new directory",
    )
