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
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.demo_disk import change_disk, finished, make_disk
from replicator.errors import Interrupted, PeerError, ReplicatorError, TargetError
from replicator.files import Files
from replicator.formats.vmdk import DESCRIPTOR_MAX_BYTES, parse
from replicator.sources.raw import RawSource
from replicator.verify import content_digest
from replicator.workers import Workers

if TYPE_CHECKING:
    from agents.demo_azure import DemoBlob

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
        way_back: with Azure: whether the VMDK, written back to a page blob, is ``identical``; else empty.
        vmdk: the VMDK's path.
        seconds: of everything.
    """

    source: str
    steps: list[dict[str, Any]]
    kills: int
    verified: bool
    digest: str
    qemu_img: str
    way_back: str
    vmdk: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Link:
    """What all sends have in common. ``environment``: what theirs has besides ours."""

    source: str
    directory: Path
    address: str
    token: str
    environment: dict[str, str] = field(default_factory=dict)


async def demonstrate(
    source: Path | None, directory: Path | None, say: Callable[[str], None], *, azure: bool = False
) -> DemoReport:
    """Run it all.

    Args:
        source: a disk of the user's, only read; None makes one of real files.
        directory: where the VMDK shall lie, made if missing; None: a new temporary one, which is kept.
        say: takes a line that tells what happens now.
        azure: the disk lies in a page blob of an emulator; it goes home and back again. Without ``source``.

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
        async with AsyncExitStack() as opened:
            blob = await opened.enter_async_context(_in_azurite(source, workers, say)) if azure else None
            address, token = await opened.enter_async_context(_receiving(directory))
            say(f"receiving on {address} into {directory}")
            link = _Link(str(blob.address) if blob else str(source), directory, address, token)
            link.environment.update(_credentials(blob))
            say(f"sending {link.source}, and killing the sender in the middle")
            killed = await _send(link, failpoint=KILLED_AT)
            steps = [] if killed is None else [killed]
            say("sending again: it goes on where it was" if killed is None else "sending again")
            steps += [await _sent(link)]
            if own:
                say("changing files on the disk")
                await change_disk(source, workers)
                if blob is not None:
                    await blob.follow()
            say("sending the difference")
            steps += [await _sent(link)]
            vmdk = directory / steps[-1]["vmdk"]
            back = ""
            if blob is not None:
                say("writing the VMDK back to a page blob")
                back = await blob.bring_back(vmdk, directory / ".way-back")
        say("comparing source and VMDK")
        ours, theirs = [await _digest(path, workers) for path in (source, await workers.run(_flat_of, vmdk))]
    qemu_img = await _qemu_img_says(source, vmdk)
    return DemoReport(
        source=str(source),
        steps=steps,
        kills=int(killed is None),
        verified=ours == theirs and qemu_img != "different" and back in ("", ours),
        digest=ours,
        qemu_img=qemu_img,
        way_back=back and ("identical" if back == ours else "different"),
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
async def _in_azurite(image: Path, workers: Workers, say: Callable[[str], None]) -> AsyncIterator[DemoBlob]:
    """The image in a page blob."""
    from agents.demo_azure import in_azurite  # the SDK costs half a second

    say("starting Azurite, and writing the disk to a page blob")
    async with in_azurite(image, workers) as blob:
        await blob.follow()
        yield blob


def _credentials(blob: DemoBlob | None) -> dict[str, str]:
    return {} if blob is None else {"AZURE_STORAGE_CONNECTION_STRING": blob.connection_string}


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


async def _sent(link: _Link) -> dict[str, Any]:
    """What a send reported that nobody killed."""
    report = await _send(link)
    if report is None:
        raise PeerError(
            "demo.no_answer",
            "`replicator send` was killed",
            cause="somebody else ended it, or memory ran out",
            fix="try again",
        )
    return report


async def _send(link: _Link, failpoint: str = "") -> dict[str, Any] | None:
    """``replicator send`` as a process, its token by stdin, not by argument. None: it was killed."""
    state = link.directory / ".process-server"
    process = await create_subprocess_exec(
        *COMMAND, "send", link.source, "--to", link.address, "--token-file", "-", "--state", str(state),
        "--give-up-after", "60", "--json",
        stdin=PIPE, stdout=PIPE, env=os.environ | link.environment | {"FAILPOINT": failpoint},
    )  # fmt: skip
    try:
        output, _ = await process.communicate(link.token.encode())
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
