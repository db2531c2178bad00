"""The units: systemd finds nothing wrong, they leave little open, and the daemons live with as few rights."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.agents.daemons import Site
from tests.agents.harness import BOUND_S, identical, make_disk
from tests.house.tree import ROOT

UNITS = ROOT / "systemd"
NAMES = ("replicator-master-target.service", "replicator-process-server.service")
NOBODY = 65534
# ProtectSystem=strict, ProcSubset=pid, ProtectProc=invisible by hand: only one folder can be written to.
SHUT_IN = (
    'mount --bind "$1" "$1" && mount -o remount,bind,ro / '
    '&& mount -t proc -o subset=pid,hidepid=2 proc /proc && shift && exec "$@"'
)
AS_NOBODY = (
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--no-new-privs",
    "--bounding-set=-all",
    "--inh-caps=-all",
)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ("systemd-analyze", "--no-pager", *arguments),
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND_S,
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as `make install` lays them down for a prefix that has the command."""
    prefix = tmp_path / "prefix"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "replicator").symlink_to(Path(sys.executable).with_name("replicator"))
    folder = tmp_path / "units"
    folder.mkdir()
    for name in NAMES:
        text = (UNITS / name).read_text().replace("/opt/replicator", str(prefix))
        (folder / name).write_text(text)
    return folder


def drop_in(folder: Path, name: str, sample: str) -> None:
    """Put a sample where its own text says that it goes."""
    below = folder / f"{name}.d"
    below.mkdir()
    shutil.copy(UNITS / "samples" / sample, below)


def exposure(unit: Path) -> float:
    done = analyze("security", "--offline=true", unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done
    return float(found[1])


@pytest.mark.peer("systemd-analyze")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sample", [None, "block-devices.conf", "credentials.conf"])
def test_systemd_finds_nothing_wrong(installed: Path, name: str, sample: str | None) -> None:
    if sample is not None:
        drop_in(installed, name, sample)
    done = analyze("verify", "--man=no", installed / name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.peer("systemd-analyze")
@pytest.mark.parametrize("name", NAMES)
def test_systemd_would_find_something_wrong(installed: Path, name: str) -> None:
    unit = installed / name
    unit.write_text(unit.read_text().replace("ProtectClock=yes", "ProtectClocks=yes"))
    assert "ProtectClocks" in analyze("verify", "--man=no", unit).stderr


@pytest.mark.peer("systemd-analyze")
@pytest.mark.parametrize("name", NAMES)
def test_little_is_left_open(installed: Path, name: str) -> None:
    assert exposure(installed / name) <= 1.2
    drop_in(installed, name, "block-devices.conf")
    assert exposure(installed / name) <= 1.5


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_runs_and_checks_the_command_that_there_is(name: str) -> None:
    text = (UNITS / name).read_text()
    daemon = name.removeprefix("replicator-").removesuffix(".service")
    start = f"/opt/replicator/bin/replicator {daemon} --config /etc/replicator/{daemon}.toml"
    assert f"\nExecStart={start}\n" in text
    assert f"\nExecStartPre={start} --check-config\n" in text


@pytest.mark.peer("systemd-sysusers", "systemd-tmpfiles")
def test_user_and_folders_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for tool, source in (("systemd-sysusers", "sysusers"), ("systemd-tmpfiles", "tmpfiles")):
        more = ("--create",) if source == "tmpfiles" else ()
        command = (tool, *more, f"--root={tmp_path}", UNITS / f"replicator.{source}")
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND_S)
        assert done.returncode == 0, done
    assert "replicator" in (tmp_path / "etc" / "passwd").read_text()
    kept = tmp_path / "srv" / "replicator" / "retention"
    assert kept.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of nobody's, where nobody else's parents are in the way."""
    if os.getuid() != 0:
        pytest.fail("needs root, to be nobody", pytrace=False)
    with tempfile.TemporaryDirectory(prefix="replicator-") as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield Path(folder)


@pytest.mark.peer("setpriv", "unshare", "qemu-img")
def test_the_daemons_live_without_a_single_right(home: Path) -> None:
    """As the units have it: another user, no capability, none to be had, nothing to write to but its own."""
    shut_in = (
        "unshare",
        "--mount",
        "--propagation=private",
        "--",
        "sh",
        "-c",
        SHUT_IN,
        "sh",
        str(home),
        *AS_NOBODY,
    )
    site = Site(home)
    os.chown(site.directory, NOBODY, NOBODY)
    source = make_disk(home / "disk.img", 1 << 20)
    source.chmod(0o644)
    with ExitStack() as running:
        running.enter_context(site.target(through=shut_in))
        groups = [site.group("web", source)]
        server = running.enter_context(site.process_server(groups, through=shut_in))
        server.process.said("is sealed")
        assert site.get(server, "/metrics").status == 200
    assert identical(source, site.directory / "disk.vmdk")
    assert (site.directory / "disk-flat.vmdk").stat().st_uid == NOBODY


# ------------------------------------------------------------------ make install


def install(destdir: Path | str, prefix: Path | str) -> subprocess.CompletedProcess[str]:
    arguments = (destdir, prefix, sys.executable, Path(sys.executable).parent)
    return subprocess.run(
        (ROOT / ".ci" / "install", *arguments), capture_output=True, text=True, check=False, timeout=1200
    )


@pytest.mark.parametrize("prefix", ["", "/", "relative"])
def test_a_prefix_that_is_none_is_refused(tmp_path: Path, prefix: str) -> None:
    done = install(tmp_path, prefix)
    assert done.returncode == 2 and "PREFIX" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_none_of_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "opt" / "mine").mkdir(parents=True)
    done = install(tmp_path, "/opt")
    assert done.returncode == 1 and "none of ours" in done.stderr
    assert (tmp_path / "opt" / "mine").exists()


@pytest.mark.release
@pytest.mark.timeout(1800)
def test_what_is_installed_runs_from_its_own_venv(tmp_path: Path) -> None:
    prefix = tmp_path / "opt" / "replicator"
    (tmp_path / "etc" / "replicator").mkdir(parents=True)
    mine = tmp_path / "etc" / "replicator" / "process-server.toml"
    mine.write_text("# mine")
    for _ in range(2):  # the second time it is an upgrade
        done = install(tmp_path, "/opt/replicator")
        assert done.returncode == 0, done
    assert (prefix / "bin" / "replicator").read_text().startswith("#!/opt/replicator/bin/python")
    sample = tmp_path / "etc" / "replicator" / "samples" / "process-server.toml"
    check = ("-I", "-m", "agents.cli", "process-server", "--config", sample, "--check-config")
    run = subprocess.run((prefix / "bin" / "python", *check), cwd="/", check=False, timeout=BOUND_S)
    assert run.returncode == 0
    units = tmp_path / "usr" / "lib" / "systemd" / "system"
    assert {path.name for path in units.iterdir()} == set(NAMES)
    assert mine.read_text() == "# mine"
