"""What every suite gets: uvloop, seeds that replay, figures for every-run and release-run, external programs,
Hypothesis profiles, and one closing line with the seconds of each suite.

Environment: `REPLICATOR_RELEASE=1` picks the release figures, `REPLICATOR_SEED=0x...` replays a seeded test.
"""

import asyncio
import json
import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest
import uvloop

# Before any test imports it: the assertions of the suite are explained like those of test modules.
pytest.register_assert_rewrite("tests.replicator.sources.conformance")

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
PEERS_FILE = ROOT / "requirements" / "peers.txt"
NPM_PEERS_FILE = ROOT / "requirements" / "npm" / "package.json"
RELEASE = os.environ.get("REPLICATOR_RELEASE", "") not in ("", "0")
SEED_VARIABLE = "REPLICATOR_SEED"

# Debian keeps mkfs and losetup here, and leaves it out of the PATH of ordinary users; npm's go below .peers.
# PostgreSQL's programs are not on anyone's PATH.
POSTGRESQL = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
for folder in ("/usr/sbin", "/sbin", str(ROOT / ".peers" / "node_modules" / ".bin"), *POSTGRESQL):
    if folder not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + folder

# No deadline and no too_slow: two workers share two cores, and a slow example there is no finding.
hypothesis.settings.register_profile(
    "every-run",
    derandomize=False,
    print_blob=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "release", parent=hypothesis.settings.get_profile("every-run"), max_examples=5_000
)
hypothesis.settings.load_profile("release" if RELEASE else "every-run")


# ------------------------------------------------------------------ event loop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Coroutines are tested on the loop they run on: uvloop."""
    return {"uvloop": uvloop.new_event_loop}


# ------------------------------------------------------------------ figures and seeds


@pytest.fixture(scope="session")
def release_run() -> bool:
    """Whether this is `make test-release`."""
    return RELEASE


@pytest.fixture(scope="session")
def count() -> Callable[[T, T], T]:
    """`count(20, 1_000)` is 20 on every run and 1,000 before a release."""
    return lambda every, release: release if RELEASE else every


@pytest.fixture
def seed() -> int:
    """64 random bits for this test; its report names them when it fails, REPLICATOR_SEED gives them again."""
    given = os.environ.get(SEED_VARIABLE)
    return int(given, 0) if given else secrets.randbits(64)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    used = getattr(item, "funcargs", {}).get("seed")
    if report.failed and used is not None:
        replay = f"{SEED_VARIABLE}={used:#018x} .venv/bin/pytest {item.nodeid!r}"
        report.sections.append(("seed", f"replay with: {replay}"))
    return report


# ------------------------------------------------------------------ programs of others


def peer_packages() -> dict[str, str]:
    """Program -> the Debian package that provides it, from requirements/peers.txt."""
    lines = (line.split() for line in PEERS_FILE.read_text().splitlines())
    return {words[1]: words[0] for words in lines if words and not words[0].startswith("#")}


def why_missing(program: str) -> str | None:
    """None where the program is there, else one line that says how to get it."""
    if shutil.which(program):
        return None
    if program in json.loads(NPM_PEERS_FILE.read_text())["dependencies"]:
        return f"needs {program}, which is not here: make peers"
    package = peer_packages().get(program)
    if package is None:
        return f"needs {program}, which is not here and not in requirements/peers.txt: add it there"
    return f"needs {program}, which is not here: make peers, or as root: apt-get install {package}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("peer"):
            if not marker.args or not all(isinstance(program, str) for program in marker.args):
                raise pytest.UsageError(f'{item.nodeid}: say which program: @pytest.mark.peer("qemu-img")')


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before any fixture of the test starts the program. A failure, never a skip: a suite that quietly
    # leaves out what it could not check proves nothing.
    for marker in item.iter_markers("peer"):
        for program in marker.args:
            reason = why_missing(program)
            if reason is not None:
                pytest.fail(reason, pytrace=False)


# ------------------------------------------------------------------ seconds per suite


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                parts = report.nodeid.split("::")[0].split("/")
                seconds["/".join(parts[:2]) if len(parts) > 2 else parts[0]] += report.duration
    if seconds:
        slowest_first = sorted(seconds.items(), key=lambda pair: -pair[1])
        terminalreporter.write_line(
            "seconds per suite: " + ", ".join(f"{suite} {spent:.1f}" for suite, spent in slowest_first)
        )
