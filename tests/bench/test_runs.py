"""Runs of contenders of our own making: who delivers something else, fails, hangs or is missing has no
figure.
"""

from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import pytest

from bench import runs
from bench.contenders import Contender, Job
from bench.processes import Crowd
from bench.results import Run
from bench.runs import Place, Scenario, loopback, order, rounds

SIZE = 1 << 20
LIMIT_S = 20.0


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with loopback(tmp_path, own=False) as found:
        yield found


def contender(name: str, *command: str, programs: tuple[str, ...] = (), **more: object) -> Contender:
    """A copy by a command with `$SOURCE` and `$TARGET`."""

    def send(job: Job, crowd: Crowd) -> None:
        paths = {"SOURCE": str(job.source), "TARGET": str(job.target)}
        crowd.finish(crowd.start(name, command, environment=paths))

    return Contender(name, programs, lambda job, crowd: None, send, **more)  # type: ignore[arg-type]


def honest(name: str) -> Contender:
    return contender(name, "sh", "-c", 'cat "$SOURCE" > "$TARGET"')


def outcome(
    tmp_path: Path, place: Place, *found: Contender, limit_s: float = LIMIT_S, budget_s: float = inf
) -> dict[str, list[Run]]:
    source = tmp_path / "source.img"
    source.write_bytes(b"x" * SIZE)
    said: list[str] = []
    scenario = Scenario("key", "title", "full", source, None, SIZE, found, 2, limit_s, budget_s)
    try:
        return rounds(scenario, place, tmp_path, said.append)
    finally:
        assert said, "nothing was told"
        assert not (tmp_path / "room").exists()


def test_an_honest_copy_has_figures_every_round(tmp_path: Path, place: Place) -> None:
    found = outcome(tmp_path, place, honest("a"))["a"]
    assert [run.round for run in found] == [0, 1]
    assert all(run.problem is None and run.seconds > 0 and run.cpu_s and run.peak_bytes for run in found)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ('printf y > "$TARGET"; tail -c +2 "$SOURCE" >> "$TARGET"', "wrong data: other bytes"),
        ('head -c 4096 "$SOURCE" > "$TARGET"', "wrong data: 4096 bytes instead of 1048576"),
        ("echo out of luck >&2; exit 7", "failed: bad ended with 7: out of luck"),
    ],
    ids=["other byte", "too short", "failing"],
)
def test_who_does_not_deliver_has_none_and_is_not_run_again(
    tmp_path: Path, place: Place, command: str, problem: str
) -> None:
    found = outcome(tmp_path, place, contender("bad", "sh", "-c", command), honest("good"))
    assert len(found["bad"]) == 1
    assert (found["bad"][0].problem or "").startswith(problem)
    assert [run.problem for run in found["good"]] == [None, None]


def test_who_hangs_is_stopped(tmp_path: Path, place: Place) -> None:
    found = outcome(tmp_path, place, contender("slow", "sleep", "60"), limit_s=0.1)
    assert (found["slow"][0].problem or "").startswith("stopped: more than")


def test_who_is_not_installed_is_named_with_what_is_missing(tmp_path: Path, place: Place) -> None:
    absent = contender("absent", "sh", programs=("sh", "no-such-program"))
    found = outcome(tmp_path, place, absent)
    assert [run.problem for run in found["absent"]] == ["not installed: no-such-program"]


def test_who_does_something_else_than_its_name_says_has_no_figure(tmp_path: Path, place: Place) -> None:
    other = contender("it", "sh", "-c", 'cat "$SOURCE" > "$TARGET"', check=lambda job: "it made a full of it")
    assert outcome(tmp_path, place, other)["it"][0].problem == "it made a full of it"


def test_the_clock_includes_the_sync_of_the_destination(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, int]] = []
    real: Callable[[Path], None] = runs._synced

    def spy(path: Path) -> None:
        real(path)
        synced.append((path, path.stat().st_size))

    monkeypatch.setattr(runs, "_synced", spy)
    outcome(tmp_path, place, honest("a"))
    assert synced == [(tmp_path / "room" / "target.img", SIZE)] * 2


def test_no_round_is_begun_that_would_end_too_late(tmp_path: Path, place: Place) -> None:
    assert len(outcome(tmp_path, place, honest("a"), budget_s=0.0)["a"]) == 1


def test_each_contender_is_first_in_its_turn() -> None:
    assert [order(3, number) for number in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


@pytest.mark.peer("unshare", "nsenter", "ip", "nft")
def test_bytes_on_the_wire_are_those_to_and_from_the_port(tmp_path: Path) -> None:
    script = (
        "import socket, threading\n"
        "def go(port):\n"
        "    with socket.create_server(('127.0.0.1', port)) as server:\n"
        "        with socket.create_connection(('127.0.0.1', port)) as near, server.accept()[0] as far:\n"
        "            sending = threading.Thread(target=near.sendall, args=(bytes(1 << 20),))\n"
        "            sending.start()\n"
        "            left = 1 << 20\n"
        "            while left: left -= len(far.recv(65536))\n"
        "            sending.join()\n"
        "go(9443)\n"
        "go(9444)\n"
    )
    with loopback(tmp_path, own=True) as place:
        before = place.wire()
        place.ends.near.run("python3", "-c", script)
        both, out = (after - earlier for after, earlier in zip(place.wire(), before, strict=True))
    assert 1 << 20 < out < 1.1 * (1 << 20)
    assert out < both < 1.1 * (1 << 20)
