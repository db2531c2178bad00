"""Reads the tables of docs/errors.md, which operators read and tests hold the product to."""

import re
from typing import NamedTuple

from tests.house.tree import ROOT

PAGE = ROOT / "docs" / "errors.md"
BAD_INPUT = ["input", "code", "message", "exit status", "state afterwards"]
OTHER_CODES = ["code", "when", "cause", "what to do"]


class BadInput(NamedTuple):
    """A row of the bad-input table. `message`: `…` stands for any text."""

    input: str
    code: str
    message: str
    status: int
    state: str

    def tells(self, message: str) -> bool:
        """Whether a message is what the row says."""
        parts = (re.escape(part) for part in self.message.split("…"))
        return re.fullmatch(".*".join(parts), message, re.DOTALL) is not None


def table(heading: list[str]) -> list[list[str]]:
    """The rows below this heading."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index("| " + " | ".join(heading) + " |") + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert len(cells) == len(heading) and all(cells), line
        rows.append(cells)
    return rows


def bad_inputs() -> list[BadInput]:
    return [
        BadInput(key, code.strip("`"), message, int(status), state)
        for key, code, message, status, state in table(BAD_INPUT)
    ]


def codes() -> list[str]:
    """Every code on the page, a code of the second table as often as it stands there."""
    return [*{row.code for row in bad_inputs()}, *(row[0].strip("`") for row in table(OTHER_CODES))]
