"""Rooms stay small and say what they are for; threads have one home; no sleep, bare except or stray print."""

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.house.tree import PRODUCT, Module, modules

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70

THREADS_LIVE_IN = "replicator.workers"
THREAD_MAKERS = frozenset(
    {"Thread", "ThreadPoolExecutor", "run_in_executor", "start_new_thread", "to_thread"}
)
MAY_PRINT = ("agents.cli", "bench")

Check = Callable[[Module], Iterator[str]]


def long_files(module: Module) -> Iterator[str]:
    lines = len(module.source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{module.name}: {lines} lines, more than {MAX_FILE_LINES}: look for the second room in it"


def long_functions(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{module.name}:{node.lineno}: {node.name}() has {lines} of {MAX_FUNCTION_LINES} lines"


def undocumented(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield f"{module.name}: no module docstring: what is it for, and what not?"


def threads(module: Module) -> Iterator[str]:
    if module.name == THREADS_LIVE_IN:
        return
    for line, name in mentions(module.tree):
        if name in THREAD_MAKERS:
            yield f"{module.name}:{line}: {name}: threads are made in {THREADS_LIVE_IN} only"


def mentions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every name that is read, reached as an attribute or imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)


def sleeps(module: Module) -> Iterator[str]:
    clocks = {"time"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            clocks |= {alias.asname for alias in node.names if alias.name == "time" and alias.asname}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            sleeping = node.attr == "sleep" and isinstance(node.value, ast.Name) and node.value.id in clocks
        elif isinstance(node, ast.ImportFrom):
            sleeping = node.module == "time" and any(alias.name == "sleep" for alias in node.names)
        else:
            continue
        if sleeping:
            yield f"{module.name}:{node.lineno}: time.sleep: wait for the thing itself, or by the clock"


def bare_excepts(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{module.name}:{node.lineno}: bare except: name what is expected"


def prints(module: Module) -> Iterator[str]:
    if any(module.name == name or module.name.startswith(f"{name}.") for name in MAY_PRINT):
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield f"{module.name}:{node.lineno}: print: only {' and '.join(MAY_PRINT)} talk to a terminal"


SHAPE: tuple[Check, ...] = (long_files, long_functions, undocumented)
HABITS: tuple[Check, ...] = (threads, sleeps, bare_excepts, prints)


def found_by(check: Check, where: tuple[Module, ...]) -> list[str]:
    return [line for module in where for line in check(module)]


@pytest.mark.parametrize("check", SHAPE, ids=lambda check: check.__name__)
def test_shape(check: Check) -> None:
    found = found_by(check, modules(*PRODUCT, "bench"))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("check", HABITS, ids=lambda check: check.__name__)
def test_habits(check: Check) -> None:
    found = found_by(check, modules(*PRODUCT))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (long_files, "x = 1\n" * (MAX_FILE_LINES + 1)),
        (long_functions, "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (long_functions, "class C:\n  async def f(self):\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (undocumented, "# a comment is not a docstring\n"),
        (threads, "import threading\nthreading.Thread(target=f)"),
        (threads, "from concurrent.futures import ThreadPoolExecutor"),
        (threads, "async def f(loop):\n    await loop.run_in_executor(None, g)"),
        (threads, "import asyncio\nasync def f():\n    await asyncio.to_thread(g)"),
        (sleeps, "import time\ntime.sleep(1)"),
        (sleeps, "import time as t\nt.sleep(1)"),
        (sleeps, "from time import sleep"),
        (bare_excepts, "try:\n    f()\nexcept:\n    pass"),
        (prints, "print('hello')"),
        (prints, "f(log=print)"),
    ],
)
def test_a_bad_module_is_caught(check: Check, source: str) -> None:
    assert len(list(check(Module("replicator.sender", source)))) == 1


@pytest.mark.parametrize(
    ("check", "name", "source"),
    [
        (long_files, "replicator.sender", "x = 1\n" * MAX_FILE_LINES),
        (long_functions, "replicator.sender", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
        (undocumented, "replicator.sender", '"""Sends."""\n'),
        (threads, "replicator.workers", "from threading import Thread"),
        (threads, "replicator.buffers", "from threading import Lock"),
        (sleeps, "replicator.sender", "async def f(clock):\n    await clock.sleep(1)"),
        (prints, "agents.cli.output", "print('hello')"),
        (prints, "bench.__main__", "print('hello')"),
    ],
)
def test_a_good_module_passes(check: Check, name: str, source: str) -> None:
    assert list(check(Module(name, source))) == []
