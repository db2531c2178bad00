"""The SDKs of Azure, half a second of imports, are loaded only by those who read from Azure."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agents.harness import BOUND_S, MIB, make_disk, receiving
from tests.azure.azurite import Disk
from tests.azure.diff_proxy import RunningProxy
from tests.house.tree import ROOT

SDKS = {"aiohttp", "azure", "msal", "requests"}
LOADED = """
import json, sys
from agents.cli.main import main
sys.argv = ["replicator", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    status = ended.code
sys.stdout.write(json.dumps([status, sorted(sys.modules)]))
"""


def loaded_by(*command: str | Path, stdin: str = "", status: int = 0) -> set[str]:
    """The top-level modules that a command has loaded when it ends."""
    done = subprocess.run(
        (sys.executable, "-c", LOADED, *map(str, command)),
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
        timeout=BOUND_S,
    )
    ended, modules = json.loads(done.stdout.splitlines()[-1])
    assert ended == status, done.stderr
    return {name.split(".")[0] for name in modules}


def test_a_file_and_its_recovery_points_need_none(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    with receiving(tmp_path / "target") as target:
        options = ("--to", target.address, "--state", tmp_path / "state", "--token-file", "-")
        assert not SDKS & loaded_by("send", disk, *options, stdin=target.token)
        loaded = Path(f"/proc/{target.process.pid}/maps").read_text()
    assert "aiohttp" not in loaded  # whose parts in C would be mapped
    assert not SDKS & loaded_by("recovery-points", "--directory", tmp_path / "target")


def test_a_master_target_that_cannot_begin_has_loaded_none(tmp_path: Path) -> None:
    assert not SDKS & loaded_by("receive", "--directory", tmp_path / "nowhere", status=1)


@pytest.mark.peer("azurite")
def test_a_blob_needs_them_but_not_those_of_identities(
    new_disk: Callable[..., Disk], proxy: RunningProxy, tmp_path: Path
) -> None:
    """The other side of the coin: this test would notice them."""
    credentials = tmp_path / "credentials"
    credentials.write_text(proxy.connection_string)
    with receiving(tmp_path / "target") as target:
        options = ("--to", target.address, "--state", tmp_path / "state", "--token-file", "-")
        given = ("--azure-credentials", credentials)
        found = loaded_by("send", new_disk(MIB).address, *options, *given, stdin=target.token)
    assert {"aiohttp", "azure"} <= found and "msal" not in found
