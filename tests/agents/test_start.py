"""The command line starts fast, and imports nothing heavy on the way to `send`, `receive` and `demo`."""

import json
import subprocess
import sys
import time

import pytest

from tests.agents.harness import BOUND_S, COMMAND
from tests.house.tree import ROOT

HEAVY = {"aiohttp", "alembic", "azure", "dbos", "psycopg", "pydantic", "pyvmomi", "pyVmomi", "sqlalchemy"}
# Showing help needs no loop, TLS, codec or colours.
NOT_FOR_HELP = {"asyncio", "cryptography", "rich", "ssl", "uvloop", "xxhash", "zstandard"}
HELP_MODULES_MAX = 150
HELP_EXTRA_S = 0.25
ROUNDS_MAX = 40

LOADED = """
import json, sys
from agents.cli.main import main
sys.argv = ["replicator", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
sys.stderr.write(json.dumps(sorted(sys.modules)))
"""
IMPORTED = """
import json, sys
import agents.cli.demo, agents.cli.main, agents.cli.progress, agents.cli.receive, agents.cli.send
import agents.demo, agents.lifecycle, agents.master_target, agents.process_server
sys.stderr.write(json.dumps(sorted(sys.modules)))
"""


def modules_after(*command: str) -> set[str]:
    done = subprocess.run(
        (sys.executable, "-c", *command),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=BOUND_S,
    )
    return set(json.loads(done.stderr))


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("command", ["send", "receive", "demo"])
def test_help_loads_nothing_heavy(command: str) -> None:
    names = modules_after(LOADED, command, "--help")
    assert "agents.cli.send" in names
    assert tops(names) & (HEAVY | NOT_FOR_HELP) == set()


def test_what_send_receive_and_demo_run_on_loads_nothing_heavy() -> None:
    names = modules_after(IMPORTED)
    assert "replicator.sender" in names and "replicator.receiver" in names
    assert tops(names) & HEAVY == set()


def test_help_loads_few_modules() -> None:
    """Timing is noisy; this is not: a new import that matters shows here first."""
    bare = modules_after("import json, sys; sys.stderr.write(json.dumps(sorted(sys.modules)))")
    assert len(modules_after(LOADED, "send", "--help") - bare) <= HELP_MODULES_MAX


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=BOUND_S)
    return time.perf_counter() - began


def test_help_is_there_a_quarter_of_a_second_after_a_bare_interpreter() -> None:
    """The minimum of interleaved runs: a busy machine makes some runs slow, never one too fast."""
    bare = helped = float("inf")
    for _ in range(ROUNDS_MAX):
        bare = min(bare, seconds(sys.executable, "-c", "pass"))
        helped = min(helped, seconds(*COMMAND, "send", "--help"))
        if helped - bare <= HELP_EXTRA_S:
            return
    pytest.fail(f"send --help takes {helped:.3f} s, a bare interpreter {bare:.3f} s")
