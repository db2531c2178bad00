"""Secrets at rest: modes, whole replacement, one holder at a time, fixed schemas."""

import fcntl
import os
from pathlib import Path

import pytest

from replicator.files import Files
from replicator.private_directory import PrivateDirectory, checked_record, decode_record, encode_record
from tests.replicator.trust import mode_of, refused


def directory(path: Path, files: Files | None = None) -> PrivateDirectory:
    return PrivateDirectory(files or Files(), path)


class FailingSync(Files):
    """Says EIO at the k-th fsync (from 1)."""

    def __init__(self, at: int) -> None:
        self._left = at

    def fsync(self, fd: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise OSError(5, os.strerror(5))
        super().fsync(fd)


def test_directory_is_0700_and_files_are_0600_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with directory(tmp_path / "a" / "b").held() as held:
            held.replace("secret", b"x")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a") == 0o700
    assert mode_of(tmp_path / "a" / "b") == 0o700
    assert mode_of(tmp_path / "a" / "b" / "secret") == 0o600


def test_what_was_put_is_read_and_what_was_not_is_none(tmp_path: Path) -> None:
    with directory(tmp_path).held() as held:
        held.replace("file", b"one")
        held.replace("file", b"two")
        assert held.read("file") == b"two"
        held.remove("file")
        held.remove("file")
        assert held.read("file") is None
    assert directory(tmp_path).names() == []
    assert directory(tmp_path / "nowhere").names() == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_no_call_succeeds_after_a_failed_fsync(tmp_path: Path, at: int) -> None:
    with directory(tmp_path).held() as held:
        held.replace("file", b"old")
    # The first fsync is that of taking the lock, then the file's, then the directory's.
    with refused("state.unusable"), directory(tmp_path, FailingSync(at)).held() as held:
        held.replace("file", b"new")
    assert (tmp_path / "file").read_bytes() in ((b"old",), (b"old",), (b"new",))[at - 1]


def test_a_holder_keeps_every_other_one_out(tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        with directory(tmp_path).held(), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(other)


def test_a_symbolic_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"x")
    (tmp_path / "file").symlink_to("elsewhere")
    with refused("state.unusable"), directory(tmp_path).held() as held:
        held.read("file")


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with refused("state.unusable"), directory(tmp_path / "file").held():
        pass
    with refused("state.unusable"):
        directory(tmp_path / "file").names()


def test_a_record_is_read_back() -> None:
    record = {"name": "x", "size": 1}
    assert decode_record(encode_record(record), {"name": str, "size": int}) == record


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b'{"name": "x"}',
        b'{"name": "x", "size": 1, "more": 2}',
        b'{"name": "x", "size": true}',
        b'{"name": "x", "size": 1.0}',
        b'{"name": null, "size": 1}',
    ],
)
def test_a_record_of_any_other_shape_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(not|unknown|size|name)"):
        decode_record(content, {"name": str, "size": int})


def test_a_refusal_names_fields_and_quotes_no_values() -> None:
    with pytest.raises(ValueError, match="key is not of type str") as caught:
        checked_record({"key": ["hidden"]}, {"key": str})
    assert "hidden" not in str(caught.value)
