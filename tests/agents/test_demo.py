"""`replicator demo` on disks of every kind: independent programs agree that the VMDK is the source."""

import random
import subprocess
from pathlib import Path

import pytest

from tests.agents.harness import MIB, digest, identical, make_disk, run, sidecar
from tests.real_disks import loop_device
from tests.real_disks import run as system

# What docs and scripts rely on (more may be added, none renamed).
STEP_KEYS = {
    "disk", "mode", "epoch", "read_bytes", "matched_bytes", "zero_bytes", "sent_bytes", "resent_bytes",
    "seconds", "vmdk",
}  # fmt: skip
DEMO_KEYS = {"steps", "verified", "vmdk", "seconds"}


def some_files(folder: Path, seed: int) -> Path:
    """A folder tree as a disk may hold it: small and large files, holes, links, odd names."""
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(40):
        path = folder / f"d{number % 5}" / f"file {number} ü"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(1, 200_000)))
    (folder / "link").symlink_to("d0")
    with (folder / "holes").open("wb") as file:
        file.write(b"head")
        file.seek(20 * MIB)
        file.write(b"tail")
    return folder


def ext4(image: Path, files: Path) -> None:
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    system("mkfs.ext4", "-q", "-d", files, image)


def xfs(image: Path, files: Path) -> None:
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    system("mkfs.xfs", "-q", image)
    place = image.parent / "mounted"
    place.mkdir()
    system("mount", "-o", "loop", image, place)
    try:
        system("cp", "-a", f"{files}/.", place)
    finally:
        system("umount", place)


def fsck_is_clean(kind: str, disk: Path) -> None:
    command = ("e2fsck", "-fn", disk) if kind == "ext4" else ("xfs_repair", "-n", "-f", disk)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done


def demonstrated(source: Path | None, directory: Path, *, again: bool = False) -> dict:
    """Run the demonstration; everything that it promises in its document holds. `again`: not the first one
    there.
    """
    given = ("--source", source) if source else ()
    done = run("demo", *given, "--dir", directory, "--json")
    document = done.ok
    assert document.keys() >= DEMO_KEYS
    assert document["verified"] is True
    first, *_, last = document["steps"]
    assert all(step.keys() >= STEP_KEYS for step in document["steps"])
    assert document["kills"] + len(document["steps"]) == 3
    vmdk = Path(document["vmdk"])
    assert vmdk == directory / first["vmdk"]
    size = (directory / f"{first['disk']}-flat.vmdk").stat().st_size
    if not again and not document["kills"]:
        # Zeros that are stored count twice: they are read, and found to be zero.
        assert size <= first["read_bytes"] + first["zero_bytes"]
    for step in document["steps"]:
        assert max(step["read_bytes"], step["zero_bytes"], step["matched_bytes"]) <= size
    assert first["mode"] == "full" if not again else first["mode"] in ("incremental", "resync")
    assert last["mode"] in ("incremental", "resync")
    assert [step["resent_bytes"] for step in document["steps"]] == [0] * len(document["steps"])
    assert sidecar(directory, first["disk"])["state"] == "clean"
    return document


@pytest.mark.peer("qemu-img", "mkfs.ext4", "fsck.ext4", "mkfs.xfs", "xfs_repair", "losetup")
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_arrives_whole_and_the_source_is_only_read(
    kind: str, tmp_path: Path, seed: int
) -> None:
    image = tmp_path / f"{kind}.img"
    {"ext4": ext4, "xfs": xfs}[kind](image, some_files(tmp_path / "files", seed))
    before = (digest(image), image.stat().st_mtime_ns, image.stat().st_size)
    document = demonstrated(image, tmp_path / "demo")
    assert identical(image, Path(document["vmdk"]))
    fsck_is_clean(kind, tmp_path / "demo" / f"{kind}-flat.vmdk")
    assert (digest(image), image.stat().st_mtime_ns, image.stat().st_size) == before
    assert document["qemu_img"] == "identical"
    assert document["steps"][0]["fuzzy"] is False


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("sectors", [1, 7, 8 * 2048 + 1, 16 * 2048 - 1])
def test_random_bytes_of_an_odd_number_of_sectors_arrive_whole(sectors: int, tmp_path: Path) -> None:
    source = make_disk(tmp_path / "odd.name.raw", sectors * 512)
    before = digest(source)
    document = demonstrated(source, tmp_path / "demo")
    flat = tmp_path / "demo" / "odd-flat.vmdk"
    assert flat.stat().st_size == sectors * 512
    assert digest(flat) == before == digest(source)
    assert identical(source, Path(document["vmdk"]))
    assert document["kills"] or document["steps"][0]["read_bytes"] == sectors * 512


@pytest.mark.peer("qemu-img", "mkfs.ext4", "fsck.ext4")
def test_without_a_source_it_makes_a_disk_and_a_second_run_goes_as_well(tmp_path: Path) -> None:
    first = demonstrated(None, tmp_path)
    assert identical(Path(first["source"]), Path(first["vmdk"]))
    fsck_is_clean("ext4", tmp_path / "demo-disk-flat.vmdk")
    second = demonstrated(None, tmp_path, again=True)
    assert second["vmdk"] == first["vmdk"]
    assert second["steps"][0]["epoch"] != first["steps"][0]["epoch"]
    assert identical(Path(second["source"]), Path(second["vmdk"]))


@pytest.mark.peer("qemu-img")
def test_a_second_run_brings_what_has_changed_since_zeros_too(tmp_path: Path) -> None:
    source = make_disk(tmp_path / "disk.img", 8 * MIB)
    demonstrated(source, tmp_path / "demo")
    with source.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(3 * MIB + 512))
        file.write(b"new")
    document = demonstrated(source, tmp_path / "demo", again=True)
    assert identical(source, Path(document["vmdk"]))
    assert document["kills"] or document["steps"][0]["zero_bytes"] >= 3 * MIB


@pytest.mark.peer("qemu-img", "losetup")
def test_a_block_device_arrives_whole_and_says_that_it_may_have_changed(tmp_path: Path) -> None:
    backing = make_disk(tmp_path / "backing", 8 * MIB, (0, 2 * MIB), (5 * MIB, MIB))
    with loop_device(backing) as device:
        document = demonstrated(device, tmp_path / "demo")
        assert identical(device, Path(document["vmdk"]))
    assert identical(backing, Path(document["vmdk"]))
    step = document["steps"][0]
    if not document["kills"]:
        assert step["read_bytes"] == 8 * MIB  # a device does not say where its holes are
        assert step["zero_bytes"] == 5 * MIB
    assert step["fuzzy"] is True
    assert step["disk"] == device.name


@pytest.mark.peer("qemu-img")
def test_for_people_it_ends_with_a_table_and_leaves_stdout_to_it(tmp_path: Path) -> None:
    source = make_disk(tmp_path / "disk.img", MIB)
    done = run("demo", "--source", source, "--dir", tmp_path / "demo")
    assert done.status == 0, done
    assert "verified: source and VMDK are equal" in done.stdout
    assert str(tmp_path / "demo" / "disk.vmdk") in done.stdout
    assert "receiving on" in done.stderr and "receiving on" not in done.stdout
