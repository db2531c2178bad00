"""``replicator bench``: the benchmark table on this machine, with every contender that is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from agents.cli.output import DONE, FAILED, document, say
from agents.cli.sizes import parse_size
from replicator.errors import ReplicatorError


def bench(  # noqa: PLR0913, PLR0917 - one parameter an option
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything: under three minutes.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A part: full, resync, line, log, stages or micro. May be repeated. "
            "Default: all, with --quick all but log."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of the disk, such as 512M or 4G. Default: 4G, with --quick 1G.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Of full and resync. Default: 5, with --quick 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the disk, its changes and the losses.")] = 1,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", readable=False, help="For disks, removed at the end. Default: below /var/tmp."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(readable=False, help="File for everything measured, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(readable=False, help="Directory for plots, PNG and SVG. Takes matplotlib.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, no table.")] = False,
) -> int:
    """Measure Replicator and its peers on this machine: whole commands, interleaved rounds, medians.

    With root, everything runs in network namespaces of its own; without, lines are left out.
    """
    from bench import report, suite
    from bench.errors import BenchError
    from bench.options import PARTS, QUICK_PARTS, Options
    from bench.plot import draw, ready

    options = Options(
        size_bytes=None if size is None else parse_size("--size", size),
        rounds=rounds,
        parts=tuple(only) if only else QUICK_PARTS if quick else PARTS,
        quick=quick,
        seed=seed,
        directory=directory,
    )
    try:
        if plot is not None:
            ready()
        found = suite.run(options, say)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if as_json:
            document(found)
        else:
            report.show(found)
        if plot is not None:
            for file in draw(found, plot):
                say(f"drawn: {file}")
    except (BenchError, OSError) as error:
        raise ReplicatorError(
            "bench.failed",
            f"the benchmark cannot be run: {error}",
            cause="something that it needs is missing here, as the message says",
            fix="see to that, or leave the part out: --only",
        ) from None
    return FAILED if report.failures(found) else DONE
