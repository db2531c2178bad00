"""What an epoch has to say, for every combination of what both sides know."""

from itertools import product

import pytest

from protocol.messages import NO_ID, Mode
from replicator.plan import TargetState, choose_mode

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
STATES = list(product([NO_ID, A, B], [NO_ID, A, C], list(Mode), [False, True], [False, True]))


@pytest.mark.parametrize("parent", [NO_ID, A, B, C])
@pytest.mark.parametrize(("sealed", "under_way", "mode", "blank", "clean"), STATES)
def test_every_combination(
    parent: bytes, sealed: bytes, under_way: bytes, mode: Mode, blank: bool, clean: bool
) -> None:
    """Epoch C is to be sent."""
    target = TargetState(sealed, under_way, mode, blank, clean)
    chosen = choose_mode(C, parent, target)
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
    assert choose_mode(C, parent, target) is expected


def test_no_epoch_is_no_epoch_under_way() -> None:
    target = TargetState(under_way=NO_ID, under_way_mode=Mode.INCREMENTAL)
    assert choose_mode(NO_ID, NO_ID, target) is Mode.RESYNC
