"""kill -9 of a real process at each durable step of a log, on a real file system; it is then opened anew."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from replicator.failpoints import NAMES
from replicator.files import Files
from replicator.log.gather import Frame
from replicator.log.log import Kind, Log
from tests.house.tree import ROOT
from tests.replicator.log.batches import EPOCH, KIB, SEED, directory, frame, held, plain

SEGMENT_BYTES = 64 * KIB
BATCHES = 8

# Says each step before it is begun and after it is done: what was said is what was promised.
WRITER = """
import sys
from pathlib import Path
from replicator.files import Files
from replicator.log.log import Kind, Log, remove
from tests.replicator.log import test_log_kill as this

def say(*words):
    print(*words, flush=True)

with this.directory(Path(sys.argv[1])) as dir_fd:
    say("create")
    log = Log.create(Files(), dir_fd, Kind.REDO, this.EPOCH, this.SEED, segment_bytes=this.SEGMENT_BYTES)
    for note in range(1, this.BATCHES + 1):
        say("write", note)
        log.write(this.content(note), note)
        say("written", note, log.segments()[-1])
    say("roll")
    log.roll()
    for segment in log.segments()[:2]:
        say("drop", segment)
        log.drop(segment)
        say("dropped", segment)
    say("finish")
    log.finish()
    say("finished")
    log.close()
    say("remove")
    remove(Files(), dir_fd, Kind.REDO, this.EPOCH)
    say("removed")
"""


def content(note: int) -> list[Frame]:
    """The batch of this note, in every process the same."""
    rng = random.Random(note)
    return [frame(rng, rng.choice((0, 512, 20 * KIB))) for _ in range(2)]


def killed(path: Path, failpoint: str) -> list[list[str]]:
    """What the writer said until it was killed there; all of it where it was not."""
    done = subprocess.run(
        [sys.executable, "-c", WRITER, path],
        env={**os.environ, "FAILPOINT": failpoint},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == (0 if said[-1] == ["removed"] else -signal.SIGKILL), done.stderr
    return said


TIMES = {
    "log.before_create": (1, 2),
    "log.created": (1, 2),
    "log.before_write": (1, 5),
    "log.written": (1, BATCHES),
    "log.before_finish": (1, 3),
    "log.finished": (1, 3),
    "log.before_drop": (1, 2, 4),
    "log.dropped": (1, 2, 3),
}


def test_no_failpoint_of_the_log_is_forgotten() -> None:
    assert set(TIMES) == {name for name in NAMES if name.startswith("log.")}


@pytest.mark.parametrize("failpoint", [f"{name}:{nth}" for name, times in TIMES.items() for nth in times])
def test_a_writer_killed_at_a_durable_step_leaves_all_that_it_promised(
    tmp_path: Path, failpoint: str
) -> None:
    path = tmp_path / "log"
    said = killed(path, failpoint)
    last = said[-1]
    assert last != ["removed"], "the failpoint was not reached"
    promised = {int(words[1]): int(words[2]) for words in said if words[0] == "written"}
    gone = {int(words[1]) for words in said if words[0] == "dropped"}
    notes = [note for note, segment in promised.items() if segment not in gone]
    possible = [notes]
    if last[0] == "write":
        with_it = [*notes, int(last[1])]
        certain = {"log.written": [with_it], "log.before_write": [notes]}
        possible = certain.get(failpoint.split(":", maxsplit=1)[0], [notes, with_it])
    elif last[0] == "drop":
        possible.append([note for note in notes if promised[note] != int(last[1])])
    with directory(path) as dir_fd:
        if last[0] == "remove":
            beginning(dir_fd, notes)
            return
        log = Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        if log is None:
            assert last == ["create"]
            return
        found = [(frozenset(each), plain([content(note) for note in each])) for each in possible]
        assert (log.notes(), held(log)) in found
        if ["finish"] not in said:
            log.write(content(99), 99)
            assert held(log)[-2:] == plain([content(99)])
        log.finish()
        log.close()


def beginning(dir_fd: int, notes: list[int]) -> None:
    """What is left of a removal is the beginning of the log, or nothing."""
    log = Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
    if log is not None:
        left = sorted(log.notes())
        assert left == notes[: len(left)]
        assert held(log) == plain([content(note) for note in left])
        log.close()


def test_a_writer_that_is_not_killed_says_all(tmp_path: Path) -> None:
    said = killed(tmp_path / "log", "")
    assert said[-1] == ["removed"]
    assert [words for words in said if words[0] == "dropped"] == [["dropped", "1"], ["dropped", "2"]]
    assert list((tmp_path / "log").iterdir()) == []
