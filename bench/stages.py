"""What the stages of a full send cost on one core with this disk's content, and what that allows at best.

The model: every byte of data is read, tested for zeros and digested once at the sender; what is not zero is
hashed, compressed and encrypted there, and decrypted, decompressed, hashed and written at the target. If all
of it overlapped perfectly on all cores, and nothing else cost anything, a send would take the sum of these
CPU seconds divided by the cores, or as long as the file system takes to write the data, whichever is more.
Not here: the single functions of the product (``micro.py``).
"""

from __future__ import annotations

import mmap
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from xxhash import xxh3_64_intdigest

from bench import certificates
from bench.disk import Content, data_ranges
from protocol.constants import MIB
from protocol.payload import new_compressor, new_decompressor
from replicator.buffers import Buffer, BufferPool, zero_runs
from replicator.digest import digests_of

FRAME_BYTES = MIB
SAMPLE_FRAMES = 96
ROUNDS = 3
WRITE_FRAMES = 512
SEED = 1
LOOPBACK = "127.0.0.1"
LEVELS = (0, 1)
READ, WRITE = "read, page cache", "write, O_DIRECT and fdatasync"
ZERO_TEST_DATA, ZERO_TEST_ZEROS = "zero test, data", "zero test, zeros"
DIGEST, HASH = "digest, XXH3-128 of 64 KiB", "hash, XXH3-64"
OUT, IN = "TLS and TCP, out", "TLS and TCP, in"
WRITERS_MEMORY = 16
RECORDS_BYTES = 256 * 1024  # given to TLS at once


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage's rate on one core, by its own input: bytes per CPU second."""

    name: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Ideal:
    """What the stages allow.

    Attributes:
        level: of compression; 0 is off.
        ratio: bytes on the wire by bytes of data.
        cpu_s: CPU seconds of all stages for the whole disk.
        write_s: what writing the data takes the file system, one writer, fdatasync included.
        seconds: for the whole disk, by the larger of CPU seconds by core and ``write_s``.
        mb_s: the same as bytes of disk per second, in MB (10^6).
    """

    level: int
    ratio: float
    cpu_s: float
    write_s: float
    seconds: float
    mb_s: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Frames of a disk's data. ``zero_share``: of its bytes that are zero, in blocks of the zero test."""

    path: Path
    offsets: tuple[int, ...]
    frames: tuple[bytes, ...]
    zero_share: float


