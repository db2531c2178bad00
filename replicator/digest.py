"""Digests of a disk's blocks, and what differs between two rows of them.

Pure. A block has 64 KiB (4 KiB where a closer look pays), the last one of a disk may be shorter. Its digest
is XXH3-128 with the installation's seed, 16 bytes, canonical (big-endian) order: it finds what differs and
guards nothing against attackers. At 2^32 blocks (256 TiB) the odds of one pair of different blocks being
taken for equal are about 2^-96.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from struct import Struct

from xxhash import xxh3_128, xxh3_128_digest

from protocol.constants import KIB
from protocol.messages import Interval

DIGEST_BYTES = 16
BLOCK_BYTES = 64 * KIB
FINE_BYTES = 4 * KIB  # the block of most file systems: what a small write changes

_DIGESTS = Struct(f"{DIGEST_BYTES}s")
_STRIDE_BYTES = 4 * KIB  # of a row, compared in one go: on a vast disk, nearly all of it is equal


def digests_of(view: memoryview, seed: int, block: int = BLOCK_BYTES) -> bytes:
    """The digests of the blocks of ``view``, one after the other."""
    return b"".join(
        [xxh3_128_digest(view[start : start + block], seed) for start in range(0, len(view), block)]
    )


@lru_cache(maxsize=64)  # asked for every hole, of a few sizes
def zero_digest(seed: int, size: int = BLOCK_BYTES) -> bytes:
    """The digest of ``size`` zero bytes."""
    return xxh3_128_digest(bytes(size), seed)


def zero_digests(length: int, seed: int, block: int = BLOCK_BYTES) -> bytes:
    """The digests of the blocks of ``length`` zero bytes; the last one may be short."""
    whole, tail = divmod(length, block)
    return zero_digest(seed, block) * whole + (zero_digest(seed, tail) if tail else b"")


def zero_row(interval: Interval, size: int, seed: int, block: int = BLOCK_BYTES) -> bytes:
    """The digests of an interval's blocks if all of it is zero; ``size``: of the disk, whose last block may
    be short.
    """
    whole = size if interval.end == size else interval.end + -interval.end % block
    return zero_digests(whole - interval.start, seed, block)


def differing(
    ours: bytes, theirs: bytes, start: int, end: int, block: int = BLOCK_BYTES
) -> Iterator[Interval]:
    """The stretches of [start, end) whose digests differ, neighbours joined; both rows cover all of it."""
    if len(ours) != len(theirs) or len(ours) != -(-(end - start) // block) * DIGEST_BYTES:
        raise ValueError("rows of digests do not fit each other or the interval")
    if ours == theirs:
        return
    first = last = 0  # of the stretch that was found last, in blocks
    for number in _unequal(ours, theirs):
        if number != last:
            if first < last:
                yield Interval(start + first * block, start + last * block)
            first = number
        last = number + 1
    yield Interval(start + first * block, min(start + last * block, end))


def _unequal(ours: bytes, theirs: bytes) -> Iterator[int]:
    """Which digests differ, by number."""
    for start in range(0, len(ours), _STRIDE_BYTES):
        one, other = ours[start : start + _STRIDE_BYTES], theirs[start : start + _STRIDE_BYTES]
        if one != other:
            pairs = zip(_DIGESTS.iter_unpack(one), _DIGESTS.iter_unpack(other), strict=True)
            yield from [
                number for number, (mine, yours) in enumerate(pairs, start // DIGEST_BYTES) if mine != yours
            ]


class Digester:
    """Digests of the blocks of stretches that are told piece by piece, zeros without their bytes.

    A stretch begins at a multiple of ``BLOCK_BYTES`` and ends at one or with the disk.

    Args:
        seed: of the digests.

    Attributes:
        rows: (start, digests) of touching blocks.
        zeros: stretches of whole blocks of which no byte was told as data.
    """

    def __init__(self, seed: int) -> None:
        self.rows: list[tuple[int, bytes]] = []
        self.zeros: list[Interval] = []
        self._seed = seed
        self._position = 0
        self._block: xxh3_128 | None = None  # of a block that is told in several pieces

    def at(self, position: int) -> None:
        """What comes next lies here."""
        if position != self._position:
            self.finish()
            self._position = position

    def data(self, view: memoryview) -> None:
        """The next bytes."""
        done = self._complete(len(view), lambda first, end: view[first:end])
        whole = done + (len(view) - done) // BLOCK_BYTES * BLOCK_BYTES
        if whole > done:
            self.rows.append((self._position, digests_of(view[done:whole], self._seed)))
            self._position += whole - done
        self._begin(view[whole:])

    def zero(self, length: int) -> None:
        """``length`` zero bytes come next."""
        done = self._complete(length, lambda first, end: bytes(end - first))
        whole = done + (length - done) // BLOCK_BYTES * BLOCK_BYTES
        if whole > done:
            self.zeros.append(Interval(self._position, self._position + whole - done))
            self._position += whole - done
        self._begin(bytes(length - whole))

    def finish(self) -> None:
        """The stretch ends here; a shorter last block is complete."""
        if self._block is not None:
            first = self._position - self._position % BLOCK_BYTES
            self.rows.append((first, self._block.digest()))
            self._block = None

    def _complete(self, length: int, part: Callable[[int, int], bytes | memoryview]) -> int:
        """Give the block that was begun what it lacks; returns how many bytes that took."""
        if self._block is None:
            return 0
        count = min(length, BLOCK_BYTES - self._position % BLOCK_BYTES)
        self._block.update(part(0, count))
        self._position += count
        if self._position % BLOCK_BYTES == 0:
            self.rows.append((self._position - BLOCK_BYTES, self._block.digest()))
            self._block = None
        return count

    def _begin(self, rest: bytes | memoryview) -> None:
        if len(rest):
            self._block = xxh3_128(rest, self._seed)
            self._position += len(rest)
