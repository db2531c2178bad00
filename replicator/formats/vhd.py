"""The footer of a fixed VHD: the 512 bytes that Azure keeps behind a disk in a page blob. Pure.

Source: Virtual Hard Disk Image Format Specification, Microsoft, 2006; all numbers big-endian. A fixed VHD is
the disk's bytes and this footer; the formats that grow or differ are not read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from protocol.constants import MIB, SECTOR_BYTES

FOOTER_BYTES: Final = 512
ALIGNMENT_BYTES: Final = MIB  # Azure imports a VHD as a managed disk only if its disk is of whole MiB

# cookie, features, version, data offset, time, creator, its version, its host, original and current size,
# cylinders, heads, sectors, type, checksum, id, saved state; the rest is zeros.
_FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQHBBII16sB")
_COOKIE: Final = b"conectix"
_FEATURES: Final = 2  # reserved, always set
_VERSION: Final = 0x0001_0000
_NO_DATA_OFFSET: Final = 0xFFFF_FFFF_FFFF_FFFF
_FIXED: Final = 2
_CHECKSUM_AT: Final = 64
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
# Cylinders, heads, sectors. The largest there are say that the size alone counts: by a true geometry some
# readers would round the disk down. So does `qemu-img -o force_size`, Azure's own advice for uploads.
_GEOMETRY: Final = (65535, 16, 255)


@dataclass(frozen=True, slots=True)
class Footer:
    """What of a footer counts here. ``disk_bytes``: the size of the disk before it."""

    disk_bytes: int
    id: UUID


def parse_footer(content: bytes) -> Footer | None:
    """The footer that these last 512 bytes of a blob are.

    None if they are something else: the disk then fills the whole blob. That the disk which a footer tells of
    has the size of what is before it is the caller's to check.
    """
    if len(content) != FOOTER_BYTES or not content.startswith(_COOKIE):
        return None
    found = _FOOTER.unpack_from(content)
    size, kind, checksum, identity = found[9], found[13], found[14], found[15]
    if kind != _FIXED or checksum != _checksum(content):
        return None
    return Footer(size, UUID(bytes=identity))


def make_footer(disk_bytes: int, identity: UUID, created: datetime) -> bytes:
    """The footer of a fixed VHD.

    Args:
        disk_bytes: the size of the disk before it; for Azure a multiple of ``ALIGNMENT_BYTES``.
        identity: of the disk, the same for all its copies. created: when it was made.

    Raises:
        ValueError: the size is not of whole sectors.
    """
    if disk_bytes <= 0 or disk_bytes % SECTOR_BYTES:
        raise ValueError(f"a disk of {disk_bytes} bytes is not of whole sectors")
    seconds = max(0, int((created - _EPOCH).total_seconds()))

    def footer(checksum: int) -> bytes:
        return _FOOTER.pack(
            _COOKIE, _FEATURES, _VERSION, _NO_DATA_OFFSET, seconds, b"rplc", _VERSION, b"Wi2k",
            disk_bytes, disk_bytes, *_GEOMETRY, _FIXED, checksum, identity.bytes, 0,
        ).ljust(FOOTER_BYTES, b"\0")  # fmt: skip

    return footer(_checksum(footer(0)))


def _checksum(content: bytes) -> int:
    """The ones' complement of the sum of all bytes but the checksum's own."""
    return ~(sum(content) - sum(content[_CHECKSUM_AT : _CHECKSUM_AT + 4])) & 0xFFFF_FFFF
