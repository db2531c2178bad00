"""What a power cut may take back: unsynced sectors, sizes and directory entries of real files.

Each operation is carried out on the real files at once; what would undo it is kept here until it is synced.
Which operations those are, and when the power is cut: `faulty_files.py`.
"""

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator

SECTOR = 512


class Content:
    """What of one file's content may be lost, until it is synced. Keeps a descriptor of its own."""

    def __init__(self, fd: int) -> None:
        self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self.sizes: list[int] = []  # older sizes, the durable one first
        self.sectors: dict[int, list[bytes]] = {}  # older contents of a sector, the durable one first
        self.fresh: set[int] = set()  # sectors that the next good sync makes durable

    def remember(self, start: int, end: int) -> None:
        """Keep what is in a range that is about to change."""
        for position in range(start - start % SECTOR, end, SECTOR):
            before = os.pread(self.fd, SECTOR, position).ljust(SECTOR, b"\0")
            self.sectors.setdefault(position, []).append(before)
            self.fresh.add(position)

    def remember_data(self, start: int, end: int) -> None:
        """The same for a range that becomes zeros: holes in it, however large, cost nothing.

        Save where they are doubtful since a sync failed: made zeros again, they are the next good one's.
        """
        for first, behind in self._data(start, end):
            self.remember(first, behind)
        self.fresh.update(position for position in self.sectors if start <= position < end)

    def size(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)

    def _data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        size = self.size()
        while start < min(end, size):
            try:
                first = os.lseek(self.fd, start, os.SEEK_DATA)
                behind = os.lseek(self.fd, first, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                first, behind = start, size  # a block device
            if first < end:
                yield first, min(behind, end)
            start = behind

    def synced(self, good: bool) -> None:
        """A failed sync leaves its sectors doubtful, even after a good one: the kernel forgets them."""
        if good:
            self.sizes.clear()
            for position in self.fresh:
                del self.sectors[position]
        self.fresh.clear()

    def tear(self, choose: random.Random) -> None:
        """Put some older content in the place of a random part of what was not synced."""
        size = self.size()
        if self.sizes:
            size = choose.choice([*self.sizes, size])
            os.ftruncate(self.fd, size)
        for position, older in self.sectors.items():
            pick = choose.randint(0, len(older))
            if pick < len(older) and position < size:
                os.pwrite(self.fd, older[pick][: size - position], position)


class Entries:
    """How to undo the changes of one directory's entries that are not synced, oldest first."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.undo: list[Callable[[], None]] = []

    def tear(self, choose: random.Random) -> None:
        """Undo the later part: earlier changes survive before later ones, as journals have it."""
        for undo in reversed(self.undo[choose.randint(0, len(self.undo)) :]):
            undo()

    def unmake(self, name: str) -> None:
        os.unlink(name, dir_fd=self.fd)

    def rename_back(self, old: str, new: str, replaced_fd: int | None) -> None:
        os.rename(new, old, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        if replaced_fd is not None:
            self.recreate(new, replaced_fd)

    def recreate(self, name: str, kept_fd: int) -> None:
        mode = stat.S_IMODE(os.fstat(kept_fd).st_mode)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, dir_fd=self.fd)
        with open(fd, "wb") as copy, open(f"/proc/self/fd/{kept_fd}", "rb") as kept:
            while piece := kept.read(1 << 20):
                copy.write(piece)
