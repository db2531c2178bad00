"""Configurations: the samples are what they say, and a wrong one is told whole, not piece by piece."""

import os
import re
from pathlib import Path

import pytest

from agents.config import ProcessDaemonConfig, TargetDaemonConfig, load_process_server, load_target
from agents.send_config import AzureConfig
from protocol.constants import MIB
from replicator.desired import Disk
from replicator.errors import UsageError
from replicator.files import Files
from replicator.groups import Limits
from replicator.transport.dial import Address
from tests.agents.harness import run
from tests.house.tree import ROOT

SAMPLES = ROOT / "systemd" / "samples"
INVALID = sorted((SAMPLES / "invalid").glob("*.toml"))


def load(path: Path) -> ProcessDaemonConfig | TargetDaemonConfig:
    return (load_target if path.name.startswith("master-target") else load_process_server)(Files(), path)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def mistakes(path: Path) -> list[str]:
    """Each that is told; the message says how many there are."""
    with pytest.raises(UsageError) as caught:
        load(path)
    assert caught.value.code == "config.invalid"
    told = re.fullmatch(r"the configuration .* has (\d+) mistakes?: (.*)", caught.value.message, re.DOTALL)
    assert told is not None
    found = told[2].split("; ")
    assert len(found) == int(told[1])
    return found


def comments_taken_away(text: str) -> str:
    """The sample with all that is commented out in it."""
    return re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE)


# ------------------------------------------------------------------ samples


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_a_sample_is_valid(path: Path) -> None:
    load(path)


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_what_a_sample_has_in_comments_is_valid_and_mostly_the_default(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    found = load(written(tmp_path / path.name, comments_taken_away(path.read_text())))
    default = load(path)
    assert found.daemon == default.daemon
    if isinstance(found, ProcessDaemonConfig) and isinstance(default, ProcessDaemonConfig):
        assert (found.groups, found.at_once) == (default.groups, default.at_once)
        assert default.azure == AzureConfig()
    elif isinstance(found, TargetDaemonConfig) and isinstance(default, TargetDaemonConfig):
        assert found.target.limits.retention.keep_count == 100
        assert found.target.limits.log_bytes == default.target.limits.log_bytes


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.name)
def test_an_invalid_sample_is_told_every_mistake_at_once(path: Path) -> None:
    expected = re.findall(r"^# mistake: (.*)$", path.read_text(), re.MULTILINE)
    assert expected and mistakes(path) == sorted(expected)


# ------------------------------------------------------------------ what becomes of it


def test_a_process_server_is_told_its_groups() -> None:
    found = load_process_server(Files(), SAMPLES / "process-server.toml")
    assert found.groups is not None
    web, db = found.groups
    assert (web.name, web.peer.address, web.interval_s, web.jitter_s) == ("web", "10.0.0.5:9443", 300, 30)
    assert web.disks[0] == Disk("system", "/dev/disk/by-id/scsi-web-system")
    assert (web.streams, web.level, web.quiesced, web.generation) == (4, None, False, 0)
    assert db.disks[0].source.startswith("azure-disk://")
    assert found.tokens == {"10.0.0.5:9443": Path("/etc/replicator/join-token")}
    assert (found.daemon.listen, found.daemon.drain_s) == (Address("0.0.0.0", 9443), 30)
    assert (found.daemon.log.format, found.daemon.log.level) == ("json", "info")


def test_without_groups_they_come_from_the_kept_document() -> None:
    assert load_process_server(Files(), SAMPLES / "process-server-managed.toml").groups is None


def test_a_master_target_has_the_limits_of_receive(tmp_path: Path) -> None:
    lines = 'directory = "/d"\nretention = "/r"\n'
    found = load_target(Files(), written(tmp_path / "a.toml", lines))
    assert (found.target.limits, found.target.thin, found.token_file) == (Limits(), True, None)
    more = lines + 'thin = false\n[limits]\njournal_size = "512M"\nkeep_s = 60\nkeep_count = 3\n'
    found = load_target(Files(), written(tmp_path / "b.toml", more))
    assert (found.target.limits.log_bytes, found.target.thin) == (512 * MIB, False)
    assert (found.target.limits.retention.keep_s, found.target.limits.retention.keep_count) == (60, 3)


@pytest.mark.parametrize(("text", "level"), [("auto", None), ("off", 0), ("1", 1), ("19", 19)])
def test_compression_is_called_as_on_the_command_line(tmp_path: Path, text: str, level: int | None) -> None:
    lines = f'state = "/s"\n[[groups]]\nname = "a"\ntarget = "t"\ncompression = "{text}"\n'
    path = written(tmp_path / "a.toml", lines + 'disks = [{ name = "d", source = "/d" }]\n')
    groups = load_process_server(Files(), path).groups
    assert groups is not None and groups[0].level == level


def test_a_secret_may_be_a_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/replicator")
    lines = 'state = "/s"\n[[targets]]\naddress = "t:1"\ntoken_file = "join-token"\n'
    found = load_process_server(Files(), written(tmp_path / "a.toml", lines))
    assert found.tokens == {"t:1": Path("/run/credentials/replicator/join-token")}


def test_numbers_are_numbers(tmp_path: Path) -> None:
    for wrong in ("nan", "inf", "-1", "true", '"5"', "1979-05-27"):
        path = written(tmp_path / "a.toml", f'state = "/s"\ndrain_s = {wrong}\n')
        assert mistakes(path)[0] in ("drain_s: 0 to 3600 is wanted", "drain_s: a number is wanted"), wrong


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), (b"\xff", "UTF-8"), (b"#" * (1 << 21), "larger than")],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=why) as caught:
        load(path)
    assert caught.value.code == "config.unreadable"


def test_a_pipe_in_place_of_the_file_holds_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.toml")
    with pytest.raises(UsageError):
        load(tmp_path / "a.toml")


@pytest.mark.parametrize("daemon", ["master-target", "process-server"])
def test_check_config_looks_and_does_nothing_else(daemon: str, tmp_path: Path) -> None:
    good = SAMPLES / f"{daemon}.toml"
    assert run(daemon, "--config", good, "--check-config", "--json").ok == {
        "config": str(good),
        "valid": True,
    }
    bad = SAMPLES / "invalid" / f"{daemon}-many-mistakes.toml"
    done = run(daemon, "--config", bad, "--check-config", "--json")
    assert (done.status, done.error["code"]) == (2, "config.invalid")
    missing = run(daemon, "--config", tmp_path / "nothing.toml", "--check-config", "--json")
    assert (missing.status, missing.error["code"]) == (2, "config.unreadable")
