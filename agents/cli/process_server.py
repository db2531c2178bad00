"""``replicator process-server``: the daemon."""

from __future__ import annotations

from functools import partial

from agents.cli.daemon_options import AsJson, CheckConfig, ConfigFile, tell_valid
from agents.cli.output import document


def process_server(config: ConfigFile, check_config: CheckConfig = False, as_json: AsJson = False) -> None:
    """Run a process server as a service: it sends its groups again and again, by their intervals.

    SIGTERM ends it in order, SIGHUP reads the configuration again.
    """
    from agents.config import load_process_server
    from replicator.files import Files

    found = load_process_server(Files(), config)
    if check_config:
        return tell_valid(config, as_json)
    from agents.daemon import run
    from agents.process_daemon import ProcessDaemon

    return run(partial(ProcessDaemon, config, found), found.daemon, document if as_json else lambda _: None)
