"""What an epoch has to say, for every combination of what both sides know."""

from itertools import product

import pytest

from protocol.messages import NO_ID, Mode
from replicator.plan import Action, Diverged, TargetState, decide

A, B, C, D = b"a" * 16, b"b" * 16, b"c" * 16, b"d" * 16
FULL, RESYNC, INCREMENTAL, UP_TO_DATE = Action.FULL, Action.RESYNC, Action.INCREMENTAL, Action.UP_TO_DATE
STATES = list(product([NO_ID, A, B], [NO_ID, A, C], list(Mode), [False, True], [False, True]))


@pytest.mark.parametrize("parent", [NO_ID, A, B, C])
@pytest.mark.parametrize(("sealed", "under_way", "mode", "blank", "clean"), STATES)
def test_every_combination(
    parent: bytes, sealed: bytes, under_way: bytes, mode: Mode, blank: bool, clean: bool
) -> None:
    """Epoch C is to be sent."""
    target = TargetState(sealed, under_way, mode, blank, clean)
    chosen = decide(C, parent, target).mode
    if under_way == C:
        assert chosen is mode
    elif blank:
        assert chosen is Mode.FULL
    elif clean and sealed != NO_ID and parent == sealed:
        assert chosen is Mode.INCREMENTAL
    else:
        assert chosen is Mode.RESYNC


