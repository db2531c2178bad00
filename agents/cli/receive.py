"""``replicator receive``: a master target without a control server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agents.cli.output import document, say

if TYPE_CHECKING:
    from agents.master_target import MasterTargetConfig

HOUR_S = 3600
HOURS_MAX = 10 * 366 * 24
POINTS_MAX = 10_000  # a record of so many of a dozen disks each is still read and written in one piece


def receive(
    directory: Annotated[Path, typer.Option(readable=False, help="Where the VMDKs are written. Must exist.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes any free one.")] = "0.0.0.0:9443",
    retention: Annotated[
        Path | None,
        typer.Option(
            readable=False, help="Where authority, tokens and catalogue lie. Default: DIRECTORY/.replicator"
        ),
    ] = None,
    journal_size: Annotated[
        str | None,
        typer.Option(
            help="Of a group's log, at least 256M; what is beyond is applied before the seal. Default: 16G"
        ),
    ] = None,
    retention_hours: Annotated[
        int,
        typer.Option(min=0, max=HOURS_MAX, help="How long recovery points are kept; the newest always is."),
    ] = 24,
    retention_points: Annotated[
        int | None,
        typer.Option(min=1, max=POINTS_MAX, help="How many are kept at most. Default: any number."),
    ] = None,
    thick: Annotated[bool, typer.Option("--thick", help="Allocate new VMDKs whole.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Receive disks into VMDKs. Prints a join token, then runs until SIGTERM or Ctrl-C.

    The token lets one process server join within an hour; every start prints a fresh one. Process servers
    that have joined need none.
    """
    from agents.cli.sizes import parse_size
    from agents.lifecycle import run
    from agents.master_target import MasterTargetConfig
    from replicator.errors import Interrupted
    from replicator.groups import LOG_BYTES_MIN, Limits
    from replicator.log.points import Retention
    from replicator.transport.dial import Address

    limits = Limits(retention=Retention(retention_hours * HOUR_S, retention_points))
    if journal_size is not None:
        limits = replace(limits, log_bytes=parse_size("--journal-size", journal_size, LOG_BYTES_MIN))
    config = MasterTargetConfig(
        directory=directory,
        retention=retention or directory / ".replicator",
        listen=Address.parse(listen),
        limits=limits,
        thin=not thick,
    )
    try:
        run(_receive(config, as_json))
    except Interrupted as stopped:
        say(f"{stopped.message}: everything that was acknowledged is durable")


async def _receive(config: MasterTargetConfig, as_json: bool) -> None:
    import asyncio

    from agents.master_target import MasterTarget
    from replicator.clock import Clock
    from replicator.files import Files
    from replicator.workers import Workers

    with Workers() as workers:
        target = MasterTarget(config, workers, Clock(), Files())
        try:
            address, token = await target.start()
            if as_json:
                document({"listen": str(address), "token": token, "directory": str(config.directory)})
            else:
                say(f"receiving on {address} into {config.directory}")
                say(f"join token (one process server, one hour): {token}")
            await asyncio.Event().wait()
        finally:
            await target.stop()
