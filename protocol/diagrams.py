"""Draws the state tables and message layouts into SPEC.md, so that the document cannot drift from the tables.

``python -m protocol.diagrams --write`` (``make docs``) renews the parts between the markers; without
``--write`` it says whether they are current.
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields, is_dataclass
from enum import IntEnum
from importlib import resources
from pathlib import Path

from protocol.header import FrameType
from protocol.messages import FRAME_TYPES
from protocol.state import ACCEPTED, TABLES, Direction, Role, State
from protocol.wire import Choice, Items, schema

_MARKED = re.compile(r"(<!-- generated: (?P<name>[a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_EVERYWHERE = {FrameType.FAIL, FrameType.BYE, FrameType.PING, FrameType.PONG}


def state_diagram(role: Role) -> str:
    """A Mermaid diagram of one conversation as ``role`` sees it; what all states allow is left out."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.START}"]
    for state, steps in TABLES[role].items():
        for (direction, kind), after in steps.items():
            if kind not in _EVERYWHERE:
                sign = "!" if direction is Direction.SEND else "?"
                lines.append(f"    {state} --> {after}: {sign}{kind.name}")
    return "\n".join([*lines, "```"])


def _rows(kind: type) -> list[str]:
    return [f"| `{name}` | {codec.layout()} |" for name, codec in schema(kind)]


def _members(choice: type[IntEnum]) -> list[str]:
    return [f"| {member.value} | {member.name} |" for member in choice]


def message_layouts() -> str:
    """One table per control message, per record that they hold, in wire order, and per enumeration."""
    parts = []
    records: dict[str, type] = {}
    choices: dict[str, type[IntEnum]] = {}
    for kind, (message, body_max) in FRAME_TYPES.items():
        if message is None:
            continue
        parts.append(f"#### {kind.name} ({int(kind)}), body at most {body_max} bytes\n")
        parts.append(_table(message))
        layout: type = message
        for _, codec in schema(layout):
            if isinstance(codec, Items):
                records[codec.kind.__name__] = codec.kind
            elif isinstance(codec, Choice) and issubclass(codec.kind, IntEnum):
                choices[codec.kind.__name__] = codec.kind
    for name, record in sorted(records.items()):
        parts.append(f"#### Record {name}\n")
        parts.append(_table(record))
    for name, choice in sorted(choices.items()):
        parts.append(f"#### Enumeration {name}\n")
        parts.append("\n".join(["| value | name |", "|---|---|", *_members(choice)]) + "\n")
    return "\n".join(parts).rstrip()


def _table(kind: type) -> str:
    assert is_dataclass(kind)  # noqa: S101 - messages and records all are
    if not fields(kind):
        return "Empty body.\n"
    return "\n".join(["| field | type |", "|---|---|", *_rows(kind)]) + "\n"


def accepted_states() -> str:
    """The states in which PING and PONG are allowed."""
    return ", ".join(f"`{state}`" for state in State if state in ACCEPTED)


def render(text: str) -> str:
    """The document with every marked part renewed. An unknown marker raises KeyError."""
    parts = {
        "sender": state_diagram(Role.SENDER),
        "joiner": state_diagram(Role.JOINER),
        "messages": message_layouts(),
        "accepted": accepted_states(),
    }
    return _MARKED.sub(lambda found: f"{found[1]}{parts[found['name']]}\n{found[3]}", text)


def main() -> int:
    """Entry point; exit status 1 when SPEC.md is not current."""
    spec = Path(str(resources.files("protocol") / "SPEC.md"))
    old = spec.read_text(encoding="utf-8")
    new = render(old)
    if "--write" in sys.argv[1:]:
        spec.write_text(new, encoding="utf-8")
        return 0
    sys.stderr.write("SPEC.md is current\n" if old == new else "SPEC.md is stale: run `make docs`\n")
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
