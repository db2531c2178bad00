"""kill -9 of either side at each durable step of a first send: nothing half-made is shown, and it goes on.

Not here: the sends after it, which go through a log (`test_kill_logged.py`).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from replicator.failpoints import NAMES
from tests.agents.harness import MIB, Done, half_made, identical, make_disk, receiving, send, sidecar

pytestmark = pytest.mark.peer("qemu-img")

KILLED = -9
FAMILIES = ("image.", "session.", "sidecar.", "replace.", "coverage.")
OF_THE_SENDER = ("epoch.", "send.")
LOGGED = ("log.", "seal.", "apply.")  # test_kill_logged.py
# test_joins.py, tests/azure, test_desired_state.py
ELSEWHERE = ("authority.", "token.", "join.", "snapshot.", "back.", "desired.")
# What a target replaces in the course of one start and one send.
REPLACED = {
    1: "authority",
    2: "tokens, one made",
    3: "tokens, one bound",
    4: "catalogue",
    5: "sidecar, dirty",
    6: "group, sealed",
    7: "descriptor",
    8: "sidecar, clean",
    9: "catalogue, sealed",
}
# Reached once in each of these steps; the first alone is in every run for the names that are not here.
TIMES = {
    "sidecar.before_mark": (1, 2),
    "sidecar.marked": (1, 2),
    "image.before_sync": (1,),
    "image.synced": (1,),
}
PUBLISHED = {"image.published", "session.sealed", "sidecar.before_mark:2", "sidecar.marked:2"} | {
    f"replace.{step}:{number}"
    for number in (7, 8, 9)
    for step in ("before_write", "before_fsync", "before_rename", "before_fsync_dir", "done")
    if number > 7 or step in ("before_fsync_dir", "done")
}


AFTER_THE_SEAL = {"epoch.before_publish", "epoch.published"}


def cases() -> list[Any]:
    """Every failpoint of the families; of `replace`, at each file that is replaced."""
    found: list[Any] = []
    for name in sorted(NAMES):
        if not name.startswith(FAMILIES):
            continue
        if name.startswith("replace."):
            for number, what in REPLACED.items():
                everyday = name == "replace.before_rename" or number == 5
                marks = () if everyday else (pytest.mark.release,)
                found.append(pytest.param(f"{name}:{number}", id=f"{name}, {what}", marks=marks))
        else:
            found += [f"{name}:{number}" if number > 1 else name for number in TIMES.get(name, (1,))]
    return found


def test_no_failpoint_is_forgotten() -> None:
    assert [
        name for name in NAMES if not name.startswith(FAMILIES + OF_THE_SENDER + LOGGED + ELSEWHERE)
    ] == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", 6 * MIB + 512, (0, MIB), (2 * MIB, MIB), (6 * MIB, 512))


def killed_at(failpoint: str, source: Path, tmp_path: Path) -> Done | None:
    """Start a target that dies at the failpoint, and send to it; None when it died before it listened."""
    with receiving(tmp_path / "target", failpoint=failpoint) as target:
        sent = None
        if target.address:
            sent = send(source, target.address, tmp_path / "state", token=target.token)
        assert target.process.wait().status == KILLED, "the failpoint was not reached"
    return sent


@pytest.mark.parametrize("failpoint", cases())
def test_a_target_killed_at_a_durable_step_shows_nothing_half_made_and_goes_on(
    failpoint: str, source: Path, tmp_path: Path
) -> None:
    directory, vmdk = tmp_path / "target", tmp_path / "target" / "disk.vmdk"
    sent = killed_at(failpoint, source, tmp_path)
    if sent is not None and sent.status != 0:
        assert sent.error["code"].startswith("link."), sent
    elif sent is not None:
        assert failpoint == "session.sealed", "the sender believes what was not said"
    assert vmdk.exists() == (failpoint in PUBLISHED)
    if vmdk.exists():
        assert identical(source, vmdk)
    with receiving(directory) as target:
        assert send(source, target.address, tmp_path / "state", token=target.token).ok
        assert identical(source, vmdk)
        assert sidecar(directory, "disk")["state"] == "clean"
        assert half_made(directory) == []


@pytest.mark.parametrize("failpoint", sorted(name for name in NAMES if name.startswith(OF_THE_SENDER)))
def test_a_sender_killed_at_a_durable_step_goes_on_by_the_same_command(
    failpoint: str, source: Path, tmp_path: Path
) -> None:
    with receiving(tmp_path / "target") as target:
        killed = send(source, target.address, tmp_path / "state", token=target.token, failpoint=failpoint)
        assert (killed.status, killed.stdout) == (KILLED, "")
        assert (target.directory / "disk.vmdk").exists() == (failpoint in AFTER_THE_SEAL)
        done = send(source, target.address, tmp_path / "state", token=target.token).ok
        assert done["fuzzy"] is False
        assert identical(source, target.directory / "disk.vmdk")
        assert sidecar(target.directory, "disk")["state"] == "clean"
        assert half_made(tmp_path) == []
        assert send(source, target.address, tmp_path / "state").ok["mode"] in ("incremental", "resync")


def test_numbers_and_epochs_are_never_given_out_twice(source: Path, tmp_path: Path) -> None:
    """Also when the target dies right after it wrote them down. Each time the sender begins a new epoch."""
    directory = tmp_path / "target"
    epochs = []
    for failpoint in ("sidecar.before_mark", "sidecar.marked", "session.before_sealed"):
        killed_at(failpoint, source, tmp_path)
        catalogue = json.loads((directory / ".replicator" / "catalogue.json").read_text())
        epochs.append(catalogue["next_epoch"])
        shutil.rmtree(tmp_path / "state" / "groups")
        assert [disk["number"] for disk in catalogue["disks"]] == [1]
    assert epochs == sorted(set(epochs))
