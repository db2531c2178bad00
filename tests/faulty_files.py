"""The I/O seam with faults: records every call, fails or falls short at the k-th one, and cuts the power.

Not for slowness, nor for what a file system itself does in a crash: loop mounts and FS_IOC_SHUTDOWN do.
"""

import os
import random
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeVar

from replicator import linux
from replicator.files import Files
from tests.unsynced import Content, Entries

T = TypeVar("T")


class PowerCut(BaseException):
    """The machine is off. No part of the product may catch this."""


class Call(NamedTuple):
    """One call: which method, on which file (base name), where."""

    kind: str
    name: str
    offset: int = 0
    length: int = 0


class FaultyFiles(Files):
    """`Files` with faults. One object is one machine until its power is cut; `calls` is its whole record."""

    def __init__(self, seed: int = 0) -> None:
        self.calls: list[Call] = []
        self._random = random.Random(seed)
        self._lock = threading.RLock()  # the recorder and its tables; also makes calls one after the other
        self._counts: dict[str, int] = {}
        self._faults: dict[tuple[str, int], int] = {}
        self._short: dict[tuple[str, int], int] = {}
        self._cut_before: int | None = None
        self._off = False
        self._names: dict[int, str] = {}
        self._contents: dict[tuple[int, int], Content] = {}
        self._entries: dict[tuple[int, int], Entries] = {}

    def fail(self, kind: str, kth: int, error: int) -> None:
        """The `kth` call of `kind` (or of "any") from now on raises OSError(error) and does nothing."""
        self._faults[kind, self._counts.get(kind, 0) + kth] = error

    def shorten(self, kind: str, kth: int, length: int) -> None:
        """The `kth` preadv, pwrite or pwritev from now on handles at most `length` bytes."""
        self._short[kind, self._counts.get(kind, 0) + kth] = length

    def cut_before(self, kth: int) -> None:
        """Raise PowerCut instead of the `kth` call of any kind from now on, and instead of all after it."""
        self._cut_before = len(self.calls) + kth

    def power_cut(self) -> None:
        """Leave in the real files what could be found after a power cut now; this object is then used up."""
        with self._lock:
            for content in self._contents.values():
                content.tear(self._random)
            for entries in self._entries.values():  # after the contents, of which it may make copies
                entries.tear(self._random)
            self.let_go()

    def let_go(self) -> None:
        """Close every descriptor, those that the code under test left open too."""
        with self._lock:
            self._off = True
            own = [content.fd for content in self._contents.values()]
            for fd in (*own, *(entries.fd for entries in self._entries.values()), *self._names):
                os.close(fd)
            self._contents, self._entries, self._names = {}, {}, {}

    def _step(self, kind: str, name: str, offset: int = 0, length: int = 0) -> int:
        """Record a call; raise what was ordered for it, or return how many bytes it may handle."""
        if self._off or self._cut_before == len(self.calls) + 1:
            self._off = True
            raise PowerCut(f"before {kind} of {name}, call {len(self.calls) + 1}")
        self.calls.append(Call(kind, name, offset, length))
        keys = []
        for counted in (kind, "any"):
            self._counts[counted] = self._counts.get(counted, 0) + 1
            keys.append((counted, self._counts[counted]))
        for key in keys:
            if key in self._faults:
                raise OSError(self._faults[key], os.strerror(self._faults[key]), name)
        return min([length, *(self._short[key] for key in keys if key in self._short)])

    def _name(self, fd: int) -> str:
        return self._names.get(fd) or os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def _content(self, fd: int) -> Content:
        found = os.fstat(fd)
        key = found.st_dev, found.st_ino
        if key not in self._contents:
            self._contents[key] = Content(fd)
        return self._contents[key]

    def _directory(self, path: str, dir_fd: int | None) -> Entries:
        fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
        found = os.fstat(fd)
        key = found.st_dev, found.st_ino
        if key in self._entries:
            os.close(fd)
        else:
            self._entries[key] = Entries(fd)
        return self._entries[key]

    def _opened(self, path: str, dir_fd: int | None, flags: int, really: Callable[[int], int]) -> int:
        folder, name = os.path.split(path)
        self._step("open", name)
        entries = self._directory(folder, dir_fd) if flags & os.O_CREAT else None
        creates = entries is not None and name not in os.listdir(entries.fd)
        fd = really(flags & ~os.O_TRUNC)
        self._names[fd] = name
        if entries is not None and creates:
            entries.undo.append(partial(entries.unmake, name))
        if flags & os.O_TRUNC:
            self._change_size(fd, 0)
        return fd

    def _change_size(self, fd: int, size: int) -> None:
        content = self._content(fd)
        content.remember_data(size, content.size())
        self._sizing(content, partial(super().truncate, fd, size))

    def _sizing(self, content: Content, really: Callable[[], T]) -> T:
        """Carry out what may change a file's size."""
        before = content.size()
        result = really()
        if content.size() != before:
            content.sizes.append(before)
        return result

    def _sync(self, kind: str, fd: int, really: Callable[[int], None]) -> None:
        with self._lock:
            is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
            try:
                self._step(kind, self._name(fd))
            except OSError:
                if not is_directory:
                    self._content(fd).synced(good=False)
                raise
            really(fd)
            if is_directory:
                self._directory(f"/proc/self/fd/{fd}", None).undo.clear()
            else:
                self._content(fd).synced(good=True)

    def _kept(self, entries: Entries, name: str) -> int | None:
        """A descriptor of what a rename or unlink is about to take away, with its doubtful content."""
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=entries.fd)
        except FileNotFoundError:
            return None
        kept = self._content(fd).fd
        os.close(fd)
        return kept

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
        with self._lock:
            return self._opened(os.fspath(path), None, flags, partial(super().open, path, mode=mode))

    def open_beneath(self, dir_fd: int, name: str, flags: int, mode: int = 0o600) -> int:
        with self._lock:
            really = partial(super().open_beneath, dir_fd, name, mode=mode)
            return self._opened(name, dir_fd, flags, really)

    def close(self, fd: int) -> None:
        with self._lock:
            with suppress(OSError):  # as of close(2): `Files` does not pass it on, and the descriptor is gone
                self._step("close", self._name(fd))
            self._names.pop(fd, None)
            super().close(fd)

    def fstat(self, fd: int) -> os.stat_result:
        with self._lock:
            self._step("fstat", self._name(fd))
            return super().fstat(fd)

    def device_size(self, fd: int) -> int:
        with self._lock:
            self._step("device_size", self._name(fd))
            return super().device_size(fd)

    def seek(self, fd: int, offset: int, whence: int) -> int:
        with self._lock:
            self._step("seek", self._name(fd), offset)
            return super().seek(fd, offset, whence)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            allowed = self._step("preadv", self._name(fd), offset, sum(map(len, buffers)))
        return super().preadv(fd, first_bytes(buffers, allowed), offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        with self._lock:
            allowed = self._step("pwrite", self._name(fd), offset, len(data))
            content = self._content(fd)
            content.remember(offset, offset + allowed)
            return self._sizing(content, partial(super().pwrite, fd, memoryview(data)[:allowed], offset))

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            allowed = self._step("pwritev", self._name(fd), offset, sum(map(len, buffers)))
            content = self._content(fd)
            content.remember(offset, offset + allowed)
            return self._sizing(content, partial(super().pwritev, fd, first_bytes(buffers, allowed), offset))

    def truncate(self, fd: int, size: int) -> None:
        with self._lock:
            self._step("truncate", self._name(fd), size)
            self._change_size(fd, size)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        with self._lock:
            self._step("fallocate", self._name(fd), offset, length)
            content = self._content(fd)
            if mode & ~linux.FALLOC_FL_KEEP_SIZE:  # it makes zeros
                content.remember_data(offset, offset + length)
            self._sizing(content, partial(super().fallocate, fd, mode, offset, length))

    def zero_device(self, fd: int, offset: int, length: int) -> None:
        with self._lock:
            self._step("zero_device", self._name(fd), offset, length)
            self._content(fd).remember_data(offset, offset + length)
            super().zero_device(fd, offset, length)

    def fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd, super().fdatasync)

    def fsync(self, fd: int) -> None:
        self._sync("fsync", fd, super().fsync)

    def will_need(self, fd: int, offset: int, length: int) -> None:
        with self._lock:
            self._step("will_need", self._name(fd), offset, length)
            super().will_need(fd, offset, length)

    def list_directory(self, dir_fd: int) -> list[str]:
        with self._lock:
            self._step("list_directory", self._name(dir_fd))
            return super().list_directory(dir_fd)

    def rename(self, dir_fd: int, old: str, new: str) -> None:
        with self._lock:
            self._step("rename", new)
            entries = self._directory(".", dir_fd)
            replaced = self._kept(entries, new)
            super().rename(dir_fd, old, new)
            entries.undo.append(partial(entries.rename_back, old, new, replaced))

    def unlink(self, dir_fd: int, name: str) -> None:
        with self._lock:
            self._step("unlink", name)
            entries = self._directory(".", dir_fd)
            removed = self._kept(entries, name)
            super().unlink(dir_fd, name)
            if removed is not None:
                entries.undo.append(partial(entries.recreate, name, removed))


def first_bytes(buffers: Sequence[memoryview], length: int) -> list[memoryview]:
    """The buffers, cut off after `length` bytes."""
    views = []
    for view in buffers:
        views.append(view[:length])
        length -= len(views[-1])
    return views
