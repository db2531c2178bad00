"""Figures of the part ``log``, and what was wanted of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from bench.results import MB


class Unit(Enum):
    """How a figure is read."""

    RATIO = "times"
    SECONDS = "s"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure, and what was wanted of it.

    Attributes:
        title: for tables.
        measured: in ``unit``.
        wanted: the most, or the least, that it may be; None: it is only told.
        at_most: which of both.
        runs: what it was made of, by name: one number a round.
    """

    title: str
    measured: float
    unit: Unit
    wanted: float | None = None
    at_most: bool = True
    runs: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether it is what was wanted; None: nothing was."""
        if self.wanted is None:
            return None
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "unit": self.unit.value, "met": self.met}


def row(figure: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Figure, measured, wanted, met: from what ``Figure.document`` gave."""
    unit = Unit(figure["unit"])
    told = _told(figure["measured"], unit)
    if figure["wanted"] is None:
        return figure["title"], told, "", ""
    wanted = f"at {'most' if figure['at_most'] else 'least'} {_told(figure['wanted'], unit)}"
    return figure["title"], told, wanted, "yes" if figure["met"] else "no"


def _told(value: float, unit: Unit) -> str:
    if unit is Unit.BYTES:
        return f"{value / MB:,.0f} MB"
    return f"{value:.2f}" if unit is Unit.RATIO else f"{value:.1f} s"
