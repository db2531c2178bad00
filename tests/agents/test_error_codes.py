"""docs/errors.md names every code that the product can tell, and no other."""

import ast
import re
from collections import Counter

import pytest

from protocol.errors import WireCode
from replicator import errors
from replicator.failpoints import NAMES
from tests.agents.errors_page import codes
from tests.house.tree import PRODUCT, Module, modules

CODE = re.compile(r"[a-z]+\.[a-z_]+")
NO_CODE = re.compile(r"ddb\..*|.*\.(json|pem|cli)")  # keys of VMDK descriptors; files; a module
WITHOUT_DOT = {"interrupted"}
ERRORS = {name for name, found in vars(errors).items() if isinstance(found, type)} | {"VmdkError"}


def failpoints(module: Module) -> set[str]:
    """Names that are reached, which look like codes."""
    if module.name == "replicator.failpoints":
        return set(NAMES)
    return {
        argument.value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reach"
        for argument in node.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }


def told(module: Module) -> set[str]:
    """Codes in a module: all texts of their form, so that those passed to helpers are found too."""
    texts = (node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant))
    found = {
        text
        for text in texts
        if isinstance(text, str)
        and (text in WITHOUT_DOT or (CODE.fullmatch(text) and not NO_CODE.fullmatch(text)))
    }
    return found - failpoints(module)


def first_arguments(module: Module) -> set[str]:
    """Texts given first to a class of errors.py."""
    return {
        node.args[0].value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ERRORS
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


def all_told() -> set[str]:
    return set().union(*map(told, modules(*PRODUCT))) | {code.value for code in WireCode}


def test_the_page_has_every_code_of_the_product() -> None:
    assert all_told() - set(codes()) == set()


def test_the_page_has_no_code_that_is_gone() -> None:
    assert set(codes()) - all_told() == set()


def test_each_code_stands_in_one_table_and_once() -> None:
    assert [code for code, times in Counter(codes()).items() if times > 1] == []


def test_every_error_has_a_code_that_the_search_finds() -> None:
    for module in modules(*PRODUCT):
        assert first_arguments(module) <= told(module), module.name


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise LinkError("link.new", "m", cause="c", fix="f")', {"link.new"}),
        ('raise failure(error, "target.new_one", what)', {"target.new_one"}),
        ('reach("replace.done")', set()),
        ('open("authority.json")', set()),
        ('"""link.old: prose is no code."""', set()),
    ],
)
def test_the_search_finds_codes_and_only_codes(source: str, found: set[str]) -> None:
    assert told(Module("replicator.sender", source)) == found


def test_an_error_with_a_nameless_code_is_caught() -> None:
    module = Module("replicator.sender", 'raise LinkError("oops", "m", cause="c", fix="f")')
    assert not first_arguments(module) <= told(module)
