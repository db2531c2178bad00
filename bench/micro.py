"""What the product's own functions cost on one core, so that a regression is found where it is.

Every one works on the same frames of 1 MiB. The figure is the best of several rounds: noise only ever adds.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from xxhash import xxh3_64_intdigest

from protocol.connection import Connection
from protocol.constants import MIB
from protocol.credit import ReceiveWindow
from protocol.messages import Attach, Hello, Interval, Welcome
from protocol.payload import Extent, build, new_compressor, new_decompressor, unpack
from protocol.state import Role
from replicator.buffers import BufferPool, zero_runs
from replicator.differ import WINDOW_DATA_BYTES
from replicator.digest import BLOCK_BYTES, DIGEST_BYTES, FINE_BYTES, differing, digests_of
from replicator.digest_map import DigestMap, DigestMapBuilder
from replicator.extents import Coverage, Cutter, Piece
from replicator.files import Files
from replicator.packing import pack

FRAME_BYTES = MIB
FRAMES = 64
ROUNDS = 5
SEED = 1
DISK_BYTES = 4096 * MIB


@dataclass(frozen=True, slots=True)
class Rate:
    """A stage and its rate: bytes of disk per second on one core."""

    stage: str
    bytes_per_s: float


def sample_frames(count: int = FRAMES) -> list[bytes]:
    """Content that compresses about two to one; the same on every run."""
    random = Random(7)
    words = [random.randbytes(random.randrange(3, 12)) for _ in range(3000)]
    frames = []
    for _ in range(count):
        text = b" ".join(random.choices(words, k=FRAME_BYTES // 6))
        frames.append(text[:FRAME_BYTES].ljust(FRAME_BYTES, b"\0"))
    return frames


def best_rate(stage: str, work: Callable[[], None], size: int = FRAMES * FRAME_BYTES) -> Rate:
    """Run ``work``, which handles ``size`` bytes of disk, a few times; the best round counts."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return Rate(stage, size / best)


def measure() -> Iterator[Rate]:
    """All stages, in the order of the data's way."""
    frames = sample_frames()
    yield _read(frames)
    yield _zero_test()
    yield _cut()
    yield best_rate("XXH3-64", lambda: _each(frames, lambda frame: xxh3_64_intdigest(frame, SEED)))
    yield from _digest_rows(frames)
    yield _differing()
    yield from _packing(frames)
    yield from _digest_map()
    for level in (0, 1, 3):
        yield from _frame_both_ways(frames, level)
    yield _connection(frames)
    yield _coverage()


def _each(frames: list[bytes], step: Callable[[bytes], object]) -> None:
    for frame in frames:
        step(frame)


def _read(frames: list[bytes]) -> Rate:
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(frames))
        file.flush()
        buffer = BufferPool(FRAME_BYTES).take(FRAME_BYTES)

        def work() -> None:
            for number in range(FRAMES):
                os.preadv(file.fileno(), [buffer.view], number * FRAME_BYTES)

        return best_rate("read, page cache", work)


def _zero_test() -> Rate:
    buffer = BufferPool(FRAME_BYTES).take(FRAME_BYTES)
    buffer.view[:] = bytes(FRAME_BYTES)
    return best_rate("zero test, all zero", lambda: _times(lambda: zero_runs(buffer, 0, FRAME_BYTES)))


def _times(step: Callable[[], object]) -> None:
    for _ in range(FRAMES):
        step()


def _cut() -> Rate:
    extents = [Extent(offset, 4096, offset % 8192 == 0) for offset in range(0, FRAMES * FRAME_BYTES, 4096)]

    def work() -> None:
        cutter = Cutter()
        for extent in extents:
            for _ in cutter.add(extent):
                pass

    return best_rate("cut, extents of 4 KiB", work)


def _digest_rows(frames: list[bytes]) -> Iterator[Rate]:
    def rows(block: int) -> None:
        for frame in frames:
            digests_of(memoryview(frame), SEED, block)

    yield best_rate("digest row, blocks of 64 KiB", lambda: rows(BLOCK_BYTES))
    yield best_rate("digest row, blocks of 4 KiB", lambda: rows(FINE_BYTES))


