"""Who may send what, when: transition tables, and nothing but tables.

Each conversation is written once, from the connecting side; the accepting side's table is its mirror image.
The driver (``connection.py``), the diagrams in SPEC.md (``diagrams.py``) and the tests all read these tables.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

from protocol.constants import DEAD_AFTER_S, FIRST_FRAME_S
from protocol.header import FrameType


class State(StrEnum):
    """States of one connection."""

    START = "start"
    GREETED = "greeted"  # HELLO is under way
    READY = "ready"  # WELCOME: accepted
    OPENING = "opening"
    OPEN = "open"
    SEALING = "sealing"
    SEALED = "sealed"
    ATTACHING = "attaching"
    ATTACHED = "attached"  # a data stream
    OFFERED = "offered"  # join: the authority has shown itself
    ASKING = "asking"  # join: JOIN or RENEW is under way
    JOINED = "joined"
    CLOSED = "closed"  # nothing goes out, what comes in is dropped


class Role(StrEnum):
    """The four ends of the two conversations."""

    SENDER = "sender"
    RECEIVER = "receiver"
    JOINER = "joiner"
    AUTHORITY = "authority"


class Direction(StrEnum):
    """Seen from the role whose table it is."""

    SEND = "send"
    RECEIVE = "receive"


Step: TypeAlias = tuple[Direction, FrameType]
Table: TypeAlias = dict[State, dict[Step, State]]

_S, _R = Direction.SEND, Direction.RECEIVE

_SENDER: Table = {
    State.START: {(_S, FrameType.HELLO): State.GREETED},
    State.GREETED: {(_R, FrameType.WELCOME): State.READY},
    State.READY: {
        (_S, FrameType.OPEN): State.OPENING,
        (_S, FrameType.ATTACH): State.ATTACHING,
    },
    State.OPENING: {(_R, FrameType.OPENED): State.OPEN},
    State.OPEN: {
        (_R, FrameType.ACK): State.OPEN,
        (_R, FrameType.WANTED): State.OPEN,
        (_S, FrameType.DIGESTS_WANTED): State.OPEN,
        (_R, FrameType.DIGESTS): State.OPEN,
        (_S, FrameType.SEAL): State.SEALING,
    },
    State.SEALING: {  # the others may be under way when SEAL is sent; it stays in force
        (_R, FrameType.ACK): State.SEALING,
        (_R, FrameType.WANTED): State.SEALING,
        (_R, FrameType.DIGESTS): State.SEALING,
        (_R, FrameType.SEALED): State.SEALED,
    },
    State.SEALED: {(_S, FrameType.OPEN): State.OPENING},  # the next epoch, on the same session
    State.ATTACHING: {(_R, FrameType.ATTACHED): State.ATTACHED},
    State.ATTACHED: {(_S, FrameType.DATA): State.ATTACHED},
}

_JOINER: Table = {
    State.START: {(_R, FrameType.CA): State.OFFERED},
    State.OFFERED: {
        (_S, FrameType.JOIN): State.ASKING,
        (_S, FrameType.RENEW): State.ASKING,
    },
    State.ASKING: {(_R, FrameType.JOINED): State.JOINED},
    State.JOINED: {},
}

ACCEPTED = frozenset(
    {
        State.READY,
        State.OPENING,
        State.OPEN,
        State.SEALING,
        State.SEALED,
        State.ATTACHING,
        State.ATTACHED,
    }
)
"""States in which PING and PONG keep the connection alive."""

DEADLINE_S: dict[State, float] = {
    State.START: FIRST_FRAME_S,
    State.GREETED: FIRST_FRAME_S,
    State.OFFERED: FIRST_FRAME_S,
    State.ASKING: DEAD_AFTER_S,  # the authority makes its record durable before it answers
    State.JOINED: FIRST_FRAME_S,
}
"""States without PING: how long the peer may be silent, in seconds."""


def _completed(table: Table) -> Table:
    """The table with what holds in every state: FAIL and BYE end it, PING and PONG keep it."""
    whole: Table = {State.CLOSED: {}}
    for state, steps in table.items():
        whole[state] = dict(steps)
        for direction in Direction:
            whole[state][direction, FrameType.FAIL] = State.CLOSED
            whole[state][direction, FrameType.BYE] = State.CLOSED
            if state in ACCEPTED:
                whole[state][direction, FrameType.PING] = state
                whole[state][direction, FrameType.PONG] = state
    return whole


def _mirrored(table: Table) -> Table:
    other = {_S: _R, _R: _S}
    return {
        state: {(other[direction], kind): after for (direction, kind), after in steps.items()}
        for state, steps in table.items()
    }


TABLES: dict[Role, Table] = {
    Role.SENDER: _completed(_SENDER),
    Role.RECEIVER: _completed(_mirrored(_SENDER)),
    Role.JOINER: _completed(_JOINER),
    Role.AUTHORITY: _completed(_mirrored(_JOINER)),
}
