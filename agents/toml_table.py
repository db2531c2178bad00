"""A TOML file read strictly: what is taken is checked, and every mistake is noted before the first is told.

Not here: which keys there are (``config.py``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from agents.text_file import read_text
from replicator.errors import UsageError
from replicator.files import Files
from replicator.transport.dial import Address

T = TypeVar("T")

CONFIG_MAX_BYTES = 1 << 20


class _Required:
    """Stands for a key that has no default."""


_REQUIRED = _Required()
_CALLED = {str: "a text", bool: "true or false", int: "a whole number", dict: "a table", list: "a list"}


class Table:
    """A table of the file while it is read: what is taken is checked, what is wrong is noted, and what nobody
    took is a mistake at the ``end``.
    """

    def __init__(self, found: Mapping[str, Any], where: str, mistakes: list[str]) -> None:
        self.found = found
        self.mistakes = mistakes
        self._where = where
        self._taken: set[str] = set()

    def mistake(self, key: str, what: str) -> None:
        """Note what is wrong with a key."""
        self.mistakes.append(f"{self._name(key)}: {what}")

    def take(self, key: str, kind: type[T], default: T | _Required = _REQUIRED) -> T:
        """The value of a key. Where it is wrong that is noted, and some value of its kind returned."""
        self._taken.add(key)
        if key not in self.found:
            if not isinstance(default, _Required):
                return default
            self.mistake(key, "is missing")
        elif type(self.found[key]) is not kind:
            self.mistake(key, f"{_CALLED[kind]} is wanted")
        else:
            value: T = self.found[key]
            return value
        return kind()

    def number(self, key: str, default: float, least: float = 0, most: float = float("inf")) -> float:
        """A number from ``least`` to ``most``; whole where the default is."""
        self._taken.add(key)
        value = self.found.get(key, default)
        whole = isinstance(default, int)
        if type(value) is not int and (whole or type(value) is not float):
            self.mistake(key, "a whole number is wanted" if whole else "a number is wanted")
        elif not least <= value <= most:  # nor is NaN
            self.mistake(
                key,
                f"{least:.0f} to {most:.0f} is wanted"
                if most < float("inf")
                else f"{least:.0f} at the least",
            )
        else:
            return value if whole else float(value)
        return default

    def choice(self, key: str, among: tuple[str, ...], default: str) -> str:
        """One of some words."""
        found = self.take(key, str, default)
        if found not in among:
            self.mistake(key, f"{found!r} is none of {', '.join(among)}")
        return found

    def path(self, key: str) -> Path:
        """An absolute path: where a daemon starts is nobody's choice."""
        text = self.take(key, str)
        if text and (not text.startswith("/") or "\0" in text):
            self.mistake(key, f"{text!r} is no absolute path")
        return Path(text.replace("\0", ""))

    def address(self, key: str, default: str | None) -> Address:
        """HOST:PORT."""
        text = self.take(key, str, _REQUIRED if default is None else default)
        try:
            return Address.parse(text)
        except UsageError as error:
            if text:
                self.mistake(key, f"{error.message}: {error.cause}")
            return Address("", 0)

    def table(self, key: str) -> Table:
        """A table inside this one; an empty one where there is none."""
        return Table(self.take(key, dict, {}), self._name(key), self.mistakes)

    def tables(self, key: str) -> list[Table]:
        """The tables of a list."""
        found = []
        for number, content in enumerate(self.take(key, list, [])):
            where = f"{self._name(key)}[{number}]"
            if isinstance(content, dict):
                found.append(Table(content, where, self.mistakes))
            else:
                self.mistakes.append(f"{where}: a table is wanted")
        return found

    def end(self) -> None:
        """All has been taken that is known."""
        for key in self.found.keys() - self._taken:
            near = get_close_matches(key, self._taken, 1)
            self.mistake(key, f"is not known, {near[0]} is" if near else "is not known")

    def _name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key


def load(files: Files, path: Path, section: Callable[[Table], T]) -> T:
    """What ``section`` makes of the file. Blocks.

    Raises:
        UsageError: ``config.unreadable``, ``config.invalid`` with every mistake.
    """
    text = _text(files, path)
    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _invalid(path, [f"no TOML: {error}"]) from None
    mistakes: list[str] = []
    top = Table(found, "", mistakes)
    config = section(top)
    top.end()
    if mistakes:
        raise _invalid(path, sorted(set(mistakes)))
    return config


def _text(files: Files, path: Path) -> str:
    try:
        return read_text(files, path, CONFIG_MAX_BYTES)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise _unreadable(path, "it is not text in UTF-8") from None


def _unreadable(path: Path, reason: str) -> UsageError:
    return UsageError(
        "config.unreadable",
        f"the configuration {path} cannot be read: {reason}",
        cause="a wrong path, no plain text file, or this user may not read it",
        fix="name the file with --config; it must be readable for the user that the daemon runs as",
    )


def _invalid(path: Path, mistakes: list[str]) -> UsageError:
    return UsageError(
        "config.invalid",
        f"the configuration {path} has {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}: "
        + "; ".join(mistakes),
        cause="it was written by hand, or for another release",
        fix="correct what is named, then ask with --check-config; docs/operate.md describes every key",
    )
