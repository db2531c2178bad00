"""Sizes as they are given on command lines: ``512M``."""

from __future__ import annotations

import re

from protocol.constants import MIB
from replicator.errors import UsageError

_UNITS = {"": 1, "M": MIB, "G": 1024 * MIB}


def parse_size(option: str, text: str, least_bytes: int = 0) -> int:
    """The bytes that an option's value names.

    Raises:
        UsageError: ``usage.size``: it is none, or less than ``least_bytes``, a whole number of MiB.
    """
    given = re.fullmatch(r"([0-9]{1,15})([MG]?)", text.upper())
    if given is None:
        raise UsageError(
            "usage.size",
            f"{option} {text!r} is not a size",
            cause="it is not a number with M or G behind it",
            fix="give one such as 512M or 4G",
        )
    size = int(given[1]) * _UNITS[given[2]]
    if size < least_bytes:
        raise UsageError(
            "usage.size",
            f"{option} {text!r} is too small",
            cause="less than that cannot be worked with",
            fix=f"give at least {least_bytes // MIB}M",
        )
    return size
