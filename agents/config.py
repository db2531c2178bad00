"""The daemons' configuration: a TOML file becomes a frozen value, or every mistake in it is told at once.

Unknown keys are mistakes; so is what only the start would find out, as far as the file alone shows it. Read
once, and again for a reload. Samples lie in ``systemd/samples``. Not here: how a file is read
(``toml_table.py``), and what a daemon does with it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agents.cli.sizes import parse_size
from agents.master_target import MasterTargetConfig
from agents.send_config import AzureConfig, in_azure
from agents.toml_table import Table, load
from replicator.desired import (
    GROUPS_MAX,
    KEEP_COUNT_MAX,
    KEEP_MAX_S,
    LEVEL_MAX,
    Disk,
    Group,
    Peer,
    group_mistakes,
)
from replicator.errors import UsageError
from replicator.files import Files
from replicator.groups import LOG_BYTES_MIN, Limits
from replicator.log.points import Retention
from replicator.transport.dial import Address

LISTEN = "0.0.0.0:9443"
DRAIN_S = 30.0
DRAIN_MAX_S = 3600.0
AT_ONCE = 4
AT_ONCE_MAX = 64
INTERVAL_S = 300.0
LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How a daemon logs. ``format``: ``text``, or ``json`` for one JSON document a line."""

    format: str = "text"
    level: str = "info"


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """What all daemons are told.

    Attributes:
        listen: address of its port; port 0 takes any free one.
        drain_s: what is under way may go on for so long after SIGTERM.
        log: how it logs.
    """

    listen: Address
    drain_s: float
    log: LogConfig


@dataclass(frozen=True, slots=True)
class TargetDaemonConfig:
    """A master target. ``token_file``: where each start and reload leaves a fresh join token, if at all."""

    daemon: DaemonConfig
    target: MasterTargetConfig
    token_file: Path | None


@dataclass(frozen=True, slots=True)
class ProcessDaemonConfig:
    """A process server.

    Attributes:
        state: directory of identities, digest maps and the kept document.
        at_once: groups in the middle of a cycle at the same time; the others wait their turn.
        tokens: files with join tokens, by the address of their master target.
        groups: what to replicate; None: what the kept document says.
        azure: for sources there.
    """

    daemon: DaemonConfig
    state: Path
    at_once: int
    tokens: Mapping[str, Path]
    groups: tuple[Group, ...] | None
    azure: AzureConfig


def load_target(files: Files, path: Path) -> TargetDaemonConfig:
    """The configuration of a master target. Blocks.

    Raises:
        UsageError: ``config.unreadable``, ``config.invalid`` with every mistake.
    """
    return load(files, path, _target)


def load_process_server(files: Files, path: Path) -> ProcessDaemonConfig:
    """The configuration of a process server. Blocks. Raises as ``load_target``."""
    return load(files, path, _process_server)


def needs_restart(path: Path, keys: str) -> UsageError:
    """What a reload meets that it cannot do."""
    return UsageError(
        "config.needs_restart",
        f"the configuration {path} asks for what only a start can do",
        cause=f"one of these has changed: {keys}",
        fix="restart the daemon: what is under way goes on after it",
    )


# ------------------------------------------------------------------ the sections


def _target(top: Table) -> TargetDaemonConfig:
    log_bytes, keep_s, keep_count = _limits(top.table("limits"))
    target = MasterTargetConfig(
        directory=top.path("directory"),
        retention=top.path("retention"),
        listen=top.address("listen", LISTEN),
        limits=Limits(log_bytes, Retention(keep_s, keep_count)),
        thin=top.take("thin", bool, True),
    )
    token_file = top.path("token_file") if "token_file" in top.found else None
    return TargetDaemonConfig(_daemon(top), target, token_file)


