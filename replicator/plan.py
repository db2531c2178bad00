"""Decides what an epoch has to say, from the ids of both sides. Pure.

In this version the target decides, when a group is opened; ids are compared, never times or counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import NO_ID, Mode


@dataclass(frozen=True, slots=True)
class TargetState:
    """What the target knows of a group.

    Attributes:
        sealed: id of its newest sealed epoch, NO_ID if there is none.
        under_way: id of the epoch that was begun and not sealed, NO_ID if there is none.
        under_way_mode: what was agreed on for it.
        blank: all of its images are new and empty.
        clean: all of its images hold exactly the sealed epoch.
    """

    sealed: bytes = NO_ID
    under_way: bytes = NO_ID
    under_way_mode: Mode = Mode.FULL
    blank: bool = False
    clean: bool = False


def choose_mode(epoch: bytes, parent: bytes, target: TargetState) -> Mode:
    """What the epoch ``epoch`` shall say, if its sender knows what differs from epoch ``parent``.

    An epoch that is under way goes on as it was begun. A new, empty image takes everything. Only an image
    that holds just what the sender compares with takes the difference alone; in doubt, both sides compare.
    """
    if epoch == target.under_way != NO_ID:
        return target.under_way_mode
    if target.blank:
        return Mode.FULL
    if target.clean and parent == target.sealed != NO_ID:
        return Mode.INCREMENTAL
    return Mode.RESYNC
