"""Replicator as a contender: ``replicator receive`` and ``replicator send``, as their users start them.

The two ends know each other before the clock starts, as those of the peers do by the certificates laid out
for them: a small disk was sent once, and every run begins with a copy of what that left. A resync begins with
a copy of what a send of the old disk left. Not here: what is measured of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import disk
from bench.contenders import Contender, Ends, Job
from bench.errors import BenchError
from bench.processes import START_S, Crowd, Member, RunFailed

COMMAND = (sys.executable, "-m", "agents.cli")
DISK, FIRST_DISK = "disk", "first"
FIRST_BYTES = 1024 * 1024
PREPARING_S = 600.0
_LIST_REFUSED = b"the list of changed extents is not used"
TARGET, STATE, TOKEN, _REPORT = "target", "state", "token", "send.json"


@dataclass(frozen=True, slots=True)
class Past:
    """What both ends hold before a run: a folder with the target's directory and the sender's state.

    Attributes:
        folder: to copy from. old: the disk is there already.
    """

    folder: Path
    old: bool


def replicator(
    name: str, past: Past, mode: str, *, compression: str = "auto", map_lost: bool = False
) -> Contender:
    """Replicator.

    Args:
        past: see there. mode: what ``send`` must say that it did. compression: see ``send --help``.
        map_lost: the sender remembers nothing of the disk, so that both ends have to compare.
    """
    return Contender(
        name,
        programs=(),
        serve=receive,
        send=partial(send, compression=compression),
        lay=partial(_lay, past=past, map_lost=map_lost),
        check=partial(_check, mode=mode),
        ours=True,
    )


def prepare(folder: Path, ends: Ends, old: Path | None) -> Past:
    """Have the two ends meet, and the old disk sent, if there is one. Takes as long as that takes.

    Raises:
        BenchError, RunFailed: it does not work.
    """
    job = new(folder, ends)
    with Crowd(folder, PREPARING_S) as crowd:
        receive(job, crowd)
        crowd.begin()
        send(job, crowd, name=FIRST_DISK)
        if old is not None:
            send(replace(job, source=old), crowd)
    if old is not None and disk.difference(old, flat(folder)) is not None:
        raise BenchError("the send of the old disk left another disk behind")
    return Past(folder, old is not None)


def new(folder: Path, ends: Ends) -> Job:
    """A folder in which the two ends have not met yet, and a small disk for that."""
    (folder / TARGET).mkdir(parents=True)
    small = folder / "first.img"
    small.write_bytes(os.urandom(FIRST_BYTES))
    return Job(small, None, folder, ends, folder)


def flat(room: Path, name: str = DISK) -> Path:
    """Where the target keeps a disk's bytes."""
    return room / TARGET / f"{name}-flat.vmdk"


def _lay(job: Job, *, past: Past, map_lost: bool) -> Path:
    if past.old != (job.old is not None):
        raise BenchError("what the ends remember does not fit the run")
    for part in (TARGET, STATE):
        shutil.copytree(past.folder / part, job.room / part, copy_function=_copy_file)
    if map_lost:
        shutil.rmtree(job.room / STATE / "groups")
    return flat(job.room)


def _copy_file(source: str, target: str) -> str:
    disk.copy(Path(source), Path(target))
    shutil.copystat(source, target)  # whose time of change the target remembers, to notice what others write
    return target


def receive(job: Job, crowd: Crowd, *options: str, within_s: float = START_S) -> Member:
    """Start ``replicator receive``, and wait until it listens."""
    ends = job.ends
    said = job.room / "receive.json"
    with said.open("wb") as output:
        command: list[str | Path] = [
            *COMMAND, "receive", "--directory", job.room / TARGET,
            "--listen", f"{ends.address}:{ends.port}", "--json", *options,
        ]  # fmt: skip
        receiver = crowd.start(
            "replicator receive", command, prefix=ends.far.prefix, server=True, stdout=output
        )
    crowd.ready(receiver, lambda: said.read_bytes().endswith(b"\n"), within_s)
    (job.room / TOKEN).write_text(json.loads(said.read_bytes())["token"])
    return receiver


def send(
    job: Job, crowd: Crowd, *options: str | Path, compression: str = "auto", name: str = DISK
) -> dict[str, Any]:
    """Run ``replicator send`` to its end; gives what it reports.

    Raises:
        RunFailed: it failed, or did not believe the list of changed extents that it was given.
    """
    ends = job.ends
    with (job.room / _REPORT).open("wb") as output:
        command: list[str | Path] = [
            *COMMAND, "send", job.source, "--to", f"{ends.address}:{ends.port}", "--disk", name,
            "--token-file", job.room / TOKEN, "--state", job.room / STATE,
            "--compression", compression, "--give-up-after", "30", "--json", *options,
        ]  # fmt: skip
        sender: Member = crowd.start("replicator send", command, prefix=ends.near.prefix, stdout=output)
        crowd.finish(sender)
    if _LIST_REFUSED in sender.log.read_bytes():
        raise RunFailed(f"{sender.name} did not use its list of changed extents")
    return _report(job)


def _report(job: Job) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((job.room / _REPORT).read_bytes())
    return said


def _check(job: Job, *, mode: str) -> str | None:
    said = _report(job)
    return None if said["mode"] == mode else f"it made a {said['mode']} of it, not a {mode}"
