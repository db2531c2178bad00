"""Flat VMDKs: made, published, adopted and refused; and read by qemu-img, who shares no code with us."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.payload import Extent
from replicator.errors import SpaceError, TargetError
from replicator.files import Files
from replicator.formats import vmdk
from replicator.images.flat_vmdk import FlatVmdk
from tests.replicator.images.conformance import MIB, SECTOR, Refusing, aligned, fill, put, read_back
from tests.replicator.images.conftest import run

QEMU = pytest.mark.peer("qemu-img")
EVERY_WAY = [
    (thin, create_type, size)
    for thin in (True, False)
    for create_type in ("vmfs", "monolithicFlat")
    for size in (SECTOR, 513 * SECTOR, 3 * MIB + SECTOR)
]


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises((TargetError, SpaceError)) as caught:
        call()
    return caught.value.code


# ------------------------------------------------------------------ made and published


@QEMU
@pytest.mark.parametrize(("thin", "create_type", "size"), EVERY_WAY)
def test_qemu_img_reads_what_we_wrote(
    folder: Path, dir_fd: int, thin: bool, create_type: vmdk.CreateType, size: int, seed: int
) -> None:
    rng = random.Random(seed)
    image = FlatVmdk.create(Files(), dir_fd, "disk", size, thin=thin, create_type=create_type)
    model = fill(image, rng)
    if size > MIB:
        put(image, model, [Extent(MIB + SECTOR, MIB, True)], rng)
    image.sync()
    image.publish(cid=0x1234ABCD)
    image.close()

    info = json.loads(run("qemu-img", "info", "--output=json", folder / "disk.vmdk"))
    assert (info["format"], info["virtual-size"]) == ("vmdk", size)
    assert info["format-specific"]["data"]["create-type"] == create_type
    assert info["format-specific"]["data"]["cid"] == 0x1234ABCD
    (folder / "model").write_bytes(model)
    run("qemu-img", "compare", "-F", "raw", "-f", "vmdk", folder / "disk.vmdk", folder / "model")
    run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", folder / "disk.vmdk", folder / "converted")
    assert (folder / "converted").read_bytes() == model


def test_before_it_is_published_nothing_looks_like_a_vmdk(folder: Path, dir_fd: int) -> None:
    image = FlatVmdk.create(Files(), dir_fd, "disk", MIB)
    assert os.listdir(folder) == ["disk-flat.vmdk"]
    assert (image.name, image.blank, image.published) == ("disk.vmdk", True, False)
    image.publish(cid=7)
    image.close()
    assert sorted(os.listdir(folder)) == ["disk-flat.vmdk", "disk.vmdk"]
    assert vmdk.parse((folder / "disk.vmdk").read_bytes(), "disk.vmdk").cid == 7


def test_an_interrupted_first_send_goes_on_in_the_same_file(folder: Path, dir_fd: int) -> None:
    image = FlatVmdk.create(Files(), dir_fd, "disk", MIB)
    image.write([Extent(0, SECTOR)], aligned(b"\1" * SECTOR))
    image.close()
    again = FlatVmdk.open_unpublished(Files(), dir_fd, "disk", MIB)
    assert not again.blank
    again.write([Extent(0, SECTOR, True)], aligned(b""))  # the block became zero before it was sent again
    again.sync()
    again.publish(cid=8)
    again.close()
    assert read_back(folder / "disk-flat.vmdk", MIB) == bytes(MIB)


def test_publishing_again_changes_the_content_id_and_not_one_byte_more(folder: Path, dir_fd: int) -> None:
    image = FlatVmdk.create(Files(), dir_fd, "disk", MIB)
    image.publish(cid=0x0000000A)
    path = folder / "disk.vmdk"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b'ddb.custom = "\xff \xe4"\r\n# a comment')
    path.chmod(0o640)
    before = path.read_bytes()
    image.publish(cid=0x0000000B)
    image.close()
    assert path.read_bytes() == before.replace(b"CID=0000000a", b"CID=0000000b")
    assert path.stat().st_mode & 0o777 == 0o640


def test_an_existing_disk_is_neither_made_again_nor_taken_for_an_unfinished_one(dir_fd: int) -> None:
    image = FlatVmdk.create(Files(), dir_fd, "disk", MIB)
    assert code_of(lambda: FlatVmdk.create(Files(), dir_fd, "disk", MIB)) == "target.exists"
    image.publish(cid=1)
    image.close()
    assert code_of(lambda: FlatVmdk.create(Files(), dir_fd, "disk", MIB)) == "target.exists"
    assert code_of(lambda: FlatVmdk.open_unpublished(Files(), dir_fd, "disk", MIB)) == "target.exists"


def test_what_is_not_there_is_told_apart_from_what_is_wrong(folder: Path, dir_fd: int) -> None:
    with pytest.raises(FileNotFoundError):
        FlatVmdk.open_unpublished(Files(), dir_fd, "disk", MIB)
    with pytest.raises(FileNotFoundError):
        FlatVmdk.open_published(Files(), dir_fd, "disk")
    (folder / "disk.vmdk").write_bytes(vmdk.render(vmdk.new("disk-flat.vmdk", MIB, cid=1)))
    assert code_of(lambda: FlatVmdk.open_published(Files(), dir_fd, "disk")) == "target.missing"


# ------------------------------------------------------------------ space


@pytest.mark.peer("losetup", "mkfs.ext4")
def test_a_full_datastore_is_a_space_error_and_the_disk_goes_on_after_it(
    mounted: Callable[[str, int], Path], seed: int
) -> None:
    place = mounted("ext4", 16 * MIB)
    dir_fd = os.open(place, os.O_RDONLY)
    image = FlatVmdk.create(Files(), dir_fd, "disk", 64 * MIB)
    rng = random.Random(seed)
    model = bytearray(64 * MIB)

    def fill_it() -> None:
        for start in range(0, 64 * MIB, MIB):
            put(image, model, [Extent(start + SECTOR, MIB - SECTOR)], rng)

    assert code_of(fill_it) == "target.full"
    assert not image.blank
    image.write([Extent(0, 64 * MIB, True)], aligned(b""))  # gives all of it back
    image.write([Extent(MIB, 4 * MIB)], aligned(b"\7" * 4 * MIB))
    image.sync()
    expected = bytes(MIB) + b"\7" * 4 * MIB + bytes(59 * MIB)
    assert read_back(place / "disk-flat.vmdk", 64 * MIB) == expected
    image.close()
    os.close(dir_fd)


@pytest.mark.peer("losetup", "mkfs.ext4")
@pytest.mark.parametrize("file_system", ["ext4", "tmpfs"])
def test_a_thick_disk_that_does_not_fit_leaves_nothing_behind(
    mounted: Callable[[str, int], Path], file_system: str
) -> None:
    place = mounted(file_system, 16 * MIB)
    before = os.listdir(place)
    dir_fd = os.open(place, os.O_RDONLY)
    assert code_of(lambda: FlatVmdk.create(Files(), dir_fd, "disk", 64 * MIB, thin=False)) == "target.full"
    assert os.listdir(place) == before
    os.close(dir_fd)


def test_where_space_cannot_be_reserved_a_thick_disk_is_written_full_of_zeros(
    folder: Path, dir_fd: int
) -> None:
    size = 2 * MIB + SECTOR
    image = FlatVmdk.create(Refusing(fallocate_0x0=errno.EOPNOTSUPP), dir_fd, "disk", size, thin=False)
    image.close()
    assert (folder / "disk-flat.vmdk").stat().st_blocks * 512 >= size
    assert read_back(folder / "disk-flat.vmdk", size) == bytes(size)


@pytest.mark.parametrize("size", [0, 511, MIB + 1, -512, 2**63])
def test_a_size_that_no_disk_has_is_refused(folder: Path, dir_fd: int, size: int) -> None:
    assert code_of(lambda: FlatVmdk.create(Files(), dir_fd, "disk", size)) == "target.bad_size"
    assert os.listdir(folder) == []


def test_a_size_beyond_the_file_system_leaves_nothing_behind(folder: Path, dir_fd: int) -> None:
    size = 2**63 - SECTOR
    assert code_of(lambda: FlatVmdk.create(Files(), dir_fd, "disk", size)) == "target.create_failed"
    assert os.listdir(folder) == []


# ------------------------------------------------------------------ what others left there


@QEMU
@pytest.mark.parametrize("adapter", ["ide", "lsilogic", "buslogic", "legacyESX"])
def test_a_vmdk_of_qemu_img_is_adopted(folder: Path, dir_fd: int, adapter: str, seed: int) -> None:
    options = f"subformat=monolithicFlat,adapter_type={adapter}"
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", options, folder / "disk.vmdk", str(3 * MIB))
    before = (folder / "disk.vmdk").read_bytes()
    old_cid = vmdk.parse(before, "disk.vmdk").cid
    image = FlatVmdk.open_published(Files(), dir_fd, "disk")
    assert (image.size_bytes, image.blank, image.thin) == (3 * MIB, False, False)
    model = fill(image, random.Random(seed))
    image.publish(cid=0xCAFE)
    image.close()
    expected = before.replace(b"CID=%x\n" % old_cid, b"CID=0000cafe\n", 1)
    assert (folder / "disk.vmdk").read_bytes() == expected != before
    run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", folder / "disk.vmdk", folder / "converted")
    assert (folder / "converted").read_bytes() == model


@QEMU
@pytest.mark.parametrize(
    ("subformat", "code"),
    [
        ("monolithicSparse", "vmdk.sparse_unsupported"),
        ("streamOptimized", "vmdk.sparse_unsupported"),
        ("twoGbMaxExtentSparse", "vmdk.sparse_unsupported"),
        ("twoGbMaxExtentFlat", "vmdk.several_extents"),
    ],
)
def test_other_kinds_that_qemu_img_makes_are_refused(
    folder: Path, dir_fd: int, subformat: str, code: str
) -> None:
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", folder / "d.vmdk", "5G")
    assert code_of(lambda: FlatVmdk.open_published(Files(), dir_fd, "d")) == code


@pytest.mark.parametrize("change", [-SECTOR, SECTOR, SECTOR - MIB])
def test_data_of_another_size_than_the_descriptor_says_is_refused(
    folder: Path, dir_fd: int, change: int
) -> None:
    FlatVmdk.create(Files(), dir_fd, "disk", MIB).close()
    os.truncate(folder / "disk-flat.vmdk", MIB + change)
    assert code_of(lambda: FlatVmdk.open_unpublished(Files(), dir_fd, "disk", MIB)) == "vmdk.extent_size"
    os.truncate(folder / "disk-flat.vmdk", MIB)
    image = FlatVmdk.open_unpublished(Files(), dir_fd, "disk", MIB)
    image.publish(cid=1)
    image.close()
    os.truncate(folder / "disk-flat.vmdk", MIB + change)
    assert code_of(lambda: FlatVmdk.open_published(Files(), dir_fd, "disk")) == "vmdk.extent_size"


def test_a_disk_has_one_writer_at_a_time(dir_fd: int) -> None:
    image = FlatVmdk.create(Files(), dir_fd, "disk", MIB)
    assert code_of(lambda: FlatVmdk.open_unpublished(Files(), dir_fd, "disk", MIB)) == "target.in_use"
    image.publish(cid=1)
    assert code_of(lambda: FlatVmdk.open_published(Files(), dir_fd, "disk")) == "target.in_use"
    image.close()
    FlatVmdk.open_published(Files(), dir_fd, "disk").close()


def test_two_writers_of_one_disk_are_refused(folder: Path, dir_fd: int) -> None:
    image = FlatVmdk.create(Files(), dir_fd, "disk", MIB)
    assert code_of(lambda: FlatVmdk.open_unpublished(Files(), dir_fd, "disk", MIB)) == "target.in_use"
    image.publish(cid=1)
    assert code_of(lambda: FlatVmdk.open_published(Files(), dir_fd, "disk")) == "target.in_use"
    image.close()
    FlatVmdk.open_published(Files(), dir_fd, "disk").close()


@pytest.mark.parametrize("planted", ["disk-flat.vmdk", "disk.vmdk"])
@pytest.mark.parametrize("kind", ["symlink", "dangling", "fifo", "folder", "device"])
def test_nothing_but_a_regular_file_is_opened(
    folder: Path, dir_fd: int, tmp_path: Path, planted: str, kind: str
) -> None:
    image = FlatVmdk.create(Files(), dir_fd, "disk", MIB)
    image.publish(cid=1)
    image.close()
    victim = tmp_path / "victim"
    os.rename(folder / planted, victim)
    content = victim.read_bytes()
    match kind:
        case "symlink":
            (folder / planted).symlink_to(victim)
        case "dangling":
            (folder / planted).symlink_to(folder / "nowhere")
        case "fifo":
            os.mkfifo(folder / planted)
        case "folder":
            (folder / planted).mkdir()
        case "device":
            os.mknod(folder / planted, 0o20600, os.makedev(1, 3))  # /dev/null
    refusals = {"target.not_a_file", "target.open_failed"}  # the latter: a folder opened for writing
    assert code_of(lambda: FlatVmdk.open_published(Files(), dir_fd, "disk")) in refusals
    assert code_of(lambda: FlatVmdk.create(Files(), dir_fd, "disk", MIB)) == "target.exists"
    if planted == "disk-flat.vmdk":
        (folder / "disk.vmdk").unlink()
        assert code_of(lambda: FlatVmdk.open_unpublished(Files(), dir_fd, "disk", MIB)) in refusals
    assert victim.read_bytes() == content
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize(
    "name", ["../victim", "/etc/passwd", "sub/disk-flat.vmdk", "..", "disk.vmdk", "", "a\\b"]
)
def test_a_descriptor_that_leads_elsewhere_opens_nothing(folder: Path, dir_fd: int, name: str) -> None:
    text = vmdk.render(vmdk.new("disk-flat.vmdk", MIB, cid=1)).replace(b"disk-flat.vmdk", name.encode())
    (folder / "disk.vmdk").write_bytes(text)
    assert code_of(lambda: FlatVmdk.open_published(Files(), dir_fd, "disk")) == "vmdk.outside_folder"


# ------------------------------------------------------------------ faults


def test_a_failed_publish_is_told_and_leaves_the_old_descriptor(folder: Path, dir_fd: int) -> None:
    class FailingRename(Files):
        def rename(self, dir_fd: int, old: str, new: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

    made = FlatVmdk.create(Files(), dir_fd, "disk", MIB)
    made.publish(cid=1)
    made.close()
    before = (folder / "disk.vmdk").read_bytes()
    image = FlatVmdk.open_published(FailingRename(), dir_fd, "disk")
    assert code_of(lambda: image.publish(cid=2)) == "target.publish_failed"
    assert (folder / "disk.vmdk").read_bytes() == before
    (folder / "disk.vmdk").unlink()
    assert code_of(lambda: image.publish(cid=2)) == "target.missing"


def test_what_may_have_lost_writes_is_not_published(folder: Path, dir_fd: int) -> None:
    FlatVmdk.create(Files(), dir_fd, "disk", MIB).close()
    image = FlatVmdk.open_unpublished(Refusing(fdatasync=errno.EIO), dir_fd, "disk", MIB)
    assert code_of(image.sync) == "target.sync_failed"
    assert code_of(lambda: image.publish(cid=1)) == "target.sync_failed"
    assert os.listdir(folder) == ["disk-flat.vmdk"]


LIFE = """
import os, sys
from replicator.files import Files
from replicator.images.flat_vmdk import FlatVmdk
fd = os.open(sys.argv[1], os.O_RDONLY)
image = FlatVmdk.create(Files(), fd, "disk", 1 << 20)
image.sync()
image.publish(cid=1)
"""


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("image.before_create", []),
        ("image.created", ["disk-flat.vmdk"]),
        ("image.before_sync", ["disk-flat.vmdk"]),
        ("image.synced", ["disk-flat.vmdk"]),
        ("image.before_publish", ["disk-flat.vmdk"]),
        ("image.published", ["disk-flat.vmdk", "disk.vmdk"]),
    ],
)
def test_a_process_that_dies_at_a_failpoint_leaves_what_can_be_gone_on_with(
    folder: Path, dir_fd: int, point: str, left: list[str]
) -> None:
    died = subprocess.run(
        [sys.executable, "-c", LIFE, str(folder)], env={**os.environ, "FAILPOINT": point}, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert sorted(os.listdir(folder)) == left
    match left:
        case []:
            image = FlatVmdk.create(Files(), dir_fd, "disk", MIB)
        case [_]:
            image = FlatVmdk.open_unpublished(Files(), dir_fd, "disk", MIB)
        case _:
            image = FlatVmdk.open_published(Files(), dir_fd, "disk")
    image.publish(cid=2)
    image.close()
