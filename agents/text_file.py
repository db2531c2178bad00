"""Small files that an operator or a tool of hers wrote: configurations, tokens, lists."""

from __future__ import annotations

import os
from pathlib import Path

from replicator.files import Files, read_whole_file


def read_text(files: Files, path: Path, limit_bytes: int) -> str:
    """The whole of a file in UTF-8. Raises as ``read_bytes``; UnicodeDecodeError: it is no text. Blocks."""
    return read_bytes(files, path, limit_bytes).decode()


def read_bytes(files: Files, path: Path, limit_bytes: int) -> bytes:
    """The whole of a file. Blocks.

    Raises:
        OSError: it cannot be read; EFBIG when it has more bytes than the limit.
    """
    fd = files.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO must not hold us for ever
    try:
        return read_whole_file(files, fd, str(path), limit_bytes)
    finally:
        files.close(fd)
