"""The demonstration: every role on loopback, as real processes over real TLS, ending with a verified VMDK."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from asyncio import create_subprocess_exec, timeout
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.demo_disk import change_disk, finished, make_disk
from replicator.errors import Interrupted, PeerError, ReplicatorError, TargetError
from replicator.files import Files
from replicator.formats.vmdk import DESCRIPTOR_MAX_BYTES, parse
from replicator.sources.raw import RawSource
from replicator.verify import content_digest
from replicator.workers import Workers

START_S = 20.0
STOP_S = 10.0
KILLED_AT = "send.acknowledged:2"  # kill -9, as soon as the second ACK has come
COMMAND = (sys.executable, "-m", "agents.cli")


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What was shown.

    Attributes:
        source: the disk that was sent.
        steps: what each ``send`` that reached its end reported.
        kills: how many others were killed half-way.
        verified: source and VMDK hold the same bytes, by digest and (if it is there) by qemu-img.
        digest: SHA-256 of the source's content, as ``verify.content_digest`` makes it.
        qemu_img: ``identical``, ``different``, or ``not installed``.
        vmdk: the VMDK's path.
        seconds: of everything.
    """

    source: str
    steps: list[dict[str, Any]]
    kills: int
    verified: bool
    digest: str
    qemu_img: str
    vmdk: str
    seconds: float


async def demonstrate(source: Path | None, directory: Path | None, say: Callable[[str], None]) -> DemoReport:
    """Run it all.

    Args:
        source: a disk of the user's, only read; None makes one of real files.
        directory: where the VMDK shall lie, made if missing; None: a new temporary one, which is kept.
        say: takes a line that tells what happens now.

    Raises:
        ReplicatorError: what the commands say, or what stood in the way of the demonstration.
    """
    began = time.monotonic()
    with Workers() as workers:
        directory = await workers.run(_make_directory, directory)
        own = source is None
        if source is None:
            say("making a disk: ext4 with real files")
            source = await make_disk(directory, workers)
        async with _receiving(directory) as (address, token):
            say(f"receiving on {address} into {directory}")
            say(f"sending {source}, and killing the sender in the middle")
            killed = await _send(source, directory, address, token, failpoint=KILLED_AT)
            steps = [] if killed is None else [killed]
            say("sending again: it goes on where it was" if killed is None else "sending again")
            steps += [await _sent(source, directory, address, token)]
            if own:
                say("changing files on the disk")
                await change_disk(source, workers)
            say("sending the difference")
            steps += [await _sent(source, directory, address, token)]
        say("comparing source and VMDK")
        vmdk = directory / steps[-1]["vmdk"]
        ours, theirs = [await _digest(path, workers) for path in (source, await workers.run(_flat_of, vmdk))]
    qemu_img = await _qemu_img_says(source, vmdk)
    return DemoReport(
        source=str(source),
        steps=steps,
        kills=int(killed is None),
        verified=ours == theirs and qemu_img != "different",
        digest=ours,
        qemu_img=qemu_img,
        vmdk=str(vmdk),
        seconds=round(time.monotonic() - began, 3),
    )


# ------------------------------------------------------------------ the parts


def _make_directory(directory: Path | None) -> Path:
    if directory is None:
        return Path(tempfile.mkdtemp(prefix="replicator-demo-", dir="/var/tmp"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(
            "target.unusable",
            f"{directory} cannot be made: {error.strerror}",
            cause="something else has this name, or this user may not write there",
            fix="give another directory with --dir",
        ) from None
    return directory


@asynccontextmanager
async def _receiving(directory: Path) -> AsyncIterator[tuple[str, str]]:
    """A master target as a process of its own; gives its address and join token."""
    arguments = ("receive", "--directory", str(directory), "--listen", "127.0.0.1:0", "--json")
    process = await create_subprocess_exec(*COMMAND, *arguments, stdin=DEVNULL, stdout=PIPE)
    try:
        async with timeout(START_S):
            started = _document(await _line(process), "receive")
        yield started["listen"], started["token"]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _line(process: Process) -> bytes:
    return await process.stdout.readline() if process.stdout else b""


async def _sent(source: Path, directory: Path, address: str, token: str) -> dict[str, Any]:
    """What a send reported that nobody killed."""
    report = await _send(source, directory, address, token)
    if report is None:
        raise PeerError(
            "demo.no_answer",
            "`replicator send` was killed",
            cause="somebody else ended it, or memory ran out",
            fix="try again",
        )
    return report


async def _send(
    source: Path, directory: Path, address: str, token: str, failpoint: str = ""
) -> dict[str, Any] | None:
    """``replicator send`` as a process, its token by stdin, not by argument. None: it was killed."""
    state = directory / ".process-server"
    process = await create_subprocess_exec(
        *COMMAND, "send", str(source), "--to", address, "--token-file", "-", "--state", str(state),
        "--give-up-after", "60", "--json",
        stdin=PIPE, stdout=PIPE, env=os.environ | {"FAILPOINT": failpoint},
    )  # fmt: skip
    try:
        output, _ = await process.communicate(token.encode())
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    return None if process.returncode == -signal.SIGKILL else _document(output, "send")


def _document(output: bytes, command: str) -> dict[str, Any]:
    """The JSON document that a command printed; its error becomes ours."""
    try:
        found: dict[str, Any] = json.loads(output)
    except ValueError:
        raise PeerError(
            "demo.no_answer",
            f"`replicator {command}` ended without an answer",
            cause="it was killed, or a defect; its reason stands above",
            fix="run it by hand to see more",
        ) from None
    if "error" in found:
        told = found["error"]
        kind = Interrupted if told["code"] == "interrupted" else PeerError
        raise kind(told["code"], told["message"], cause=told["cause"], fix=told["fix"])
    return found


# ------------------------------------------------------------------ the proof


async def _digest(path: Path, workers: Workers) -> str:
    source = await RawSource.open(Files(), workers, path)
    try:
        return await content_digest(source)
    finally:
        await source.close()


def _flat_of(vmdk: Path) -> Path:
    """The file that holds a VMDK's data, as its descriptor says."""
    with vmdk.open("rb") as file:
        return vmdk.parent / parse(file.read(DESCRIPTOR_MAX_BYTES), vmdk.name).extent.name


async def _qemu_img_says(source: Path, vmdk: Path) -> str:
    """What an independent reader finds."""
    if shutil.which("qemu-img") is None:
        return "not installed"
    status, output = await finished("qemu-img", "compare", "-f", "raw", "-F", "vmdk", str(source), str(vmdk))
    if status not in (0, 1):
        raise ReplicatorError(
            "demo.qemu_img_failed",
            f"qemu-img cannot compare: {output.strip()}",
            cause="it cannot read the source or the VMDK",
            fix="run `qemu-img compare` by hand",
        )
    return "different" if status else "identical"
