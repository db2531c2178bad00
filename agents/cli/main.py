"""The ``replicator`` command: its subcommands, and the one place where errors become exit statuses."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

import typer
from typer.exceptions import TyperException

from agents.cli import bench, control, demo, master_target, process_server, receive, recovery_points, send
from agents.cli.output import DONE, report, stopped_by
from replicator.errors import ReplicatorError, UsageError

app = typer.Typer(
    help="Brings machines that run in Azure home to VMware.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich costs a tenth of a second, and plain help can be searched and piped
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("receive")(receive.receive)
app.command("send")(send.send)
app.command("recovery-points")(recovery_points.recovery_points)
app.command("master-target")(master_target.master_target)
app.command("process-server")(process_server.process_server)
app.add_typer(control.app, name="control")
app.command("bench")(bench.bench)


@app.callback()
def options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what happens, to stderr."),
) -> None:
    """Options before the command's name."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def _stop(number: int, _: FrameType | None) -> None:
    raise stopped_by(signal.Signals(number).name)


def main() -> None:
    """Entry point of the console script."""
    as_json = "--json" in sys.argv[1:]
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # until the event loop takes them
        signal.signal(number, _stop)
    try:
        status = app(standalone_mode=False) or DONE
    except ReplicatorError as error:
        status = report(error, as_json=as_json)
    except TyperException as error:
        status = report(
            UsageError(
                "usage.arguments",
                error.format_message().rstrip(".") or "no command was given",
                cause="the command line does not fit the command",
                fix="see --help",
            ),
            as_json=as_json,
        )
    sys.exit(status)