def sample(image: Path) -> Sample:
    """Frames spread evenly over a disk's data."""
    offsets = [
        offset
        for start, end in data_ranges(image)
        for offset in range(start, end - FRAME_BYTES + 1, FRAME_BYTES)
    ]
    step = max(1, len(offsets) // SAMPLE_FRAMES)
    picked = tuple(offsets[::step][:SAMPLE_FRAMES])
    pool, frames, zero = BufferPool(FRAME_BYTES), [], 0
    with image.open("rb") as file:
        for offset in picked:
            buffer = pool.take(FRAME_BYTES)
            os.preadv(file.fileno(), [buffer.view], offset)
            runs = zero_runs(buffer, 0, FRAME_BYTES)
            zero += sum(run.end - run.start for run in runs if run.zero)
            if not all(run.zero for run in runs):
                frames.append(bytes(buffer.view))
            pool.give(buffer)
    return Sample(image, picked, tuple(frames), zero / (len(picked) * FRAME_BYTES))


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured with a sample.

    Attributes:
        stages: rates on one core. ratios: bytes on the wire by bytes of data, by compression level.
        write_bytes_s: bytes per second of the clock that a writer gets into a new file, fdatasync included.
    """

    stages: tuple[Stage, ...]
    ratios: dict[int, float]
    write_bytes_s: float


def measure(taken: Sample, folder: Path) -> Measured:
    """Run all stages with a sample; ``folder`` is for the file that is written."""
    buffer = BufferPool(FRAME_BYTES).take(FRAME_BYTES)
    views = [memoryview(frame) for frame in taken.frames]
    stages = [Stage(READ, _read(taken, buffer))]
    for name, content in ((ZERO_TEST_DATA, views[len(views) // 2]), (ZERO_TEST_ZEROS, bytes(FRAME_BYTES))):
        buffer.view[:] = content
        stages.append(_by_frame(name, views, lambda _: zero_runs(buffer, 0, FRAME_BYTES)))
    stages.append(_by_frame(DIGEST, views, lambda view: digests_of(view, SEED)))
    stages.append(_by_frame(HASH, views, lambda view: xxh3_64_intdigest(view, SEED)))
    ratios = {0: 1.0}
    for level in LEVELS[1:]:
        both, ratios[level] = _codec(level, views, buffer)
        stages += both
    stages += _tls(folder, views)
    by_cpu, by_clock = zip(*(_write(folder, views) for _ in range(ROUNDS)), strict=True)
    stages.append(Stage(WRITE, max(by_cpu)))
    return Measured(tuple(stages), ratios, max(by_clock))


def ideals(content: Content, taken: Sample, measured: Measured, cores: int) -> list[Ideal]:
    """What the stages allow for a full send of the whole disk."""
    cost_s = {stage.name: 1 / stage.bytes_per_s for stage in measured.stages}
    zero = content.data * taken.zero_share
    said = content.data - zero
    found = []
    for level, ratio in measured.ratios.items():
        wire = said * ratio
        cpu_s = (
            content.data * (cost_s[READ] + cost_s[DIGEST])
            + said * cost_s[ZERO_TEST_DATA]
            + zero * cost_s[ZERO_TEST_ZEROS]
            + 2 * (said + wire) * cost_s[HASH]
            + wire * (cost_s[OUT] + cost_s[IN])
            + said * cost_s[WRITE]
        )
        if level:
            cpu_s += said * (cost_s[compressing(level)] + cost_s[decompressing(level)])
        write_s = said / measured.write_bytes_s
        seconds = max(cpu_s / cores, write_s)
        found.append(Ideal(level, ratio, cpu_s, write_s, seconds, content.size / seconds / 1e6))
    return found


def compressing(level: int) -> str:
    """The name of a stage."""
    return f"compress, zstd {level}"


def decompressing(level: int) -> str:
    """The name of a stage."""
    return f"decompress, zstd {level}"


# ------------------------------------------------------------------ the stages


def _best(work: Callable[[], object], size: int) -> float:
    """Bytes per CPU second of this thread; the best of several rounds counts, since noise only adds."""
    best_s = float("inf")
    for _ in range(ROUNDS):
        began_s = time.thread_time()
        work()
        best_s = min(best_s, time.thread_time() - began_s)
    return size / best_s


def _by_frame(name: str, views: Sequence[memoryview], step: Callable[[memoryview], object]) -> Stage:
    def work() -> None:
        for view in views:
            step(view)

    return Stage(name, _best(work, len(views) * FRAME_BYTES))


def _codec(level: int, views: Sequence[memoryview], into: Buffer) -> tuple[list[Stage], float]:
    """Compressing and decompressing, and the ratio."""
    compressor, decompressor = new_compressor(level), new_decompressor()
    packed = [memoryview(compressor.compress(view)) for view in views]
    size = len(views) * FRAME_BYTES

    def unpack() -> None:
        for one in packed:
            with decompressor.stream_reader(one, closefd=False) as reader:
                reader.readinto(into.view)

    stages = [_by_frame(compressing(level), views, compressor.compress)]
    stages.append(Stage(decompressing(level), _best(unpack, size)))
    return stages, sum(map(len, packed)) / size


def _read(taken: Sample, buffer: Buffer) -> float:
    with taken.path.open("rb") as file:

        def work() -> None:
            for offset in taken.offsets:
                os.preadv(file.fileno(), [buffer.view], offset)

        work()  # now the page cache holds it
        return _best(work, len(taken.offsets) * FRAME_BYTES)


def _tls(folder: Path, views: Sequence[memoryview]) -> list[Stage]:
    """Both directions of TLS 1.3 over loopback TCP, in one thread: the kernel's share is in it."""
    keys = certificates.make(folder / "stage-keys", LOOPBACK)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(keys / certificates.SERVER, keys / certificates.SERVER_KEY)
    dialling = ssl.create_default_context(cafile=keys / certificates.AUTHORITY)
    with socket.create_server((LOOPBACK, 0)) as listener:
        plain = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    sending = dialling.wrap_socket(plain, server_hostname=LOOPBACK, do_handshake_on_connect=False)
    taking = serving.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
    into = memoryview(bytearray(RECORDS_BYTES))
    with sending, taking:
        for end in (sending, taking):
            end.setblocking(False)
        _shake(sending, taking)
        best = [float("inf"), float("inf")]
        for _ in range(ROUNDS):
            spent = _carried(sending, taking, views, into)
            best = [min(pair) for pair in zip(best, spent, strict=True)]
    size = len(views) * FRAME_BYTES
    return [Stage(OUT, size / best[0]), Stage(IN, size / best[1])]


def _shake(*ends: ssl.SSLSocket) -> None:
    waiting = list(ends)
    while waiting:
        for end in list(waiting):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
                waiting.remove(end)


def _carried(
    sending: ssl.SSLSocket, taking: ssl.SSLSocket, views: Sequence[memoryview], into: memoryview
) -> tuple[float, float]:
    """CPU seconds of sending and of taking the frames."""
    out_s = in_s = 0.0
    for view in views:
        position = taken = 0
        while taken < len(view):
            began_s = time.thread_time()
            with suppress(ssl.SSLWantWriteError):
                while position < len(view):
                    position += sending.send(view[position : position + RECORDS_BYTES])
            between_s = time.thread_time()
            with suppress(ssl.SSLWantReadError):
                while taken < len(view):
                    taken += taking.recv_into(into)
            out_s += between_s - began_s
            in_s += time.thread_time() - between_s
    return out_s, in_s


def _write(folder: Path, views: Sequence[memoryview]) -> tuple[float, float]:
    """(bytes per CPU second, bytes per second of the clock) of writing a new file past the page cache."""
    path = folder / "written.img"
    memories = [mmap.mmap(-1, FRAME_BYTES) for _ in range(WRITERS_MEMORY)]
    for memory, view in zip(memories, cycle(views), strict=False):
        memory[:] = view
    size = WRITE_FRAMES * FRAME_BYTES
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.ftruncate(fd, size)
        with suppress(OSError):  # refused here: then through the page cache, as the product does
            direct = os.open(path, os.O_RDWR | os.O_DIRECT)
            os.close(fd)
            fd = direct
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        for number in range(WRITE_FRAMES):
            os.pwritev(fd, [memories[number % WRITERS_MEMORY]], number * FRAME_BYTES)
        os.fdatasync(fd)
        return size / (time.thread_time() - cpu_began_s), size / (time.perf_counter() - began_s)
    finally:
        os.close(fd)
        path.unlink()
