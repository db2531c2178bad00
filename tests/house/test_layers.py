"""Imports go down only: agents -> replicator -> protocol, and from floor to floor inside replicator.

A new module fails this test until it stands in FLOORS below.
"""

import ast
import sys
from collections.abc import Iterator

import pytest

from tests.house.tree import PRODUCT, Module, modules

# From the top down. A name stands for a module, or for a package and all in it; the longest name that
# fits counts, so that replicator.azure.blob has a floor of its own. A module may import its own floor and
# those below it. Bare "replicator" is the package's __init__ and nothing else.
FLOORS: tuple[tuple[str, frozenset[str]], ...] = (
    ("agents", frozenset({"agents"})),
    ("workflows", frozenset({"replicator.control", "replicator.failback"})),
    (
        "pipelines",
        frozenset(
            {
                "replicator.sender",
                "replicator.receiver",
                "replicator.refusals",
                "replicator.vsphere",
                "replicator.azure",
                "replicator.enrolment",
                "replicator.authority",
                "replicator.credit_pool",
                "replicator.identity",
                "replicator.tokens",
                "replicator.verify",
                "replicator.session",
                "replicator.groups",
                "replicator.holding",
                "replicator.receiving",
                "replicator.sending",
                "replicator.framing",
                "replicator.local",
                "replicator.sender_state",
                "replicator.asking",
                "replicator.differ",
                "replicator.packing",
                "replicator.digest_map",
                "replicator.retrying",
                "replicator.health",
            }
        ),
    ),
    ("log", frozenset({"replicator.log"})),
    ("endpoints", frozenset({"replicator.sources", "replicator.images", "replicator.transport"})),
    (
        "formats",
        frozenset(
            {
                "replicator.formats",
                "replicator.azure.blob",
                "replicator.azure.access",
                "replicator.azure.tries",
            }
        ),
    ),
    (
        "pure",
        frozenset(
            {
                "replicator.extents",
                "replicator.plan",
                "replicator.changes",
                "replicator.digest",
                "replicator.adapt",
                "replicator.throttle",
                "replicator.desired",
            }
        ),
    ),
    (
        "bottom",
        frozenset(
            {
                "replicator",
                "replicator.errors",
                "replicator.clock",
                "replicator.workers",
                "replicator.buffers",
                "replicator.linux",
                "replicator.files",
                "replicator.failpoints",
                "replicator.certificates",
                "replicator.private_directory",
            }
        ),
    ),
    ("protocol", frozenset({"protocol"})),
)

# On these floors the rooms know nothing of one another.
APART = frozenset({"endpoints"})

# `replicator bench` is the one door to the benchmark; nothing of it is needed to replicate.
BENCH_DOOR = "agents.cli.bench"

PURE_FORBIDS = frozenset({"asyncio", "os", "time", "socket", "threading"})
PROTOCOL_FORBIDS = frozenset({"asyncio", "ssl", "socket", "os"})
PROTOCOL_LIBRARIES = frozenset({"xxhash", "zstandard"})

DEPTH = {name: depth for depth, (_, names) in enumerate(FLOORS) for name in names}


