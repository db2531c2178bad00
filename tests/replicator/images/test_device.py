"""Raw files and block devices: which are taken, which are refused."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.payload import Extent
from replicator.errors import SpaceError, TargetError
from replicator.files import Files
from replicator.images.device import RawImage
from tests.replicator.images.conformance import MIB, SECTOR, Refusing, aligned, read_back


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises((TargetError, SpaceError)) as caught:
        call()
    return caught.value.code


@pytest.mark.peer("losetup", "mkfs.ext4")
def test_a_mounted_device_is_refused_and_its_file_system_untouched(
    mounted: Callable[[str, int], Path],
) -> None:
    place = mounted("ext4", 16 * MIB)
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    device = next(words[0] for words in lines if words[1] == str(place))
    assert code_of(lambda: RawImage.open(Files(), device)) == "target.device_busy"
    (place / "still").write_text("alive")


@pytest.mark.peer("losetup")
def test_a_device_has_one_owner_at_a_time(loop: Callable[..., Path]) -> None:
    device = loop(MIB)
    first = RawImage.open(Files(), device)
    assert code_of(lambda: RawImage.open(Files(), device)) == "target.device_busy"
    first.close()
    RawImage.open(Files(), device).close()


@pytest.mark.peer("losetup")
def test_a_refused_device_is_let_go(loop: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    device = loop(MIB)
    with monkeypatch.context() as broken:
        broken.setattr("replicator.linux.block_device_size", lambda fd: 0)
        assert code_of(lambda: RawImage.open(Files(), device)) == "target.bad_size"
    RawImage.open(Files(), device).close()


@pytest.mark.peer("losetup")
@pytest.mark.parametrize("sector", [512, 4096])
def test_a_device_is_zeroed_in_whole_pages_and_written_at_the_edges(
    loop: Callable[..., Path], sector: int
) -> None:
    ranges = []

    class Recording(Files):
        def zero_device(self, fd: int, offset: int, length: int) -> None:
            ranges.append((offset, length))
            super().zero_device(fd, offset, length)

    device = loop(MIB, sector)
    image = RawImage.open(Recording(), device)
    image.write([Extent(0, MIB)], aligned(b"\1" * MIB))
    image.write([Extent(SECTOR, 6 * SECTOR, True), Extent(4096 - SECTOR, 5120 + SECTOR, True)], aligned(b""))
    image.sync()
    image.close()
    assert ranges == [(4096, 4096)]
    expected = b"\1" * SECTOR + bytes(9216 - SECTOR) + b"\1" * (MIB - 9216)
    assert read_back(device, MIB) == expected


@pytest.mark.peer("losetup")
def test_a_device_is_found_through_a_link_as_in_dev_disk(loop: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "by-id").symlink_to(loop(MIB))
    image = RawImage.open(Files(), tmp_path / "by-id")
    assert (image.size_bytes, image.name) == (MIB, str(tmp_path / "by-id"))
    image.close()


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"x" * 513)
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    assert code_of(lambda: RawImage.open(Files(), tmp_path / "odd")) == "target.bad_size"
    assert code_of(lambda: RawImage.open(Files(), tmp_path / "empty")) == "target.bad_size"
    assert code_of(lambda: RawImage.open(Files(), tmp_path / "fifo")) == "target.not_a_file"
    assert code_of(lambda: RawImage.open(Files(), "/dev/null")) == "target.not_a_file"
    assert code_of(lambda: RawImage.open(Files(), tmp_path)) == "target.open_failed"
    assert code_of(lambda: RawImage.open(Files(), tmp_path / "nowhere")) == "target.missing"


def test_a_new_raw_file_never_replaces_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old")
    assert code_of(lambda: RawImage.create(Files(), path, MIB)) == "target.exists"
    assert path.read_bytes() == b"old"
    assert code_of(lambda: RawImage.create(Files(), tmp_path / "no" / "disk", MIB)) == "target.missing"
    assert code_of(lambda: RawImage.create(Files(), tmp_path / "odd", 513)) == "target.bad_size"


def test_a_raw_file_that_cannot_be_made_durable_is_removed(tmp_path: Path) -> None:
    class FailingSync(Refusing):
        def fsync(self, fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

    assert code_of(lambda: RawImage.create(FailingSync(), tmp_path / "disk", MIB)) == "target.create_failed"
    assert os.listdir(tmp_path) == []
