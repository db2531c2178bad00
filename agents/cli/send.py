"""``replicator send``: sends a disk, or a group of disks, to a master target."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agents.cli.output import document, in_units, say
from protocol.constants import NAME_MAX_BYTES
from replicator.errors import UsageError

if TYPE_CHECKING:
    from agents.send_config import DiskConfig, SendConfig, SendReport

TOKEN_FILE_MAX_BYTES = 4096

# readable=False, here and elsewhere: whether a path can be used is ours to say, with cause and fix.
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Raw disk file, block device, flat VMDK, azure://ACCOUNT/CONTAINER/BLOB or "
        "azure-disk://SUBSCRIPTION/GROUP/DISK; only read.",
    ),
]
ChangedExtents = Annotated[
    Path | None,
    typer.Option(readable=False, help="JSON list of what changed since the last epoch: only that is read."),
]
AzureCredentials = Annotated[
    Path | None,
    typer.Option(
        readable=False,
        help="File with a connection string or a SAS, read again before it ends. Default: the environment's.",
    ),
]


def send(  # noqa: PLR0913, PLR0917 - one parameter an option
    sources: Sources,
    to: Annotated[str, typer.Option(help="HOST:PORT of the master target.")],
    token: Annotated[
        str | None,
        typer.Option(help="Join token, for the first time. Other users of this machine can see it."),
    ] = None,
    token_file: Annotated[
        str | None, typer.Option(help="File that holds the join token; - reads it from stdin.")
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(help="Name at the target, once for each source. Default: the source's name."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Name of the group; needed for several sources. Default: the disk's name."),
    ] = None,
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
    changed_extents: ChangedExtents = None,
    azure_credentials: AzureCredentials = None,
    azure_diff: Annotated[
        bool, typer.Option(help="Believe Azure on what changed, or compare its lists of pages.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, or one a cycle.")] = False,
) -> None:
    """Send disks to a master target: whole at first, the difference after. Safe to interrupt and repeat.

    Several disks make a group: they are sent together, and have their recovery points in common.
    """
    from agents.lifecycle import run
    from agents.send_config import AzureConfig, SendConfig
    from replicator.transport.dial import Address

    disks = _disks(sources, disk or [])
    config = SendConfig(
        group=_group(group, disks),
        disks=disks,
        to=Address.parse(to),
        token=_token(token, token_file),
        state=state or default_state(),
        streams=streams,
        level=_level(compression),
        quiesced=quiesced,
        give_up_after_s=give_up_after,
        changed_extents=changed_extents,
        azure=AzureConfig(azure_credentials, azure_diff),
    )
    run(_cycles(config, watch, as_json))


async def _cycles(config: SendConfig, watch_s: float | None, as_json: bool) -> None:
    """Send once, or again and again."""
    import asyncio

    from agents.cli.progress import shown
    from agents.process_server import send as send_disks
    from replicator.clock import Clock
    from replicator.files import Files
    from replicator.sending import Progress

    while True:
        progress = Progress()
        report = await shown(send_disks(config, progress, Clock(), Files(), say), progress, config.group)
        if as_json:
            document(asdict(report))
        else:
            say(_summary(config, report, progress.size))
        if report.fuzzy:
            say(f"warning: {config.sources} may have changed while it was read: the copy is fuzzy")
        if watch_s is None:
            return
        try:
            await asyncio.sleep(watch_s)
        except asyncio.CancelledError:  # a signal, while nothing is under way: an end as good as any
            return


def default_state() -> Path:
    """``$XDG_STATE_HOME/replicator``, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "replicator"


def _disks(sources: Sequence[str], names: Sequence[str]) -> tuple[DiskConfig, ...]:
    """The disks to send, each with its name at the target."""
    from agents.send_config import DiskConfig, in_azure

    if names and len(names) != len(sources):
        raise UsageError(
            "usage.disks",
            f"--disk was given {len(names)} times for {len(sources)} sources",
            cause="--disk names the sources in their order, each of them or none",
            fix="give --disk once for each source, or leave it out",
        )
    disks = tuple(
        DiskConfig(name, source) for name, source in zip(names or map(_name, sources), sources, strict=True)
    )
    twice = [name for name, times in Counter(disk.name for disk in disks).items() if times > 1]
    if twice:
        raise UsageError(
            "usage.disks",
            f"two disks are named {twice[0]!r}",
            cause="their files have the same name, or --disk was given the same one twice",
            fix="give each disk its own name with --disk",
        )
    if len({in_azure(source) for source in sources}) > 1:
        raise UsageError(
            "usage.sources",
            "some of the sources are in Azure and some are here",
            cause="a group is read at one moment, by snapshots in Azure or from what is at rest here",
            fix="send them as two groups",
        )
    files = Counter(_identity(source) for source in sources)
    same = next((source for source in sources if files[_identity(source)] > 1), None)
    if same is not None:
        raise UsageError(
            "usage.sources",
            f"{same} was given twice",
            cause="two of the sources are the same file or device, perhaps by different names",
            fix="give each source once",
        )
    return disks


def _name(source: str) -> str:
    """The name that a disk has if none is given: its file's, without what follows the first dot."""
    name = Path(source).name
    return name.partition(".")[0] or name


def _identity(source: str) -> tuple[int, int] | str:
    """What two names of one disk have in common."""
    try:
        found = os.stat(source)
    except (OSError, ValueError):  # what is wrong with it is told when it is opened
        return source
    return (found.st_rdev, -1) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def _group(name: str | None, disks: Sequence[DiskConfig]) -> str:
    if name is None and len(disks) == 1:
        return disks[0].name
    if name is None:
        raise UsageError(
            "usage.group",
            f"{len(disks)} sources were given and no group",
            cause="disks that are sent together make a group, which needs a name",
            fix="name it with --group, or send the disks one by one",
        )
    if not name or not name.isprintable() or len(name.encode()) > NAME_MAX_BYTES:
        raise UsageError(
            "usage.group",
            f"{name[:60]!r} cannot be a group's name",
            cause=f"it has 1 to {NAME_MAX_BYTES} printable bytes",
            fix="give another name with --group",
        )
    return name


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
    copies = ", ".join(f"{disk}.vmdk" for disk in report.disks)
    return (
        f"{config.sources} is {copies} at {config.to} ({report.mode}): "
        f"read {in_units(report.read_bytes)}, "
        f"zero {in_units(report.zero_bytes)}, matched {in_units(report.matched_bytes)}, "
        f"sent {in_units(report.sent_bytes)} in {report.seconds:.1f} s ({in_units(rate)}/s)"
    )
