"""The sidecar: comes back as written, or is none."""

import errno
import os
import random
from pathlib import Path

import pytest

from replicator.errors import SpaceError
from replicator.files import Files
from replicator.images.sidecar import Sidecar, read_sidecar, sidecar_name, write_sidecar
from tests.replicator.images.conformance import Refusing

CLEAN = Sidecar("one", 3, b"e" * 16, True, 0x00ABCDEF, 1_700_000_000_123_456_789)
DIRTY = Sidecar("two", 4, b"f" * 16, False, 0xFFFFFFFE, 0)


@pytest.mark.parametrize("sidecar", [CLEAN, DIRTY])
def test_what_was_written_comes_back_readable_for_everybody(
    folder: Path, dir_fd: int, sidecar: Sidecar
) -> None:
    assert read_sidecar(Files(), dir_fd, "disk") is None
    write_sidecar(Files(), dir_fd, "disk", CLEAN)
    write_sidecar(Files(), dir_fd, "disk", sidecar)
    assert read_sidecar(Files(), dir_fd, "disk") == sidecar
    text = (folder / sidecar_name("disk")).read_text()
    assert ('"clean"' in text, '"dirty"' in text) == (sidecar.clean, not sidecar.clean)
    assert os.listdir(folder) == ["disk.replica.json"]


def test_a_damaged_one_is_none_and_no_damage_makes_a_dirty_one_clean(
    folder: Path, dir_fd: int, seed: int, count
) -> None:
    write_sidecar(Files(), dir_fd, "disk", DIRTY)
    path, rng = folder / sidecar_name("disk"), random.Random(seed)
    good = path.read_bytes()
    for cut in range(len(good) - 1):
        path.write_bytes(good[:cut])
        assert read_sidecar(Files(), dir_fd, "disk") is None, f"cut at {cut}"
    for _ in range(count(200, 5_000)):
        content = bytearray(good)
        content[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        found = read_sidecar(Files(), dir_fd, "disk")
        assert found is None or not found.clean
    for spoilt in (b"", b"[]", b"\xff", b"x" * (2 << 20)):
        path.write_bytes(spoilt)
        assert read_sidecar(Files(), dir_fd, "disk") is None


def test_one_of_a_newer_release_is_not_clean(folder: Path, dir_fd: int) -> None:
    write_sidecar(Files(), dir_fd, "disk", CLEAN)
    path = folder / sidecar_name("disk")
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    found = read_sidecar(Files(), dir_fd, "disk")
    assert found is None or not found.clean


def test_a_symbolic_link_is_not_followed(folder: Path, dir_fd: int) -> None:
    write_sidecar(Files(), dir_fd, "other", CLEAN)
    (folder / sidecar_name("disk")).symlink_to(sidecar_name("other"))
    assert read_sidecar(Files(), dir_fd, "disk") is None


def test_a_full_datastore_is_told_and_leaves_the_old_one(folder: Path, dir_fd: int) -> None:
    write_sidecar(Files(), dir_fd, "disk", CLEAN)
    with pytest.raises(SpaceError) as caught:
        write_sidecar(Refusing(pwrite=errno.ENOSPC), dir_fd, "disk", DIRTY)
    assert caught.value.code == "target.full"
    assert "disk.replica.json" in caught.value.message
    assert read_sidecar(Files(), dir_fd, "disk") == CLEAN