def _limits(limits: Table) -> tuple[int, float, int | None]:
    default = Limits()
    size = limits.take("journal_size", str, "")
    log_bytes = default.log_bytes
    if size:
        try:
            log_bytes = parse_size("journal_size", size, LOG_BYTES_MIN)
        except UsageError as error:
            limits.mistake("journal_size", f"{error.cause}: {error.fix}")
    keep_s = limits.number("keep_s", float(default.retention.keep_s), 0, KEEP_MAX_S)
    keep_count = (
        int(limits.number("keep_count", 0, 1, KEEP_COUNT_MAX)) if "keep_count" in limits.found else None
    )
    limits.end()
    return log_bytes, keep_s, keep_count


def _process_server(top: Table) -> ProcessDaemonConfig:
    azure = top.table("azure")
    credentials = _secret(azure, "credentials") if "credentials" in azure.found else None
    config = ProcessDaemonConfig(
        daemon=_daemon(top),
        state=top.path("state"),
        at_once=int(top.number("at_once", AT_ONCE, 1, AT_ONCE_MAX)),
        tokens=_tokens(top),
        groups=_groups(top) if "groups" in top.found else None,
        azure=AzureConfig(credentials, azure.take("trust_diff", bool, True)),
    )
    azure.end()
    return config


def _daemon(top: Table) -> DaemonConfig:
    log = top.table("log")
    daemon = DaemonConfig(
        listen=top.address("listen", LISTEN),
        drain_s=top.number("drain_s", DRAIN_S, 0, DRAIN_MAX_S),
        log=LogConfig(log.choice("format", FORMATS, "text"), log.choice("level", LEVELS, "info")),
    )
    log.end()
    return daemon


def _tokens(top: Table) -> dict[str, Path]:
    found = {}
    for target in top.tables("targets"):
        address = str(target.address("address", None))
        if address in found:
            target.mistake("address", f"{address} stands there twice")
        found[address] = _secret(target, "token_file")
        target.end()
    return found


def _groups(top: Table) -> tuple[Group, ...]:
    groups = tuple(map(_group, top.tables("groups")))
    twice = [name for name, times in Counter(group.name for group in groups).items() if times > 1]
    if twice:
        top.mistake("groups", f"{twice[0]!r} is the name of two groups")
    disks = Counter((group.peer.address, disk.name) for group in groups for disk in group.disks)
    for (address, name), times in disks.items():
        if times > 1:
            top.mistake("groups", f"two disks are named {name!r} at {address}")
    if len(groups) > GROUPS_MAX:
        top.mistake("groups", f"{len(groups)} of them; at most {GROUPS_MAX} are served")
    return groups


def _group(table: Table) -> Group:
    before = len(table.mistakes)
    disks = []
    for disk in table.tables("disks"):
        disks.append(Disk(disk.take("name", str), disk.take("source", str)))
        disk.end()
    group = Group(
        name=table.take("name", str),
        disks=tuple(disks),
        peer=Peer(str(table.address("target", None))),
        interval_s=table.number("interval_s", INTERVAL_S),
        jitter_s=table.number("jitter_s", 0.0),
        streams=int(table.number("streams", 4)),
        level=_level(table),
        quiesced=table.take("quiesced", bool, False),
    )
    table.end()
    if len({in_azure(disk.source) for disk in disks}) > 1:
        table.mistake("disks", "some of the sources are in Azure and some are here: make them two groups")
    if len(table.mistakes) == before:  # else what is wrong has been told, with the words of the file
        for mistake in group_mistakes(group):
            key, _, what = mistake.partition(": ")
            table.mistake(key, what)
    return group


def _level(table: Table) -> int | None:
    text = table.take("compression", str, "auto")
    if text == "auto":
        return None
    if text == "off":
        return 0
    if text.isascii() and text.isdigit() and 1 <= int(text) <= LEVEL_MAX:
        return int(text)
    table.mistake("compression", f'{text!r} is neither "auto", "off", nor a level of "1" to "{LEVEL_MAX}"')
    return None


def _secret(table: Table, key: str) -> Path:
    """A file with a secret: a path, or the name of a systemd credential."""
    text = table.take(key, str)
    if "/" in text:
        return table.path(key)
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if text and folder is None:
        table.mistake(key, f"{text!r} has no slash, so it names a systemd credential, and there are none")
    return Path(folder or "/nowhere") / text
