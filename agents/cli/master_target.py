"""``replicator master-target``: the daemon."""

from __future__ import annotations

from functools import partial

from agents.cli.daemon_options import AsJson, CheckConfig, ConfigFile, tell_valid
from agents.cli.output import document


def master_target(config: ConfigFile, check_config: CheckConfig = False, as_json: AsJson = False) -> None:
    """Run a master target as a service: it receives disks into VMDKs, and answers for its health.

    SIGTERM ends it in order, SIGHUP reads the configuration again.
    """
    from agents.config import load_target
    from replicator.files import Files

    found = load_target(Files(), config)
    if check_config:
        return tell_valid(config, as_json)
    from agents.daemon import run
    from agents.target_daemon import TargetDaemon

    return run(partial(TargetDaemon, config, found), found.daemon, document if as_json else lambda _: None)
