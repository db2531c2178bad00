"""Every bad input of docs/errors.md through the real commands: what is told, and what is left on disk."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol.errors import WireCode
from protocol.messages import NO_ID, Consistency, Fail, Hello, Mode, Open, OpenDisk, Welcome
from tests.agents.bad_inputs import SCENARIOS, Case
from tests.agents.errors_page import BadInput, bad_inputs
from tests.agents.fake_peer import fake_sender
from tests.agents.harness import (
    MIB,
    Target,
    half_made,
    identical,
    make_disk,
    receiving,
    send,
    sending,
    sidecar,
    tree,
)
from tests.agents.holding import relay

pytestmark = pytest.mark.peer("qemu-img", "mkfs.ext4", "losetup", "mount", "setpriv")

ROWS = bad_inputs()


@dataclass(frozen=True, slots=True)
class Site:
    """A master target at work with one sealed disk, `kept`, and the process server that sent it."""

    target: Target
    source: Path
    state: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    source = make_disk(folder / "kept.img", MIB)
    with receiving(folder / "target") as target:
        assert send(source, target.address, folder / "state", token=target.token).ok
        yield Site(target, source, folder / "state")


# ------------------------------------------------------------------ the states of the table


def nothing_changed(case: Case) -> None:
    assert tree(case.watched) == case.before


def half_disk(case: Case) -> None:
    flat, card = f"{case.disk}-flat.vmdk", f"{case.disk}.replica.json"
    after = tree(case.watched)
    assert after.keys() - case.before.keys() == {flat, card}
    assert {name: after[name] for name in case.before} == case.before
    assert sidecar(case.watched, case.disk)["state"] == "dirty"


STATES: dict[str, Callable[[Case], None]] = {
    "nothing changed": nothing_changed,
    "half disk": half_disk,
}


# ------------------------------------------------------------------ the table


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.input)
def test_a_bad_input_is_refused_as_the_page_says(row: BadInput, site: Site, tmp_path: Path) -> None:
    with ExitStack() as stack:
        case = Case(site.target, site.state, tmp_path, stack)
        done = SCENARIOS[row.input](case)
        error = done.error
        assert (error["code"], done.status) == (row.code, row.status), error
        assert row.tells(error["message"]), error["message"]
        STATES[row.state](case)
        assert half_made(case.watched) == []
    assert not site.target.process.ended
    assert identical(site.source, site.target.directory / "kept.vmdk")


def test_every_row_has_a_scenario_and_every_scenario_a_row() -> None:
    assert sorted(row.input for row in ROWS) == sorted(SCENARIOS)


def test_a_row_is_no_match_for_another_message() -> None:
    row = BadInput("", "", "there is no …/nothing.img", 1, "")
    assert row.tells("there is no /a/nothing.img")
    assert not row.tells("there is no /a/nothing.img today")
    assert not row.tells("there is no (nothing)")


# ------------------------------------------------------------------ what only another sender can send


def test_a_sender_of_another_version_is_told_both_ranges(site: Site) -> None:
    with fake_sender(site.state, site.target.address) as talk:
        talk.connection.send(Hello(version_min=2, version_max=3))
        talk.flush()
        answer = talk.hear()
    assert isinstance(answer, Fail)
    assert answer.code == WireCode.VERSION
    assert "2 to 3" in answer.message and "1 to 1" in answer.message


@pytest.mark.parametrize("name", ["../x", "..", "a\0b", ".hidden", "", "x" * 255, "a/b", "line\nbreak"])
def test_the_target_refuses_names_that_a_sender_did_not_check(name: str, site: Site) -> None:
    before = tree(site.target.directory)
    with fake_sender(site.state, site.target.address) as talk:
        talk.connection.send(Hello())
        talk.flush()
        assert isinstance(talk.hear(), Welcome)
        disks = (OpenDisk(name, MIB),)
        talk.connection.send(Open("group", b"", bytes(16), NO_ID, Mode.FULL, Consistency.FUZZY, 0, disks))
        talk.flush()
        answer = talk.hear()
    assert isinstance(answer, Fail)
    assert answer.code == "disk.bad_name"
    assert answer.message and answer.cause and answer.fix
    assert tree(site.target.directory) == before


# ------------------------------------------------------------------ two at once


def test_two_targets_cannot_write_the_same_disk_whatever_their_retention(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", 16 * MIB)
    (tmp_path / "other").mkdir()
    other = make_disk(tmp_path / "other" / "disk.img", 16 * MIB)
    with (
        receiving(tmp_path / "target") as first,
        receiving(tmp_path / "target", "--retention", tmp_path / "another") as second,
        relay(first.port, hold_after=4 * MIB) as held,
        sending(disk, held.address, tmp_path / "state", token=first.token) as process,
    ):
        held.wait_until_holding()
        refused = send(other, second.address, tmp_path / "state2", token=second.token)
        assert refused.error["code"] == "target.in_use", refused
        held.release()
        assert process.wait().ok
        assert identical(disk, first.directory / "disk.vmdk")


# ------------------------------------------------------------------ afterwards


def test_a_half_disk_is_finished_by_the_same_command(tmp_path: Path) -> None:
    source = make_disk(tmp_path / "disk.img", 4 * MIB)
    with receiving(tmp_path / "target") as target:
        (target.directory / "disk-flat.vmdk").touch()
        with (target.directory / "disk-flat.vmdk").open("r+b") as file:
            file.truncate(4 * MIB)
        assert send(source, target.address, tmp_path / "state", token=target.token).ok
        assert sidecar(target.directory, "disk")["state"] == "clean"
        assert identical(source, target.directory / "disk.vmdk")
