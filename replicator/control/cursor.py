"""The cursors of lists: the key of the last item, as text that only we need to understand."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Final

from replicator.control.models import COUNT_MAX, PAGE_MAX
from replicator.control.problems import malformed
from replicator.control.repositories.rows import Window

PAGE_DEFAULT: Final = 50
_KEY: Final = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,600}")
_NUMBER: Final = re.compile(r"[0-9]{1,3}")


def cursor_of(key: str | int | None) -> str | None:
    """The cursor that goes on after ``key``; None at the end."""
    if key is None:
        return None
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def window_of(query: Mapping[str, str], key_type: type[int] | type[str]) -> Window:
    """Which part of a list a query asks for; ``api.malformed``."""
    limit = query.get("limit", str(PAGE_DEFAULT))
    if not _NUMBER.fullmatch(limit) or not 1 <= int(limit) <= PAGE_MAX:
        raise malformed(f"limit is not a number from 1 to {PAGE_MAX}")
    cursor = query.get("cursor")
    return Window(None if cursor is None else _key(cursor, key_type), int(limit))


def _key(cursor: str, key_type: type[int] | type[str]) -> str | int:
    try:
        key = json.loads(base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        raise malformed("the cursor is none of ours") from None
    if isinstance(key, str) and key_type is str and _KEY.fullmatch(key):
        return key
    if type(key) is int and key_type is int and 0 <= key <= COUNT_MAX:
        return key
    raise malformed("the cursor is not one of this list")
