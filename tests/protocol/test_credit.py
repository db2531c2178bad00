"""Byte credit: what is granted may be used, once, on either side."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.credit import ReceiveWindow, SendWindow
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode


def test_the_sender_uses_all_of_its_credit_and_not_a_byte_more() -> None:
    window = SendWindow(1000)
    window.take(400)
    window.take(600)
    assert window.room == 0
    with pytest.raises(LocalProtocolError):
        window.take(1)
    assert window.sent == 1000


def test_an_older_grant_that_comes_late_takes_nothing_away() -> None:
    window = SendWindow(1000)
    window.raise_to(3000)
    window.raise_to(2000)
    assert window.room == 3000


def test_the_receiver_refuses_what_it_did_not_grant_and_counts_nothing_then() -> None:
    window = ReceiveWindow(1000)
    window.charge(1000)
    with pytest.raises(RemoteProtocolError) as caught:
        window.charge(1)
    assert caught.value.code is WireCode.CREDIT
    assert window.received == 1000
    assert window.grant(500) == 1500
    window.charge(500)


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=60))
def test_a_sender_that_keeps_to_its_window_is_never_refused(steps: list[tuple[bool, int]]) -> None:
    sender, receiver = SendWindow(4000), ReceiveWindow(4000)
    for grants, size in steps:
        if grants:
            sender.raise_to(receiver.grant(size))
        elif size <= sender.room:
            sender.take(size)
            receiver.charge(size)
    assert sender.sent == receiver.received <= receiver.granted == sender.limit
