"""Small text files that an operator wrote: configurations, tokens."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from replicator.files import Files, read_fully


def read_text(files: Files, path: Path, limit_bytes: int) -> str:
    """The whole of a file in UTF-8. Blocks.

    Raises:
        OSError: it cannot be read; EFBIG when it has more bytes than the limit. UnicodeDecodeError: no text.
    """
    fd = files.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO must not hold us for ever
    try:
        content = bytearray(limit_bytes + 1)
        count = read_fully(files, fd, memoryview(content), 0)
    finally:
        files.close(fd)
    if count > limit_bytes:
        raise OSError(errno.EFBIG, f"larger than {limit_bytes} bytes", str(path))
    return content[:count].decode()
