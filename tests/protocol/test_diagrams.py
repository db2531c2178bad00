"""The drawn parts of SPEC.md are current, and drawing them notices when they are not."""

import re
from importlib import resources
from pathlib import Path

import pytest

from protocol import diagrams
from protocol.header import FrameType
from protocol.state import TABLES, Direction, Role, State

SPEC = Path(str(resources.files("protocol") / "SPEC.md"))


def test_the_specification_is_current() -> None:
    text = SPEC.read_text(encoding="utf-8")
    assert diagrams.render(text) == text
    for name in ("messages", "sender", "joiner", "accepted"):
        assert text.count(f"<!-- generated: {name} -->") == 1


@pytest.mark.parametrize("role", Role)
def test_a_diagram_has_every_arrow_of_its_table(role: Role) -> None:
    drawn = set(re.findall(r"(\w+) --> (\w+): ([!?])(\w+)", diagrams.state_diagram(role)))
    everywhere = {FrameType.FAIL, FrameType.BYE, FrameType.PING, FrameType.PONG}
    assert drawn == {
        (state.value, after.value, "!" if way is Direction.SEND else "?", kind.name)
        for state, steps in TABLES[role].items()
        for (way, kind), after in steps.items()
        if kind not in everywhere
    }


def test_layouts_name_every_message_and_every_value() -> None:
    text = diagrams.message_layouts()
    for kind in FrameType:
        assert (f"#### {kind.name} ({int(kind)})" in text) is (kind is not FrameType.DATA)
    for part in (
        "Record DiskCoverage",
        "Record OpenDisk",
        "Enumeration Mode",
        "| 3 | INCREMENTAL |",
        "| 1 | LATER |",
    ):
        assert part in text


def test_an_unknown_marker_is_an_error() -> None:
    with pytest.raises(KeyError):
        diagrams.render("<!-- generated: nothing -->\n<!-- end -->")


def test_a_stale_specification_is_found_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "SPEC.md"
    spec.write_text("a\n<!-- generated: accepted -->\nold\n<!-- end -->\nz\n", encoding="utf-8")
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    monkeypatch.setattr("sys.argv", ["diagrams"])
    assert diagrams.main() == 1
    assert "old" in spec.read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["diagrams", "--write"])
    assert diagrams.main() == 0
    monkeypatch.setattr("sys.argv", ["diagrams"])
    assert diagrams.main() == 0
    text = spec.read_text(encoding="utf-8")
    assert text.startswith("a\n")
    assert text.endswith("\nz\n")
    assert f"`{State.SEALING}`" in text
