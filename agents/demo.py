"""The demonstration: every role on loopback, as real processes over real TLS, ending with a verified VMDK."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from asyncio import create_subprocess_exec, timeout
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replicator.errors import Interrupted, PeerError, ReplicatorError, TargetError, UsageError
from replicator.files import Files
from replicator.formats.vmdk import DESCRIPTOR_MAX_BYTES, parse
from replicator.sources.raw import RawSource
from replicator.verify import content_digest
from replicator.workers import Workers

DISK_BYTES = 256 * 1024 * 1024
FILES_MAX_BYTES = 96 * 1024 * 1024
START_S = 20.0
STOP_S = 10.0
COMMAND = (sys.executable, "-m", "agents.cli")


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What was shown.

    Attributes:
        source: the disk that was sent.
        steps: what each ``send`` reported.
        verified: source and VMDK hold the same bytes, by digest and (if it is there) by qemu-img.
        digest: SHA-256 of the source's content, as ``verify.content_digest`` makes it.
        qemu_img: ``identical``, ``different``, or ``not installed``.
        vmdk: the VMDK's path.
        seconds: of everything.
    """

    source: str
    steps: list[dict[str, Any]]
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
        if source is None:
            say("making a disk: ext4 with real files")
            source = await _make_disk(directory, workers)
        async with _receiving(directory) as (address, token):
            say(f"receiving on {address} into {directory}; sending {source}")
            step = await _send(source, directory, address, token)
        say("comparing source and VMDK")
        vmdk = directory / step["vmdk"]
        ours, theirs = [await _digest(path, workers) for path in (source, await workers.run(_flat_of, vmdk))]
    qemu_img = await _qemu_img_says(source, vmdk)
    return DemoReport(
        source=str(source),
        steps=[step],
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


async def _make_disk(directory: Path, workers: Workers) -> Path:
    """A small ext4 disk with files of Python's own library."""
    if shutil.which("mkfs.ext4") is None:
        raise UsageError(
            "demo.no_mkfs",
            "mkfs.ext4 is missing, so no disk can be made",
            cause="e2fsprogs is not installed, or /usr/sbin is not in PATH",
            fix="apt-get install e2fsprogs, or give a disk of your own with --source",
        )
    image = directory / "demo-disk.img"
    with tempfile.TemporaryDirectory(dir=directory) as files:
        await workers.run(_copy_files, Path(sysconfig.get_path("stdlib")), Path(files))
        await workers.run(image.unlink, missing_ok=True)
        size = f"{DISK_BYTES // 1024}k"
        status, output = await _finished("mkfs.ext4", "-q", "-F", "-d", files, str(image), size)
    if status:
        raise TargetError(
            "demo.mkfs_failed",
            f"mkfs.ext4 failed: {output.strip()}",
            cause=f"most likely no space in {directory}",
            fix="give another directory with --dir",
        )
    return image


def _copy_files(origin: Path, target: Path) -> None:
    """Copy a library's own modules and packages, up to what the disk holds comfortably."""
    left = FILES_MAX_BYTES
    for path in sorted(origin.glob("*/*.py")) + sorted(origin.glob("*.py")):
        left -= path.stat().st_size
        if left < 0:
            return
        (target / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.parent.name / path.name)


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


async def _send(source: Path, directory: Path, address: str, token: str) -> dict[str, Any]:
    """``replicator send`` as a process of its own; the token goes by stdin, not by argument."""
    state = directory / ".process-server"
    process = await create_subprocess_exec(
        *COMMAND, "send", str(source), "--to", address, "--token-file", "-", "--state", str(state), "--json",
        stdin=PIPE, stdout=PIPE,
    )  # fmt: skip
    try:
        output, _ = await process.communicate(token.encode())
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    return _document(output, "send")


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
        return await content_digest(source, workers)
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
    status, output = await _finished("qemu-img", "compare", "-f", "raw", "-F", "vmdk", str(source), str(vmdk))
    if status not in (0, 1):
        raise ReplicatorError(
            "demo.qemu_img_failed",
            f"qemu-img cannot compare: {output.strip()}",
            cause="it cannot read the source or the VMDK",
            fix="run `qemu-img compare` by hand",
        )
    return "different" if status else "identical"


async def _finished(*command: str) -> tuple[int, str]:
    """Exit status and all output of a program."""
    process = await create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    output, errors = await process.communicate()
    return process.returncode or 0, (output + errors).decode(errors="replace")