TABLE = {
    "a new target": (NO_ID, TargetState(blank=True), Mode.FULL),
    "an adopted VMDK": (NO_ID, TargetState(), Mode.RESYNC),
    "the map fits": (A, TargetState(A, clean=True), Mode.INCREMENTAL),
    "somebody wrote to it": (A, TargetState(A), Mode.RESYNC),
    "the map is older": (B, TargetState(A, clean=True), Mode.RESYNC),
    "there is no map": (NO_ID, TargetState(A, clean=True), Mode.RESYNC),
    "two sides that know nothing do not agree": (NO_ID, TargetState(clean=True), Mode.RESYNC),
    "another epoch was given up": (A, TargetState(A, under_way=B), Mode.RESYNC),
    "the images are gone": (A, TargetState(A, blank=True), Mode.FULL),
    "a full one goes on": (NO_ID, TargetState(under_way=C), Mode.FULL),
    "an incremental one goes on": (NO_ID, TargetState(A, C, Mode.INCREMENTAL), Mode.INCREMENTAL),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_operators_meet(case: str) -> None:
    parent, target, expected = TABLE[case]
    assert decide(C, parent, target).mode is expected


def test_no_epoch_is_no_epoch_under_way() -> None:
    target = TargetState(under_way=NO_ID, under_way_mode=Mode.INCREMENTAL)
    assert decide(NO_ID, NO_ID, target).mode is Mode.RESYNC


# ------------------------------------------------------------------ decisions and their reasons

HELD = TargetState(B, clean=True, history=(A, B))

DECISIONS: dict[str, tuple[bytes, bytes, TargetState, Action, str]] = {
    # proposed, parent, target -> what to do, and a part of why
    "a new target": (C, NO_ID, TargetState(blank=True), FULL, "new and empty"),
    "the images are gone": (C, B, TargetState(B, blank=True, history=(A, B)), FULL, "62626262 are gone"),
    "a sealed epoch whose images are gone": (B, A, TargetState(B, blank=True), FULL, "are gone"),
    "an adopted VMDK": (C, NO_ID, TargetState(), RESYNC, "no epoch of ours"),
    "a parent, but the target has sealed nothing": (
        C,
        B,
        TargetState(clean=True),
        RESYNC,
        "no epoch of ours",
    ),
    "the parent is the newest": (C, B, HELD, INCREMENTAL, "since 62626262"),
    "the parent is the only one": (C, B, TargetState(B, clean=True), INCREMENTAL, "since 62626262"),
    "the sender compares with nothing": (C, NO_ID, HELD, RESYNC, "cannot tell"),
    "the images were changed": (C, B, TargetState(B, history=(A, B)), RESYNC, "changed since 62626262"),
    "changed, and nothing to compare with": (C, NO_ID, TargetState(B), RESYNC, "changed since 62626262"),
    "the SEALED was lost": (B, A, HELD, UP_TO_DATE, "sealed already"),
    "the SEALED was lost, and the memory": (B, NO_ID, HELD, UP_TO_DATE, "sealed already"),
    "sealed, and changed by others": (B, NO_ID, TargetState(B), RESYNC, "changed since 62626262"),
    "a full one goes on": (C, NO_ID, TargetState(under_way=C), FULL, "goes on"),
    "a resync goes on": (C, B, TargetState(B, C, Mode.RESYNC, clean=True), RESYNC, "goes on"),
    "an incremental one goes on": (C, B, TargetState(B, C, Mode.INCREMENTAL), INCREMENTAL, "goes on"),
    "another is under way": (C, B, TargetState(B, D, clean=True), INCREMENTAL, "since 62626262"),
    "another is under way, in part in the images": (C, B, TargetState(B, D), RESYNC, "was given up"),
    "no id is no epoch": (NO_ID, NO_ID, TargetState(), RESYNC, "no epoch of ours"),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_what_is_decided_and_why(case: str) -> None:
    epoch, parent, target, action, why = DECISIONS[case]
    decision = decide(epoch, parent, target)
    assert decision.action is action
    assert why in decision.why
    assert decision.diverged is None


DIVERGED: dict[str, tuple[bytes, bytes, TargetState, tuple[bytes, ...], bytes]] = {
    # proposed, parent, target -> what the sender has, the newest that both know
    "the sender was set back": (C, A, HELD, (A, C), A),
    "the target was set back": (D, C, HELD, (C, D), NO_ID),
    "set back, and changed by others": (C, A, TargetState(B, history=(A, B)), (A, C), A),
    "the parent is no longer retained": (C, A, TargetState(B, clean=True, history=(B,)), (A, C), NO_ID),
    "what was sealed long ago is sent again": (A, NO_ID, HELD, (A,), A),
    "sealed long ago, parent newest": (A, B, HELD, (B, A), B),
}


@pytest.mark.parametrize("case", DIVERGED)
def test_histories_that_have_diverged_are_both_told(case: str) -> None:
    epoch, parent, target, sender, common = DIVERGED[case]
    decision = decide(epoch, parent, target)
    assert decision.action is RESYNC
    assert decision.diverged == Diverged(sender, target.history)
    assert decision.diverged.common == common
    assert decision.why == str(decision.diverged)
    for known in (*sender, *target.history):
        assert known.hex()[:8] in decision.why


def test_a_diverged_history_is_told_in_these_words() -> None:
    assert str(Diverged((A, C), (A, B))) == (
        "the histories have diverged: the sender has 61616161 > 63636363, "
        "the target has 61616161 > 62626262; both know 61616161"
    )
    assert str(Diverged((C, D), (A, B))).endswith("they share none")


def test_of_a_long_history_the_ends_are_told() -> None:
    long = tuple(number.to_bytes(16, "little") for number in range(1, 101))
    told = str(Diverged((A, C), long))
    assert (
        "the target has 01000000 > … 94 more … > 60000000 > 61000000 > 62000000 > 63000000 > 64000000;"
        in told
    )
    assert "more" not in str(Diverged((A, C), long[:6]))


EVERY = list(product([A, B, C], [NO_ID, A, B, D], [NO_ID, B], [NO_ID, C], [(), (A, B)], [False, True]))


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize(("epoch", "parent", "sealed", "under_way", "history", "blank"), EVERY)
def test_only_the_difference_to_what_is_there_is_taken(
    epoch: bytes,
    parent: bytes,
    sealed: bytes,
    under_way: bytes,
    history: tuple[bytes, ...],
    blank: bool,
    clean: bool,
) -> None:
    """Whatever both sides know: no decision takes for granted what the images may not hold."""
    target = TargetState(sealed, under_way, Mode.RESYNC, blank, clean, history if sealed != NO_ID else ())
    decision = decide(epoch, parent, target)
    assert decision.why
    assert decision.mode.name == decision.action.name.replace("UP_TO_DATE", "INCREMENTAL")
    if decision.action is INCREMENTAL:
        assert clean and not blank and parent == sealed != NO_ID
    if decision.action is UP_TO_DATE:
        assert clean and not blank and epoch == sealed
    if decision.action is FULL:
        assert blank