def room_of(module: str) -> str | None:
    """The entry of FLOORS that this module belongs to; None when there is none."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in DEPTH and (name != "replicator" or module == "replicator"):
            return name
    return None


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands, those for type checkers too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute_origin(module, node)
            for alias in node.names:
                # `from replicator import extents` names a module, `from replicator.extents import Extent`
                # does not: where the two fall into different rooms it is one, elsewhere it is all the same.
                full = f"{origin}.{alias.name}"
                inside = alias.name.startswith("__") or room_of(full) == room_of(origin)
                yield node.lineno, origin if inside else full


def absolute_origin(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def violations(module: Module) -> list[str]:
    room = room_of(module.name)
    if room is None:
        return [f"{module.name}: stands on no floor; give it one in FLOORS of tests/house/test_layers.py"]
    found = []
    for line, name in imported(module):
        if module.name == BENCH_DOOR and name.split(".", maxsplit=1)[0] == "bench":
            continue
        why = forbidden(room, name)
        if why is not None:
            found.append(f"{module.name}:{line}: imports {name}: {why}")
    return found


def forbidden(room: str, name: str) -> str | None:
    top = name.split(".", maxsplit=1)[0]
    if top in ("tests", "bench"):
        return f"the product does not import {top}"
    if top not in PRODUCT:
        return forbidden_library(room, top)
    target = room_of(name)
    if target is None:
        return "stands on no floor; give it one in FLOORS of tests/house/test_layers.py"
    here, there = FLOORS[DEPTH[room]][0], FLOORS[DEPTH[target]][0]
    if DEPTH[target] < DEPTH[room]:
        return f"floor {there!r} is above {here!r}; imports go down only"
    if here == there and here in APART and room != target:
        return f"{room} and {target} do not import one another"
    return None


def forbidden_library(room: str, top: str) -> str | None:
    floor = FLOORS[DEPTH[room]][0]
    if floor == "pure" and top in PURE_FORBIDS:
        return "a pure module does no I/O and has no clock or threads of its own"
    if floor == "protocol":
        if top in PROTOCOL_FORBIDS:
            return "protocol does no I/O"
        if top not in sys.stdlib_module_names and top not in PROTOCOL_LIBRARIES:
            return f"protocol uses the standard library and {', '.join(sorted(PROTOCOL_LIBRARIES))} only"
    return None


def test_imports_go_down_only() -> None:
    assert {"protocol.header", "replicator.errors"} <= {module.name for module in modules(*PRODUCT)}
    found = [line for module in modules(*PRODUCT) for line in violations(module)]
    assert not found, "\n" + "\n".join(found)


def test_no_room_stands_on_two_floors() -> None:
    assert sum(len(names) for _, names in FLOORS) == len(DEPTH)


@pytest.mark.parametrize(
    ("name", "source", "caught"),
    [
        ("protocol.header", "import asyncio", "protocol does no I/O"),
        ("protocol.header", "from os import path", "protocol does no I/O"),
        ("protocol.header", "def late():\n    import socket", "protocol does no I/O"),
        ("protocol.header", "import cryptography.x509", "standard library and xxhash, zstandard only"),
        ("protocol.header", "import replicator.errors", "imports go down only"),
        ("replicator.errors", "from replicator import extents", "imports go down only"),
        ("replicator.extents", "import threading", "a pure module"),
        ("replicator.plan", "from time import monotonic", "a pure module"),
        ("replicator.plan", "from replicator.formats.vmdk import Descriptor", "imports go down only"),
        ("replicator.images.device", "from replicator.sources import raw", "do not import one another"),
        ("replicator.transport.tls", "import replicator.images", "do not import one another"),
        ("replicator.formats.vmdk", "from ..sources.base import Source", "imports go down only"),
        ("replicator.sources.page_blob", "import replicator.azure.compute", "imports go down only"),
        ("replicator.sources.page_blob", "from replicator.azure import compute", "imports go down only"),
        ("replicator.log.apply", "from replicator.receiver import Receiver", "imports go down only"),
        ("replicator.receiver", "from agents.config import Config", "imports go down only"),
        ("replicator.sender", "from replicator import misc", "stands on no floor"),
        ("replicator.misc", "", "stands on no floor"),
        ("replicator.sender", "from tests.conftest import seed", "does not import tests"),
        ("agents.cli.send", "from bench.suite import run", "does not import bench"),
        (BENCH_DOOR, "from tests.conftest import seed", "does not import tests"),
    ],
)
def test_a_bad_import_is_caught(name: str, source: str, caught: str) -> None:
    found = violations(Module(name, source))
    assert len(found) == 1
    assert caught in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("protocol.payload", "import struct\nimport zstandard\nfrom protocol import constants"),
        ("replicator.extents", "from replicator.errors import PlanError\nimport bisect"),
        ("replicator.images.flat_vmdk", "from replicator.images.base import Image\nimport os"),
        ("replicator.images.page_blob", "from replicator.azure.blob import Client"),
        ("replicator.images.page_blob", "from replicator.azure import blob"),
        ("replicator.sender", "from replicator.enrolment import Identity\nfrom protocol import connection"),
        ("replicator.log.log", "from . import segment\nfrom replicator import __version__"),
        ("agents.cli.main", "from replicator.control import api\nimport typer"),
        (BENCH_DOOR, "from bench import report, suite\nfrom bench.options import Options"),
    ],
)
def test_a_good_import_passes(name: str, source: str) -> None:
    assert violations(Module(name, source)) == []
