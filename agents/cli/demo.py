"""``replicator demo``: shows everything on this machine, and proves it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agents.cli.output import DONE, FAILED, document, in_units, say
from replicator.errors import UsageError

if TYPE_CHECKING:
    from agents.demo import DemoReport


def demo(
    source: Annotated[
        Path | None,
        typer.Option(readable=False, help="A disk of yours, only read. Default: a small ext4 disk is made."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir", readable=False, help="Where the VMDK shall lie. Default: a new one below /var/tmp."
        ),
    ] = None,
    azure: Annotated[
        bool, typer.Option("--azure", help="The disk lies in a page blob of Azurite; it goes home and back.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Send a disk to a master target here, be killed, go on, send the difference, prove the VMDK."""
    from agents.demo import demonstrate
    from agents.lifecycle import run

    if azure and source is not None:
        raise UsageError(
            "usage.demo",
            "--azure and --source were both given",
            cause="with --azure the demonstration changes the disk, so it makes its own",
            fix="leave one of them out",
        )
    report = run(demonstrate(source, directory, say, azure=azure))
    if as_json:
        document(asdict(report))
    else:
        _table(report)
    return DONE if report.verified else FAILED


def _table(report: DemoReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="verified: source and VMDK are equal" if report.verified else "NOT VERIFIED")
    for heading in ("step", "read", "zero", "matched", "sent", "seconds"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for _ in range(report.kills):
        table.add_row("full send, killed half-way (kill -9)", *["" for _ in range(5)])
    for step in report.steps:
        sizes = (in_units(step[f"{what}_bytes"]) for what in ("read", "zero", "matched", "sent"))
        table.add_row(f"{step['mode']} send", *sizes, f"{step['seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"SHA-256   {report.digest}", soft_wrap=True)
    console.print(f"qemu-img  {report.qemu_img}", soft_wrap=True)
    if report.way_back:
        console.print(f"way back  {report.way_back}", soft_wrap=True)
    console.print(f"VMDK      {report.vmdk}", soft_wrap=True)
