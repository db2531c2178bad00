"""The tree of errors: drawn as it is, and every error says what, why and what to do."""

import re

import pytest

from replicator import errors
from replicator.errors import LinkError, Remedy, ReplicatorError, SpaceError, cause_of

LEAVES = sorted(ReplicatorError.__subclasses__(), key=lambda leaf: leaf.__name__)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = {}
    for name, words in re.findall(r"[├└]── (\w+)\s+(.*)", errors.__doc__ or ""):
        blame, remedy = words.split()[-2:]
        drawn[name] = (blame, remedy)
    assert drawn == {leaf.__name__: (leaf.blame, leaf.remedy.value) for leaf in LEAVES}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_is_directly_below_the_root_and_has_none_below(leaf: type[ReplicatorError]) -> None:
    assert leaf.__bases__ == (ReplicatorError,)
    assert not leaf.__subclasses__()


def test_an_error_says_what_failed_why_and_what_to_do() -> None:
    error = SpaceError(
        "target.full", "disk.vmdk cannot grow", cause="the datastore is full", fix="free 3 GiB"
    )
    assert (error.code, error.message, error.cause, error.fix) == (
        "target.full",
        "disk.vmdk cannot grow",
        "the datastore is full",
        "free 3 GiB",
    )
    assert str(error) == "disk.vmdk cannot grow (target.full). Cause: the datastore is full. Fix: free 3 GiB."
    assert (error.blame, error.remedy) == ("target", Remedy.RETRY)


def test_of_a_failed_group_the_defect_comes_first_then_what_can_be_acted_upon_then_the_line() -> None:
    link = LinkError("link.lost", "lost", cause="c", fix="f")
    full = SpaceError("target.full", "full", cause="c", fix="f")
    defect = KeyError("defect")
    assert cause_of(BaseExceptionGroup("", [link, ExceptionGroup("", [full])])) is full
    assert (
        cause_of(BaseExceptionGroup("", [link, ExceptionGroup("", [full, ExceptionGroup("", [defect])])]))
        is defect
    )
    assert cause_of(BaseExceptionGroup("", [link])) is link
