"""Every number of the wire format and every limit, each with its why. SPEC.md repeats them for others."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * 1024

MAGIC: Final = b"RPLF"
VERSION: Final = 1  # the only version so far; HELLO offers a range
SECTOR_BYTES: Final = 512  # what every disk and VMDK extent is a multiple of

HEADER_BYTES: Final = 72
EXTENT_BYTES: Final = 16
ID_BYTES: Final = 16
NONCE_BYTES: Final = 32

RAW_MAX_BYTES: Final = 4 * MIB  # what a receiver must hold per frame being written; packers aim at 1 MiB
TABLE_MAX_BYTES: Final = 256 * KIB  # 16,384 extents: a 4 MiB frame of single sectors needs half of it
CONTROL_MAX_BYTES: Final = 1 * MIB  # 65,000 intervals of coverage; what is more waits for the next message
JOIN_MAX_BYTES: Final = 32 * KIB  # certificates of RSA-4096 keys fit; an unauthenticated peer pins no more
GREETING_MAX_BYTES: Final = 1 * KIB  # HELLO, WELCOME, PING and the like have few fields
FAIL_MAX_BYTES: Final = 16 * KIB  # four texts of at most 2 KiB, UTF-8, and room to spare
NAME_MAX_BYTES: Final = 255  # what file systems allow for one name
EXTENT_MAX_BYTES: Final = 2**32 - SECTOR_BYTES  # the table's length field has 32 bits
DISK_MAX_BYTES: Final = 2**63 - SECTOR_BYTES  # file offsets are signed
DISKS_MAX: Final = 256  # a machine has at most 64 disks; a group of machines may have a few hundred
STREAMS_MAX: Final = 16  # past some eight, more TCP streams stop helping even on long lossy lines

PING_AFTER_S: Final = 5.0  # silence after which the peer is asked for a sign of life
DEAD_AFTER_S: Final = 15.0  # silence after which it is given up: three chances to answer
FIRST_FRAME_S: Final = 5.0  # a peer that has shaken hands and says nothing is not one of ours
FRAME_GRACE_S: Final = 5.0  # a frame may take this long whatever its rate ...
FRAME_MIN_BYTES_S: Final = 4 * KIB  # ... and must then have come this fast: 32 kbit/s, slower than any line

ZSTD_WINDOW_MAX_BYTES: Final = 8 * MIB  # twice the largest frame: no compliant frame needs more
ZSTD_BLOCKS_MAX: Final = 8 * KIB  # 4 MiB in blocks of 1 KiB is half of it; a million empty blocks fit 3 MB
