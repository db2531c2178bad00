"""Where the logs of a group and the record of its sealed epochs lie: a directory of the retention volume.

Not here: what is in the record (``points.py``) and in the logs (``log.py``). All of it blocks.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from hashlib import sha256

from replicator.log import points
from replicator.log.points import GroupRecord
from replicator.private_directory import PrivateDirectory


class GroupDirectory:
    """The directory of one group."""

    def __init__(self, retention: PrivateDirectory, group: str) -> None:
        self.directory = retention.below("groups").below(sha256(group.encode()).hexdigest()[:32])
        self.group = group
        self.files = retention.files

    def load(self) -> GroupRecord:
        """The record; an empty one where there is none. ``StateError`` if it is damaged."""
        with self.directory.held() as held:
            return points.load(held, self.group)

    def store(self, record: GroupRecord) -> None:
        """Replace the record, durably."""
        with self.directory.held() as held:
            points.store(held, record)

    @classmethod
    def names(cls, retention: PrivateDirectory) -> list[str]:
        """The groups that have a record."""
        below = retention.below("groups")
        found = []
        for name in below.names():
            with below.below(name).held() as held:
                content = held.read(points.FILE)
            with suppress(ValueError, KeyError, TypeError):  # damaged: the next OPEN of the group meets it
                found.append(str(json.loads(content or b"")["name"]))
        return found

    def open(self) -> int:
        """A descriptor of the directory, the caller's to close; made if it is not there."""
        with self.directory.held():
            return self.files.open(self.directory.path, os.O_RDONLY | os.O_DIRECTORY)
