"""A failpoint ends the process at its name and count; every name is used, and no name is invented."""

import ast
import os
import signal
import subprocess
import sys

import pytest

from replicator import failpoints
from tests.house.tree import PRODUCT, ROOT, Module, modules

WALK = """
from replicator.failpoints import reach
for number in range(1, 5):
    print(number, flush=True)
    reach("replace.done")
    reach("image.created")
    print("passed", number, flush=True)
print("end", flush=True)
"""


def walk(failpoint: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "FAILPOINT"}
    if failpoint is not None:
        environment["FAILPOINT"] = failpoint
    return subprocess.run(
        [sys.executable, "-c", WALK], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("failpoint", "passed"), [("image.created", 0), ("image.created:1", 0), ("replace.done:3", 2)]
)
def test_the_process_ends_by_sigkill_at_the_named_place_and_time(failpoint: str, passed: int) -> None:
    done = walk(failpoint)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split("\n")[-2] == str(passed + 1), "reached the place"
    assert f"passed {passed + 1}" not in done.stdout, "and did nothing after it"
    assert done.stdout.count("passed") == passed


@pytest.mark.parametrize("failpoint", [None, "", "image.synced", "replace.done:9"])
def test_a_process_whose_failpoint_is_not_reached_goes_on(failpoint: str | None) -> None:
    done = walk(failpoint)
    assert done.returncode == 0
    assert done.stdout.endswith("end\n")


@pytest.mark.parametrize(
    "setting", ["replace.dome", "replace.done:0", "replace.done:-1", "replace.done:x", ":2"]
)
def test_a_failpoint_that_could_never_fire_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=r"FAILPOINT|invalid literal"):
        failpoints.parse(setting)


def reached(module: Module) -> list[tuple[int, str | None]]:
    """(line, name) of each `reach(...)`; None where the name is no literal."""
    found: list[tuple[int, str | None]] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == "reach":
                name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                found.append((node.lineno, name if isinstance(name, str) else None))
    return found


def test_every_failpoint_that_is_reached_is_listed() -> None:
    wrong = [
        f"{module.name}:{line}: {name or 'not a literal'}"
        for module in modules(*PRODUCT)
        for line, name in reached(module)
        if name not in failpoints.NAMES
    ]
    assert wrong == []


def test_every_failpoint_that_is_listed_is_reached_somewhere() -> None:
    used = {name for module in modules("replicator", "agents") for _, name in reached(module)}
    assert sorted(failpoints.NAMES - used) == []


def test_an_unlisted_or_computed_name_is_caught() -> None:
    module = Module(
        "replicator.x", 'reach("no.such")\nfailpoints.reach(f"replace.{step}")\nreach("replace.done")'
    )
    assert reached(module) == [(1, "no.such"), (2, None), (3, "replace.done")]
