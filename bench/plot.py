"""Plots from the document of a benchmark, as PNG and SVG. Nothing else needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PEERS = "#1f6f8b", "#b0b7bd"
WIDTH_IN, BAR_IN, PANEL_IN = 9.0, 0.42, 3.6
DPI = 144


def ready() -> None:
    """Whether there is something to draw with.

    Raises:
        BenchError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise BenchError("matplotlib is not installed, so plots cannot be drawn: see requirements/bench.txt")


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the document holds into ``folder``; gives the files."""
    import matplotlib

    # The same figures give the same file.
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "replicator"
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    scenarios = document["scenarios"]
    bars = [each for each in scenarios if each["kind"] != "line" and _good(each)]
    if bars:
        files += _saved(_bars(bars), folder / "loopback")
    lines = [
        each for each in scenarios if each["kind"] == "line" and not each["line"]["loss"] and _good(each)
    ]
    if lines:
        files += _saved(_lines(lines), folder / "line")
    return files


def _good(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [each for each in scenario["standings"] if each["problem"] is None]
    return found


def _bars(scenarios: Sequence[dict[str, Any]]) -> Figure:
    """Rates of a scenario's contenders, one panel each; whiskers from the slowest to the fastest round."""
    from matplotlib.figure import Figure as Drawing

    counts = [len(_good(each)) for each in scenarios]
    figure = Drawing(figsize=(WIDTH_IN, sum(counts) * BAR_IN + len(counts) * 0.9), layout="constrained")
    panels = figure.subplots(len(scenarios), 1, squeeze=False, height_ratios=counts)[:, 0]
    for panel, scenario in zip(panels, scenarios, strict=True):
        good = sorted(_good(scenario), key=lambda each: float(each["mb_s"]))
        size_mb = scenario["size_bytes"] / 1e6
        rates = [each["mb_s"] for each in good]
        below = [max(0.0, each["mb_s"] - size_mb / each["seconds_max"]) for each in good]
        above = [max(0.0, size_mb / each["seconds_min"] - each["mb_s"]) for each in good]
        drawn = panel.barh(
            [each["name"] for each in good], rates, xerr=[below, above], capsize=3, height=0.7,
            color=[OURS if each["ours"] else PEERS for each in good],
        )  # fmt: skip
        panel.bar_label(drawn, labels=[f" {rate:,.0f}" for rate in rates], padding=6)
        _labelled(
            panel, scenario["title"], "MB of disk per second (median of the rounds, slowest to fastest)"
        )
        panel.margins(x=0.15)
    return figure


def _lines(scenarios: Sequence[dict[str, Any]]) -> Figure:
    """Rate over round-trip time, one panel for each rate of the line."""
    from matplotlib.figure import Figure as Drawing

    rates = sorted({each["line"]["rate_bit_s"] for each in scenarios})
    figure = Drawing(figsize=(WIDTH_IN, PANEL_IN * len(rates)), layout="constrained")
    panels = figure.subplots(len(rates), 1, squeeze=False)[:, 0]
    for panel, rate in zip(panels, rates, strict=True):
        here = [each for each in scenarios if each["line"]["rate_bit_s"] == rate]
        for name, ours in dict.fromkeys((each["name"], each["ours"]) for one in here for each in _good(one)):
            points = [
                (one["line"]["round_trip_s"] * 1e3, each["mb_s"])
                for one in here
                for each in _good(one)
                if each["name"] == name
            ]
            trips, heights = zip(*sorted(points), strict=True)
            panel.plot(trips, heights, marker="o", label=name, linewidth=3 if ours else 1.5)
        _labelled(panel, f"full send over {rate / 1e6:,.0f} Mbit/s", "round-trip time, ms")
        panel.set_ylabel("MB of disk per second")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
    return figure


def _labelled(panel: Axes, title: str, below: str) -> None:
    panel.set_title(title, loc="left", fontsize="medium")
    panel.set_xlabel(below)
    panel.spines[["top", "right"]].set_visible(False)


def _saved(figure: Figure, stem: Path) -> list[Path]:
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(files[0], dpi=DPI)
    figure.savefig(files[1], metadata={"Date": None})
    return files
