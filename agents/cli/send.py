"""``replicator send``: sends one disk to a master target."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agents.cli.output import document, in_units, say
from replicator.errors import UsageError

if TYPE_CHECKING:
    from agents.process_server import SendConfig, SendReport

TOKEN_FILE_MAX_BYTES = 4096


def send(  # noqa: PLR0913, PLR0917 - one parameter an option
    # readable=False, here and elsewhere: whether a path can be used is ours to say, with cause and fix.
    source: Annotated[Path, typer.Argument(readable=False, help="Raw disk file or block device; only read.")],
    to: Annotated[str, typer.Option(help="HOST:PORT of the master target.")],
    token: Annotated[
        str | None,
        typer.Option(help="Join token, for the first time. Other users of this machine can see it."),
    ] = None,
    token_file: Annotated[
        str | None, typer.Option(help="File that holds the join token; - reads it from stdin.")
    ] = None,
    disk: Annotated[str | None, typer.Option(help="Name at the target. Default: the source's name.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(readable=False, help="Where identities are kept. Default: $XDG_STATE_HOME/replicator"),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, max=16, help="Parallel TLS streams.")] = 4,
    compression: Annotated[
        str, typer.Option(help="auto (follows the bottleneck), off, or a zstd level of 1 to 19.")
    ] = "auto",
    quiesced: Annotated[
        bool, typer.Option("--quiesced", help="Nobody writes to this block device: trust that it stays.")
    ] = False,
    give_up_after: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds of trying in vain. Default: for ever, once the target was met."),
    ] = None,
    watch: Annotated[
        float | None, typer.Option(min=0, help="Send again and again, so many seconds after each end.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, or one a cycle.")] = False,
) -> None:
    """Send a disk to a master target: whole at first, the difference after. Safe to interrupt and repeat."""
    from agents.lifecycle import run
    from agents.process_server import SendConfig
    from replicator.transport.dial import Address

    config = SendConfig(
        source=source,
        to=Address.parse(to),
        token=_token(token, token_file),
        disk=disk if disk is not None else source.name.partition(".")[0] or source.name,
        state=state or default_state(),
        streams=streams,
        level=_level(compression),
        quiesced=quiesced,
        give_up_after_s=give_up_after,
    )
    run(_cycles(config, watch, as_json))


async def _cycles(config: SendConfig, watch_s: float | None, as_json: bool) -> None:
    """Send once, or again and again."""
    import asyncio

    from agents.cli.progress import shown
    from agents.process_server import send as send_disk
    from replicator.clock import Clock
    from replicator.files import Files
    from replicator.sending import Progress

    while True:
        progress = Progress()
        report = await shown(send_disk(config, progress, Clock(), Files(), say), progress, config.disk)
        if as_json:
            document(asdict(report))
        else:
            say(_summary(config, report, progress.size))
        if report.fuzzy:
            say(f"warning: {config.source} may have changed while it was read: the copy is fuzzy")
        if watch_s is None:
            return
        try:
            await asyncio.sleep(watch_s)
        except asyncio.CancelledError:  # a signal, while nothing is under way: an end as good as any
            return


def default_state() -> Path:
    """``$XDG_STATE_HOME/replicator``, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "replicator"


def _level(text: str) -> int | None:
    """The fixed zstd level that ``--compression`` names; 0 is off, None is auto."""
    if text == "auto":
        return None
    if text == "off":
        return 0
    if re.fullmatch(r"[1-9]|1[0-9]", text):
        return int(text)
    raise UsageError(
        "usage.compression",
        f"--compression {text!r} is not known",
        cause="it is neither auto, off, nor a level of 1 to 19",
        fix="leave it out: auto suits most lines",
    )


def _token(token: str | None, token_file: str | None) -> str | None:
    """The token's text, from wherever it was given."""
    if token is not None and token_file is not None:
        raise UsageError(
            "usage.token",
            "--token and --token-file were both given",
            cause="one of them is enough",
            fix="leave --token out",
        )
    if token_file is None:
        return token
    try:
        if token_file == "-":  # noqa: S105 - the name of stdin
            return sys.stdin.read(TOKEN_FILE_MAX_BYTES).strip()
        with open(token_file, encoding="utf-8") as file:
            return file.read(TOKEN_FILE_MAX_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "usage.token",
            f"the token file {token_file} cannot be read: {error}",
            cause="a wrong path, or it is no text",
            fix="give the file that holds the token",
        ) from None


def _summary(config: SendConfig, report: SendReport, size: int) -> str:
    rate = size / report.seconds if report.seconds else 0
    return (
        f"{config.source} is {report.vmdk} at {config.to} ({report.mode}): "
        f"read {in_units(report.read_bytes)}, "
        f"zero {in_units(report.zero_bytes)}, matched {in_units(report.matched_bytes)}, "
        f"sent {in_units(report.sent_bytes)} in {report.seconds:.1f} s ({in_units(rate)}/s)"
    )
