"""Every library comes by exact version and hash, from wherever the installer is set up to look."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.tree import ROOT

REQUIREMENTS = ROOT / "requirements"
COMPILED = ("runtime.txt", "dev.txt")

PIN = re.compile(r"^(?P<name>[a-z0-9][a-z0-9.-]*)==(?P<version>[^\s;]+)(\s*;[^#]*?)?$")
HASHES = re.compile(r"^(\s*--hash=sha256:[0-9a-f]{64})+$")
LAYERING = re.compile(r"^-[rc] [a-z]+\.(in|txt)$")


def logical_lines(text: str) -> Iterator[str]:
    """Lines with their continuations joined, without comments and blanks."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        bare = re.sub(r"(^|\s)#.*$", "", line).strip()
        if bare:
            yield bare


def problems(text: str) -> list[str]:
    """What is wrong with a compiled requirements file."""
    found = [f"names an address: {line}" for line in text.splitlines() if "://" in line]
    for line in logical_lines(text):
        requirement, dashes, hashes = line.partition("--hash")
        if line.startswith("-"):
            found.append(f"an option line: {line}")
        elif not PIN.match(requirement.strip()):
            found.append(f"not pinned to one version: {requirement.strip()}")
        elif not HASHES.match(dashes + hashes):
            found.append(f"without a hash: {requirement.strip()}")
    return found


def input_problems(text: str) -> list[str]:
    """What is wrong with a file of ranges: it may lean on its neighbours by name, and has no other option."""
    return [
        f"an option line: {line}"
        for line in logical_lines(text)
        if line.startswith("-") and not LAYERING.match(line)
    ]


def pins(path: Path) -> dict[str, str]:
    matches = (PIN.match(line.partition("--hash")[0].strip()) for line in logical_lines(path.read_text()))
    return {match["name"]: match["version"] for match in matches if match}


@pytest.mark.parametrize("name", COMPILED)
def test_each_pin_has_its_hashes(name: str) -> None:
    text = (REQUIREMENTS / name).read_text()
    assert problems(text) == []
    assert pins(REQUIREMENTS / name), f"{name} pins nothing"


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.in")), ids=lambda path: path.name)
def test_ranges_have_no_options(path: Path) -> None:
    assert input_problems(path.read_text()) == []


def test_developers_run_what_is_shipped() -> None:
    runtime, dev = (pins(REQUIREMENTS / name) for name in COMPILED)
    assert runtime.items() <= dev.items()


def test_package_and_requirements_name_the_same_libraries() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = logical_lines((REQUIREMENTS / "runtime.in").read_text())
    assert sorted(project["dependencies"]) == sorted(ranges)


HASH = "--hash=sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("--index-url https://host.example/simple\n", "an option line"),
        ("-i simple\n", "an option line"),
        ("--extra-index-url simple\n", "an option line"),
        ("--find-links wheels\n", "an option line"),
        ("-f wheels\n", "an option line"),
        ("--trusted-host host.example\n", "an option line"),
        ("# from https://host.example\n", "names an address"),
        (f"rich @ https://host.example/rich.whl {HASH}\n", "names an address"),
        ("rich==15.0.0\n", "without a hash"),
        ("rich==15.0.0 --hash=sha256:00\n", "without a hash"),
        ("rich==15.0.0 \\\n    --hash=md5:" + "0" * 64 + "\n", "without a hash"),
        (f"rich>=15 \\\n    {HASH}\n", "not pinned"),
        (f"rich \\\n    {HASH}\n", "not pinned"),
    ],
)
def test_a_bad_line_is_caught(text: str, caught: str) -> None:
    found = problems(text)
    assert any(caught in problem for problem in found), found


@pytest.mark.parametrize(
    "text",
    [
        f"rich==15.0.0 \\\n    {HASH} \\\n    {HASH}\n    # via typer\n",
        f"uvloop==0.23.0 ; sys_platform != 'win32' \\\n    {HASH}\n",
    ],
)
def test_a_good_line_passes(text: str) -> None:
    assert problems(text) == []


@pytest.mark.parametrize(
    "line", ["--find-links wheels", "-i simple", "-r https://host.example/a.txt", "-e ."]
)
def test_a_bad_option_among_ranges_is_caught(line: str) -> None:
    assert input_problems(f"rich>=13\n{line}\n")
    assert not input_problems("-r runtime.in\n-c runtime.txt\nrich>=13  # tables\n")
