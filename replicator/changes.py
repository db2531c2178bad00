"""A list of changed extents that somebody else's tracker has made, since an epoch that was sealed.

::

    {"since": "<epoch id, 32 hex digits>", "disks": {"NAME": [[offset, length], ...]}}

Pure: text in, values out. Whoever gives a list vouches that nothing outside it has changed since that epoch;
so whatever is odd about it is refused. Not here: whether the target is still at that epoch (``sender.py``),
and what is sent of the extents (``differ.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protocol.constants import MIB, SECTOR_BYTES
from protocol.messages import NO_ID, Interval
from replicator.digest import BLOCK_BYTES
from replicator.errors import UsageError
from replicator.extents import Coverage

CHANGES_MAX_BYTES = 64 * MIB  # some 2.5 million extents, for which the reader needs half a gigabyte

_ID = re.compile(r"[0-9a-fA-F]{32}")


@dataclass(frozen=True, slots=True)
class Changes:
    """What may have changed.

    Attributes:
        since: the id of the epoch that was sealed before.
        disks: by name, the blocks of ``BLOCK_BYTES`` that hold changed extents, neighbours joined, sorted. A
            disk that is not there may have changed anywhere.
    """

    since: bytes
    disks: Mapping[str, tuple[Interval, ...]]


def parse_changes(content: bytes, name: str, sizes: Mapping[str, int]) -> Changes:
    """The list of ``content``.

    Args:
        content: the file's.
        name: the file's, for messages.
        sizes: in bytes, of the disks that are to be sent: the list must be about these.

    Raises:
        UsageError: ``changes.malformed``, ``changes.unknown_disk``, ``changes.missing_disk``,
            ``changes.misaligned``, ``changes.out_of_range``.
    """
    try:
        found = _decoded(content)
        if not isinstance(found, dict) or found.keys() != {"since", "disks"}:
            raise ValueError("it is not a record of since and disks")
        since, disks = _epoch(found["since"]), found["disks"]
        if not isinstance(disks, dict):
            raise ValueError("disks is not a record of lists")
        for extents in disks.values():
            _check_types(extents)
    except ValueError as error:
        raise UsageError(
            "changes.malformed",
            f"{name} is no list of changed extents: {error}",
            cause="it was cut short, or made by something else",
            fix='write {"since": "<epoch id>", "disks": {"NAME": [[offset, length], ...]}}, in bytes',
        ) from None
    _check_names(disks.keys(), sizes.keys(), name)
    return Changes(
        since, {disk: _blocks(extents, disk, sizes[disk], name) for disk, extents in disks.items()}
    )


def _decoded(content: bytes) -> object:
    try:
        return json.loads(content, object_pairs_hook=_without_twins)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("not JSON") from None


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _epoch(text: object) -> bytes:
    if not isinstance(text, str) or _ID.fullmatch(text) is None or bytes.fromhex(text) == NO_ID:
        raise ValueError("since is no epoch id of 32 hex digits")
    return bytes.fromhex(text)


def _check_types(extents: object) -> None:
    if not isinstance(extents, list):
        raise ValueError("the extents of a disk are no list")
    for extent in extents:
        # A bool would pass for an int.
        if not isinstance(extent, list) or [type(value) for value in extent] != [int, int]:
            raise ValueError(f"{str(extent)[:40]} is no extent [offset, length]")


def _check_names(listed: Iterable[str], sent: Iterable[str], name: str) -> None:
    unknown, missing = sorted(set(listed) - set(sent)), sorted(set(sent) - set(listed))
    if unknown:
        raise UsageError(
            "changes.unknown_disk",
            f"{name} lists changes of disk {unknown[0][:60]!r}, which is not to be sent",
            cause="the list is for other disks, or the disk has another name at the target",
            fix="use the names that --disk gives, one entry for each disk that is sent",
        )
    if missing:
        raise UsageError(
            "changes.missing_disk",
            f"{name} does not list disk {missing[0]!r}",
            cause="the list is for other disks, or the tracker leaves out what has not changed",
            fix="give every disk an entry: [] says that nothing of it has changed",
        )


def _blocks(extents: list[list[int]], disk: str, size: int, name: str) -> tuple[Interval, ...]:
    covered = Coverage()
    for offset, length in sorted(extents):
        if offset < 0 or length <= 0 or offset + length > size:
            raise UsageError(
                "changes.out_of_range",
                f"{name} lists [{offset}, {length}] of disk {disk!r}, which has {size} bytes",
                cause="the list is of another disk, or the disk was resized since it was made",
                fix="make the list anew, or send without it",
            )
        if offset % SECTOR_BYTES or length % SECTOR_BYTES:
            raise UsageError(
                "changes.misaligned",
                f"{name} lists [{offset}, {length}] of disk {disk!r}, which is not of whole sectors",
                cause=f"both are multiples of {SECTOR_BYTES} bytes; perhaps sectors were given",
                fix="write both in bytes",
            )
        behind = offset + length
        covered.add(offset - offset % BLOCK_BYTES, min(behind + -behind % BLOCK_BYTES, size))
    return covered.intervals()