def _differing() -> Rate:
    """Two rows of a disk of 4 GiB, one block in a hundred differing."""
    random = Random(5)
    ours = random.randbytes(DISK_BYTES // BLOCK_BYTES * DIGEST_BYTES)
    theirs = bytearray(ours)
    for block in random.sample(range(DISK_BYTES // BLOCK_BYTES), DISK_BYTES // BLOCK_BYTES // 100):
        theirs[block * DIGEST_BYTES] ^= 1
    other = bytes(theirs)
    return best_rate(
        "differing, 1 % of blocks", lambda: _spend(differing(ours, other, 0, DISK_BYTES)), DISK_BYTES
    )


def _spend(results: Iterator[object]) -> None:
    for _ in results:
        pass


def _packing(frames: list[bytes]) -> Iterator[Rate]:
    """Frames of pieces, raw; each is copied into the buffer first, since packing moves it together there."""
    piece = Piece(Interval(0, FRAME_BYTES), (Extent(0, FRAME_BYTES),), FRAME_BYTES)
    pool = BufferPool(FRAME_BYTES)
    buffer = pool.take(FRAME_BYTES)
    blocks = range(0, FRAME_BYTES, BLOCK_BYTES)
    changed = bytes(DIGEST_BYTES)  # the first 4 KiB of each block

    def known(frame: bytes) -> dict[int, bytes]:
        rows = (
            digests_of(memoryview(frame)[start : start + BLOCK_BYTES], SEED, FINE_BYTES) for start in blocks
        )
        return {start: changed + row[DIGEST_BYTES:] for start, row in zip(blocks, rows, strict=True)}

    fine = {id(frame): known(frame) for frame in frames}

    def packed(frame: bytes, theirs: dict[int, bytes]) -> None:
        buffer.view[:] = frame
        pack(1, 1, piece, buffer, None, SEED, theirs)

    yield best_rate("pack", lambda: _each(frames, lambda frame: packed(frame, {})))
    yield best_rate(
        "pack, 4 KiB of 64 differ", lambda: _each(frames, lambda frame: packed(frame, fine[id(frame)]))
    )


def _digest_map() -> Iterator[Rate]:
    """The map of a disk of 4 GiB, told by the frame and made durable, then read by the window."""
    row = Random(6).randbytes(FRAME_BYTES // BLOCK_BYTES * DIGEST_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        files, dir_fd, roots = Files(), os.open(folder, os.O_RDONLY | os.O_DIRECTORY), []

        def write() -> None:
            builder = DigestMapBuilder(files, dir_fd, "map", DISK_BYTES, SEED)
            for start in range(0, DISK_BYTES, FRAME_BYTES):
                builder.record(start, row)
            roots.append(builder.finish())

        yield best_rate("digest map, written", write, DISK_BYTES)
        known = DigestMap.open(files, dir_fd, "map", roots[-1] or b"", DISK_BYTES, SEED)
        assert known is not None

        def read() -> None:
            for start in range(0, DISK_BYTES, WINDOW_DATA_BYTES):
                known.digests(start, start + WINDOW_DATA_BYTES)

        yield best_rate("digest map, read", read, DISK_BYTES)
        known.close()
        os.close(dir_fd)


def _frame_both_ways(frames: list[bytes], level: int) -> Iterator[Rate]:
    name = f"zstd {level}" if level else "raw"
    cover, extents = Interval(0, FRAME_BYTES), [Extent(0, FRAME_BYTES)]
    compressor, decompressor = new_compressor(level) if level else None, new_decompressor()

    def made(frame: bytes) -> tuple[object, bytes]:
        built = build(1, 1, cover, extents, memoryview(frame), compressor, SEED)
        return built.header, built.table + built.payload

    yield best_rate(f"frame {name}: build", lambda: _each(frames, made))
    bodies = [
        (built.header, memoryview(built.table + bytes(built.payload)))
        for built in (build(1, 1, cover, extents, memoryview(frame), compressor, SEED) for frame in frames)
    ]
    into = memoryview(bytearray(FRAME_BYTES))

    def work() -> None:
        for header, body in bodies:
            unpack(header, body, into, decompressor, SEED)

    yield best_rate(f"frame {name}: unpack", work)


def _connection(frames: list[bytes]) -> Rate:
    """Bytes in slices of a TLS record, events out."""
    sender, receiver = Connection(Role.SENDER, 0.0), Connection(Role.RECEIVER, 0.0)

    def pump() -> bytes:
        data = b"".join(sender.data_to_send())
        receiver.receive_data(data, 0.0)
        sender.receive_data(b"".join(receiver.data_to_send()), 0.0)
        return data

    sender.send(Hello())
    pump()
    receiver.send(Welcome(1, 0, SEED, 1))
    pump()
    sender.send(Attach(bytes(16)))
    pump()
    receiver.attach(ReceiveWindow(1 << 60))
    pump()
    for frame in frames:
        extents = [Extent(0, FRAME_BYTES)]
        sender.send_data(build(1, 1, Interval(0, FRAME_BYTES), extents, memoryview(frame), None, SEED))
    stream = memoryview(b"".join(sender.data_to_send()))

    def work() -> None:
        position = 0
        while position < len(stream):
            target = receiver.get_buffer()
            count = min(len(target), 16 * 1024, len(stream) - position)
            target[:count] = stream[position : position + count]
            receiver.buffer_updated(count, 0.0)
            position += count
        receiver.events_received()

    return best_rate("connection, 16 KiB slices", work)


def _coverage() -> Rate:
    covers = [(offset, offset + FRAME_BYTES) for offset in range(0, 4096 * FRAME_BYTES, FRAME_BYTES)]
    Random(3).shuffle(covers)

    def work() -> None:
        coverage = Coverage()
        for start, end in covers:
            coverage.relation(start, end)
            coverage.add(start, end)

    return best_rate("coverage, random order", work, len(covers) * FRAME_BYTES)
