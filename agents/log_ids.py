"""Ids that stand in every log line of what is being done, whichever module logs it.

Set once, where a cycle or a stream begins: so one search finds all that belongs together. Not here: how lines
look (``logs.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ids: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("ids", default=())


@contextmanager
def ids(**more: str) -> Iterator[None]:
    """While this holds, lines of this task and of those that it starts carry these ids."""
    token = _ids.set((*_ids.get(), *more.items()))
    try:
        yield
    finally:
        _ids.reset(token)


def current() -> dict[str, str]:
    """The ids that hold now."""
    return dict(_ids.get())
