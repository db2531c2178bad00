"""A directory of small secret files: modes 0700 and 0600, replaced whole and durably, one holder at a time.

For what ``authority.py``, ``tokens.py`` and ``identity.py`` keep. All of it blocks. Not here: what the files
mean, and anything large or often written.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replicator.errors import SpaceError, StateError
from replicator.files import Files, read_small_file, replace_file

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class HeldDirectory:
    """The directory while its lock is held: no other thread or process changes it."""

    files: Files
    fd: int
    path: Path

    def read(self, name: str) -> bytes | None:
        """The whole of a file, or None where there is none."""
        try:
            return read_small_file(self.files, self.fd, name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unusable(self.path / name, "read", error) from error

    def replace(self, name: str, content: bytes) -> None:
        """Replace a file whole; it is durable on return."""
        try:
            replace_file(self.files, self.fd, name, content)
        except OSError as error:
            raise unusable(self.path / name, "written", error) from error

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        try:
            self.files.unlink(self.fd, name)
            self.files.fsync(self.fd)
        except FileNotFoundError:
            return
        except OSError as error:
            raise unusable(self.path / name, "removed", error) from error


class PrivateDirectory:
    """A directory, made when it is first held.

    Args:
        files: the I/O seam.
        path: where it is.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self.files = files
        self.path = path

    def below(self, name: str) -> PrivateDirectory:
        """A directory inside this one."""
        return PrivateDirectory(self.files, self.path / name)

    def names(self) -> list[str]:
        """What is in it, sorted; nothing where it does not exist."""
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unusable(self.path, "read", error) from error

    @contextmanager
    def held(self) -> Iterator[HeldDirectory]:
        """Hold the directory, waiting for whoever holds it now. Errors are ``state.unusable``,
        ``state.full``.

        Each holder opens the directory anew, so that the lock keeps threads apart as well as processes.
        """
        try:
            self._make()
            fd = self.files.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise unusable(self.path, "opened", error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                # A predecessor may have died between a rename and its fsync: what is read now must last.
                self.files.fsync(fd)
            except OSError as error:
                raise unusable(self.path, "synced", error) from error
            yield HeldDirectory(self.files, fd, self.path)
        finally:
            self.files.close(fd)

    def _make(self) -> None:
        missing = []
        path = self.path
        while not path.exists():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)
            parent = self.files.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self.files.fsync(parent)
            finally:
                self.files.close(parent)


def unusable(path: Path, verb: str, error: OSError) -> StateError | SpaceError:
    """``state.full`` or ``state.unusable``, for an error of the file system at ``path``."""
    if error.errno in _FULL:
        return SpaceError(
            "state.full",
            f"{path} cannot be {verb}: {error.strerror}",
            cause="the file system or the quota is full",
            fix="free some space there: it goes on where it stopped",
        )
    return StateError(
        "state.unusable",
        f"{path} cannot be {verb}: {error.strerror}",
        cause="wrong owner or permissions, a full or failing disk, or a read-only file system",
        fix="give this user the directory, see that its disk is healthy and has space, then try again",
    )


def encode_record(record: Mapping[str, object]) -> bytes:
    """A record as JSON, readable for people."""
    return json.dumps(record, indent=1).encode() + b"\n"


def decode_record(content: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    """A record of exactly these fields from JSON; ``ValueError`` says what does not fit, not the value."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    return checked_record(found, fields)


def checked_record(found: object, fields: Mapping[str, type]) -> dict[str, Any]:
    """``found``, if it is a record of exactly these fields of exactly these types; else ``ValueError``."""
    if not isinstance(found, dict):
        raise ValueError("not a record")
    if found.keys() != fields.keys():
        odd = sorted(found.keys() ^ fields.keys())
        raise ValueError(f"unknown or missing fields: {', '.join(odd)}")
    for name, kind in fields.items():
        if type(found[name]) is not kind:  # a bool is no int here
            raise ValueError(f"{name} is not of type {kind.__name__}")
    return found
