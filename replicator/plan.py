"""Decides what an epoch has to say, from the ids of both sides. Pure.

Ids are compared, never numbers, times or counts. The target decides, when a group is opened; the sender acts
on what it is told. Not here: what the images hold (that is looked up first), and how it is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from protocol.messages import NO_ID, Mode

ID_LETTERS = 8  # of an id's 32, in words for people: enough to tell a history's epochs apart
HISTORY_SHOWN = 6  # ids of a history in a message; what is between the oldest and these is counted


class Action(Enum):
    """What is to be done about an epoch that is proposed."""

    FULL = "full"
    RESYNC = "resync"
    INCREMENTAL = "incremental"
    UP_TO_DATE = "up-to-date"  # it is sealed already, and the images hold it


@dataclass(frozen=True, slots=True)
class TargetState:
    """What the target knows of a group.

    Attributes:
        sealed: id of its newest sealed epoch, NO_ID if there is none.
        under_way: id of the epoch that was begun and not sealed, NO_ID if there is none.
        under_way_mode: what was agreed on for it.
        blank: all of its images are new and empty.
        clean: all of its images hold exactly the sealed epoch, or will once its log is applied.
        history: ids of the sealed epochs that it retains, oldest first.
    """

    sealed: bytes = NO_ID
    under_way: bytes = NO_ID
    under_way_mode: Mode = Mode.FULL
    blank: bool = False
    clean: bool = False
    history: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Diverged:
    """The sender compares with an epoch that is not the target's newest: one of the two was set back.

    Attributes:
        sender: what the sender knows, oldest first: the epoch that it compares with, and the one proposed.
        target: the sealed epochs of the target, oldest first; not empty.
    """

    sender: tuple[bytes, ...]
    target: tuple[bytes, ...]

    @property
    def common(self) -> bytes:
        """The newest epoch that both know; NO_ID if there is none."""
        return next((epoch for epoch in reversed(self.target) if epoch in self.sender), NO_ID)

    def __str__(self) -> str:
        known = f"both know {_short(self.common)}" if self.common != NO_ID else "they share none"
        return (
            f"the histories have diverged: the sender has {_line(self.sender)}, "
            f"the target has {_line(self.target)}; {known}"
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done, and why, in words for an operator. ``diverged``: if that is the reason."""

    action: Action
    why: str
    diverged: Diverged | None = None

    @property
    def mode(self) -> Mode:
        """The epoch's mode; of one that needs nothing more, that of the least to say."""
        return _MODES[self.action]


def decide(epoch: bytes, parent: bytes, target: TargetState) -> Decision:
    """What the epoch ``epoch`` has to say, if its sender can tell what differs from epoch ``parent``.

    An epoch that is under way goes on as it was begun. A new, empty image takes everything. Only images that
    hold just what the sender compares with take the difference alone; in doubt, both sides compare.

    Args:
        epoch: the id that the sender proposes.
        parent: NO_ID if it can tell differences from none.
        target: what the target knows.
    """
    if epoch == target.under_way != NO_ID:
        return Decision(_BY_MODE[target.under_way_mode], "the epoch is under way and goes on as it was begun")
    if target.blank:
        gone = f"; the images of {_short(target.sealed)} are gone" if target.sealed != NO_ID else ""
        return Decision(Action.FULL, f"the images are new and empty{gone}")
    if epoch == target.sealed != NO_ID and target.clean:
        return Decision(Action.UP_TO_DATE, "the epoch is sealed already")
    if target.sealed == NO_ID:
        return Decision(Action.RESYNC, "the images hold something that no epoch of ours has left there")
    diverged = _diverged(epoch, parent, target)
    if diverged is not None:
        return Decision(Action.RESYNC, str(diverged), diverged)
    if not target.clean:
        return Decision(
            Action.RESYNC,
            f"the images were changed since {_short(target.sealed)} was sealed, or an epoch was given up",
        )
    if parent == NO_ID:
        return Decision(Action.RESYNC, "the sender cannot tell what changed since any epoch")
    return Decision(Action.INCREMENTAL, f"the sender knows what changed since {_short(parent)}")


_BY_MODE = {
    Mode.FULL: Action.FULL,
    Mode.RESYNC: Action.RESYNC,
    Mode.INCREMENTAL: Action.INCREMENTAL,
}
_MODES = {action: mode for mode, action in _BY_MODE.items()} | {Action.UP_TO_DATE: Mode.INCREMENTAL}


def _diverged(epoch: bytes, parent: bytes, target: TargetState) -> Diverged | None:
    """Both histories, if the sender is not where the target is: its parent is another epoch, or it proposes
    one that the target has long left behind.
    """
    theirs = target.history or (target.sealed,)
    set_back = epoch in theirs[:-1]
    if parent in (NO_ID, target.sealed) and not set_back:
        return None
    return Diverged(tuple(known for known in (parent, epoch) if known != NO_ID), theirs)


def _line(history: Sequence[bytes]) -> str:
    """A history as text, its middle left out where it is long: ``12ab34cd > … 7 more … > 99ff00aa``."""
    shown = [_short(epoch) for epoch in history]
    if len(shown) > HISTORY_SHOWN:
        left_out = len(shown) - HISTORY_SHOWN
        shown = [shown[0], f"… {left_out} more …", *shown[1 + left_out :]]
    return " > ".join(shown)


def _short(epoch: bytes) -> str:
    return epoch.hex()[:ID_LETTERS]
