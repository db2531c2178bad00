"""Tables from the document of a benchmark: on a terminal, or as Markdown for docs/performance.md.

    python -m bench.report results.json [FOLDER]      Markdown on stdout; plots into FOLDER

Not here: any figure's origin (``results.py``, ``stages.py``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.log import figures

MB, GB, MIB, GIB = 1e6, 1e9, 1 << 20, 1 << 30
COLUMNS = (
    "contender",
    "s, median",
    "s, spread",
    "MB/s",
    "x best peer",
    "wire MB",
    "CPU s/GB",
    "peak memory, MB",
)
ABSENT = ("not installed", "needs")  # how these problems begin; all others are failures
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: its first column is text, the others are figures (the last one of contenders is text, too)."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets(document: Document) -> Iterator[Sheet]:
    """All tables of a document."""
    for scenario in document["scenarios"]:
        yield _scenario(scenario)
    if document["log"] is not None:
        told = tuple(figures.row(figure) for figure in document["log"]["figures"])
        yield Sheet("the log", ("figure", "measured", "wanted", "met"), told)
    if document["azure"] is not None:
        yield _reads(document["azure"])
    stages = document["stages"]
    if stages is not None:
        yield _rates(stages)
        yield _ideals(stages)
    if document["micro"] is not None:
        rows = tuple((rate["stage"], f"{rate['bytes_per_s'] / MB:,.0f}") for rate in document["micro"])
        yield Sheet("functions of the product, one core", ("function", "MB/s"), rows)


def heading(document: Document) -> str:
    """What machine it was, in a paragraph."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_bytes'] / GIB:.0f} GiB of memory, "
        f"Linux {machine['kernel']}, {machine['file_system']}, TCP {machine['congestion_control']}.",
        f"{versions}.",
        f"Page cache warm for all; everyone's data fdatasync'ed. Seed {document['seed']}. "
        f"The whole run took {document['seconds']:.0f} s.",
        *(f"Note: {remark}." for remark in [*document["remarks"], *document["failed"]]),
    ]
    return "\n".join(lines)


def missing(document: Document) -> list[str]:
    """Contenders that could not take part, with the reason."""
    return sorted(
        {f"{each['name']}: {each['problem']}" for each in _without_figures(document) if _absent(each)}
    )


def failures(document: Document) -> list[str]:
    """Where Replicator itself did not do what it should, with the reason."""
    found = [each for each in _without_figures(document) if each["ours"] and not _absent(each)]
    return [*document["failed"], *(f"{each['name']}: {each['problem']}" for each in found)]


def _without_figures(document: Document) -> list[Document]:
    return [
        each
        for scenario in document["scenarios"]
        for each in scenario["standings"]
        if each["problem"] is not None
    ]


def _absent(each: Document) -> bool:
    return bool(each["problem"].startswith(ABSENT))


def _scenario(scenario: Document) -> Sheet:
    line = scenario["line"] is not None
    headings = (*COLUMNS[:5], "line use", *COLUMNS[5:]) if line else COLUMNS
    title = (
        f"{scenario['title']}: {scenario['size_bytes'] / MIB:,.0f} MiB, "
        f"{scenario['data_bytes'] / MIB:,.0f} of it data, rounds: {scenario['rounds']}"
    )
    rows = tuple(_row(each, line, len(headings)) for each in scenario["standings"])
    return Sheet(title, headings, rows)


def _row(each: Document, line: bool, width: int) -> tuple[str, ...]:
    if each["problem"] is not None:
        return (each["name"], *[""] * (width - 2), each["problem"])
    peaks = sorted(each["peak_bytes"].items(), key=lambda pair: -pair[1])
    figures = [
        each["name"],
        f"{each['seconds']:.2f}",
        f"{each['seconds_min']:.2f} - {each['seconds_max']:.2f}" if len(each["runs"]) > 1 else "",
        f"{each['mb_s']:,.0f}",
        "" if each["ratio"] is None else f"{each['ratio']:.2f}",
        *([f"{each['line_use']:.0%}"] if line else []),
        f"{each['wire_bytes'] / MB:,.1f}",
        f"{each['cpu_s_per_gb']:.2f}",
        ", ".join(f"{name} {peak / MB:.0f}" for name, peak in peaks if peak),
    ]
    return tuple(figures)


def _reads(reads: Document) -> Sheet:
    rows = tuple(
        (name, f"{reads['data_bytes'] / median(seconds) / MB:,.0f}", ratio)
        for name, seconds, ratio in (
            ("Replicator's source", reads["ours_s"], f"{reads['ratio']:.2f}"),
            ("the vendor's SDK, ranges side by side", reads["bare_s"], "1.00"),
        )
    )
    return Sheet("page blob reads, emulator on loopback", ("reader", "MB/s", "x the SDK"), rows)


def _rates(stages: Document) -> Sheet:
    rows = [(rate["name"], f"{rate['bytes_per_s'] / MB:,.0f}") for rate in stages["rates"]]
    rows.append(("writer, by the clock", f"{stages['write_bytes_s'] / MB:,.0f}"))
    return Sheet("stages, one core", ("stage", "MB/s"), tuple(rows))


def _ideals(stages: Document) -> Sheet:
    rows = []
    for ideal in stages["ideals"]:
        name = f"zstd {ideal['level']}" if ideal["level"] else "not compressed"
        rows.append((name, f"{ideal['ratio']:.2f}", f"{ideal['cpu_s']:.2f}", f"{ideal['write_s']:.2f}",
                     f"{ideal['seconds']:.2f}", f"{ideal['mb_s']:,.0f}", ""))  # fmt: skip
    rows += [(name, "", "", "", "", "", f"{share:.0%}") for name, share in stages["shares"].items()]
    headings = ("full send", "wire/data", "CPU s", "write s", "ideal s", "ideal MB/s", "our share")
    return Sheet(
        f"what the stages allow on {stages['cores']} cores, overlapped perfectly", headings, tuple(rows)
    )


# ------------------------------------------------------------------ where they go


def show(document: Document) -> None:
    """All tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(heading(document), markup=False, highlight=False)
    for sheet in sheets(document):
        table = Table(title=sheet.title, title_justify="left")
        for number, name in enumerate(sheet.headings):
            is_text = number == 0 or name == COLUMNS[-1]
            table.add_column(name, justify="left" if is_text else "right", overflow="fold")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table, markup=False)
    for line in missing(document):
        console.print(f"not measured: {line}", markup=False, highlight=False)


def markdown(document: Document) -> str:
    """All tables as Markdown."""
    parts = [heading(document)]
    for sheet in sheets(document):
        rule = tuple("---" if name in (sheet.headings[0], COLUMNS[-1]) else "---:" for name in sheet.headings)
        lines = ["| " + " | ".join(row) + " |" for row in (sheet.headings, rule, *sheet.rows)]
        parts.append(f"**{sheet.title}**\n\n" + "\n".join(lines))
    parts += [f"Not measured: {line}" for line in missing(document)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """``python -m bench.report``."""
    from bench.plot import draw

    arguments = sys.argv[1:]
    if len(arguments) not in (1, 2):
        sys.exit("usage: python -m bench.report RESULTS.json [FOLDER]")
    document = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    print(markdown(document), end="")
    if len(arguments) == 2:
        draw(document, Path(arguments[1]))


if __name__ == "__main__":
    main()
