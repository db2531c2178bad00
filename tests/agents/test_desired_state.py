"""The kept document: replaced whole, there after any crash, never half believed."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agents import desired_state
from replicator.desired import Desired, DesiredError, encode
from replicator.errors import StateError
from replicator.files import Files
from replicator.private_directory import PrivateDirectory
from tests.replicator.test_desired import DOCUMENT, GROUP
from tests.replicator.trust import ROOT

NEWER = replace(DOCUMENT, revision=42)


@pytest.fixture
def state(tmp_path: Path) -> PrivateDirectory:
    return PrivateDirectory(Files(), tmp_path / "state")


def test_where_nothing_was_kept_nothing_is_to_be_done(state: PrivateDirectory) -> None:
    assert desired_state.load(state) == Desired(0)


def test_what_was_kept_is_found(state: PrivateDirectory) -> None:
    desired_state.keep(state, DOCUMENT)
    desired_state.keep(state, NEWER)
    assert desired_state.load(state) == NEWER
    assert (state.path / desired_state.FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("failpoint", "found"),
    [("desired.before_keep", DOCUMENT), ("replace.before_rename", DOCUMENT), ("desired.kept", NEWER)],
)
def test_after_a_crash_it_is_the_old_one_or_the_new(
    state: PrivateDirectory, failpoint: str, found: Desired
) -> None:
    desired_state.keep(state, DOCUMENT)
    program = (
        "import sys; from pathlib import Path; from agents import desired_state; "
        "from replicator.desired import decode; from replicator.files import Files; "
        "from replicator.private_directory import PrivateDirectory; "
        "desired_state.keep(PrivateDirectory(Files(), Path(sys.argv[1])), decode(sys.stdin.buffer.read()))"
    )
    done = subprocess.run(
        (sys.executable, "-c", program, state.path),
        input=encode(NEWER),
        env={"FAILPOINT": failpoint},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert desired_state.load(state) == found


def test_a_damaged_one_is_told_and_left(state: PrivateDirectory) -> None:
    desired_state.keep(state, DOCUMENT)
    kept = state.path / desired_state.FILE
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(StateError) as caught:
        desired_state.load(state)
    assert caught.value.code == "desired.damaged" and str(kept) in caught.value.message
    assert kept.exists()


def test_what_is_none_is_not_kept(state: PrivateDirectory) -> None:
    desired_state.keep(state, DOCUMENT)
    with pytest.raises(DesiredError):
        desired_state.keep(state, Desired(43, (replace(GROUP, streams=0),)))
    assert desired_state.load(state) == DOCUMENT
