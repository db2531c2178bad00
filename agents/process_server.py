"""A process server as one command: joins if it must, sends a group of disks, reports what that took."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from agents.link import Link
from agents.send_config import SendConfig, SendReport
from agents.text_file import read_bytes
from protocol.messages import OpenDisk
from replicator.changes import CHANGES_MAX_BYTES, Changes, parse_changes
from replicator.clock import Clock
from replicator.errors import UsageError
from replicator.files import Files
from replicator.framing import Progress
from replicator.images.catalogue import check_disk
from replicator.retrying import keep_trying
from replicator.sender import DiskToSend, Outcome
from replicator.sources.raw import RawSource
from replicator.sources.vmdk import open_vmdk
from replicator.workers import Workers

PASSES_MAX = 3  # over a source that is being written: the third either finds it at rest, or it never is


async def send(
    config: SendConfig, progress: Progress, clock: Clock, files: Files, tell: Callable[[str], None]
) -> SendReport:
    """Bring the target's disks to what the sources hold; ``tell`` takes lines about what is waited for.

    Raises:
        ReplicatorError: what stood in the way; see ``docs/errors.md``.
    """
    if config.in_azure:
        from agents.azure_server import send_from_azure  # the SDKs cost half a second

        return await send_from_azure(config, progress, clock, files, tell)
    began = clock.monotonic_s()
    with Workers() as workers:
        link = Link(config, workers, clock, files, progress, tell)
        first: Outcome | None = None
        passes = 0
        while True:
            passes += 1
            async with AsyncExitStack() as opened:
                disks, watched = await _open_sources(config, files, workers, clock, opened)
                opened.push_async_callback(workers.run, link.close)
                sizes = {disk.name: disk.source.size_bytes for disk in disks}
                changes = None
                if first is None and config.changed_extents is not None:
                    changes = await workers.run(_changes, config.changed_extents, sizes, files)
                attempt = partial(link.send, disks, changes)
                outcome = await keep_trying(attempt, link.met, tell, clock, config.give_up_after_s)
                if not outcome.settled:
                    settled = partial(link.settled, disks, outcome.epoch)
                    await keep_trying(settled, link.met, tell, clock, config.give_up_after_s)
            first = first or outcome
            worthwhile = outcome.stale or (outcome.changed and watched)
            if not worthwhile or passes == PASSES_MAX:
                break
            tell(f"{config.sources} may have changed since it was first read: sending what changed")
    return SendReport.of(config, first, outcome, passes, progress, clock.monotonic_s() - began)


async def _open_sources(
    config: SendConfig, files: Files, workers: Workers, clock: Clock, opened: AsyncExitStack
) -> tuple[list[DiskToSend], bool]:
    """The disks, closed with ``opened``. True: a change of any of them would be seen.

    Once the last of them is open, all that promise to be at rest show the content of that one moment, for as
    long as they keep the promise.
    """
    sources = []
    for disk in config.disks:
        source = await _open_source(disk.source, config.quiesced, files, workers)
        opened.push_async_callback(source.close)
        # The target checks it too, but not every text that argv can hold fits on the wire.
        check_disk(OpenDisk(disk.name, source.size_bytes))
        sources.append(source)
    moment_ns = clock.now_ns()
    at_rest = [source.watched or config.quiesced for source in sources]
    disks = [
        DiskToSend(disk.name, source, moment_ns if rests else 0)
        for disk, source, rests in zip(config.disks, sources, at_rest, strict=True)
    ]
    return disks, all(at_rest)


async def _open_source(source: str, quiesced: bool, files: Files, workers: Workers) -> RawSource:
    path = Path(source)
    if path.name.endswith(".vmdk") and not path.name.endswith("-flat.vmdk"):
        return await open_vmdk(files, workers, path)
    return await RawSource.open(files, workers, path, quiesced=quiesced)


def _changes(path: Path, sizes: Mapping[str, int], files: Files) -> Changes:
    """What a list of changed extents says of disks of these sizes. Blocks."""
    try:
        content = read_bytes(files, path, CHANGES_MAX_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise _too_large(path) from None
        raise UsageError(
            "changes.unreadable",
            f"the list of changed extents {path} cannot be read: {error.strerror}",
            cause="a wrong path, no plain file, or this user may not read it",
            fix="give the file that the tracker has written",
        ) from None
    return parse_changes(content, str(path), sizes)


def _too_large(path: Path) -> UsageError:
    return UsageError(
        "changes.too_large",
        f"the list of changed extents {path} has more than {CHANGES_MAX_BYTES} bytes",
        cause="so much has changed in so many places that comparing is no slower",
        fix="send without it, or have the tracker join neighbours",
    )
