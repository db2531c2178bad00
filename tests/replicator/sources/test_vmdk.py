"""Flat VMDKs as sources: those that qemu-img makes, and the refusal of everything else."""

import os
import subprocess
from functools import partial
from pathlib import Path

import pytest

from protocol.constants import MIB
from replicator.files import Files
from replicator.sources.vmdk import open_vmdk
from replicator.workers import Workers
from tests.replicator.sources.conformance import (
    Disk,
    Layout,
    SourceConformance,
    random_layout,
    read,
    refused,
)

QEMU = pytest.mark.peer("qemu-img")


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def flat_vmdk(folder: Path, size: int = MIB) -> Path:
    """One as qemu-img makes it, its data all `x`."""
    path = folder / "disk.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", path, str(size))
    (folder / "disk-flat.vmdk").write_bytes(b"x" * size)
    return path


@QEMU
class TestVmdk(SourceConformance):
    """The contract, for disks that qemu-img converted."""

    @pytest.fixture(params=[1, 40_001], ids="{} sectors".format)
    def disk(self, request: pytest.FixtureRequest, tmp_path: Path, workers: Workers, seed: int) -> Disk:
        layout: Layout = random_layout(seed, request.param)
        (tmp_path / "disk.raw").write_bytes(layout.content)
        path = tmp_path / "disk.vmdk"
        qemu_img(
            "convert",
            "-O",
            "vmdk",
            "-o",
            "subformat=monolithicFlat",
            "-f",
            "raw",
            tmp_path / "disk.raw",
            path,
        )
        return Disk(layout.content, partial(open_vmdk, Files(), workers, path))


@QEMU
async def test_its_name_is_the_descriptors_and_a_change_of_the_data_is_seen(
    tmp_path: Path, workers: Workers
) -> None:
    path = flat_vmdk(tmp_path)
    source = await open_vmdk(Files(), workers, path)
    assert source.name == str(path)
    assert await read(source, 512, 512) == b"x" * 512
    with (tmp_path / "disk-flat.vmdk").open("r+b") as data:
        data.write(b"y")
    assert await source.changed()
    await source.close()


@QEMU
@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized", "twoGbMaxExtentSparse"])
async def test_sparse_kinds_are_recognised_however_large(
    tmp_path: Path, workers: Workers, subformat: str
) -> None:
    (tmp_path / "disk.raw").write_bytes(os.urandom(3 * MIB))
    path = tmp_path / "disk.vmdk"
    qemu_img(
        "convert", "-O", "vmdk", "-o", f"subformat={subformat}", "-f", "raw", tmp_path / "disk.raw", path
    )
    with refused("vmdk.sparse_unsupported", str(path), "convert"):
        await open_vmdk(Files(), workers, path)


@QEMU
@pytest.mark.parametrize("change", [-512, 512, -MIB])
async def test_data_of_another_size_is_refused(tmp_path: Path, workers: Workers, change: int) -> None:
    path = flat_vmdk(tmp_path)
    os.truncate(tmp_path / "disk-flat.vmdk", MIB + change)
    with refused("vmdk.extent_size", "disk-flat.vmdk", str(MIB)):
        await open_vmdk(Files(), workers, path)


@QEMU
@pytest.mark.parametrize("missing", ["disk.vmdk", "disk-flat.vmdk"])
async def test_a_missing_file_is_named(tmp_path: Path, workers: Workers, missing: str) -> None:
    path = flat_vmdk(tmp_path)
    (tmp_path / missing).unlink()
    with refused("source.missing", missing):
        await open_vmdk(Files(), workers, path)


@QEMU
@pytest.mark.parametrize("planted", ["disk.vmdk", "disk-flat.vmdk"])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
async def test_nothing_but_regular_files_of_its_folder_is_opened(
    tmp_path: Path, workers: Workers, planted: str, kind: str
) -> None:
    folder = tmp_path / "datastore"
    folder.mkdir()
    path = flat_vmdk(folder)
    (folder / planted).rename(tmp_path / "secret")
    if kind == "symlink":
        (folder / planted).symlink_to(tmp_path / "secret")
    elif kind == "fifo":
        os.mkfifo(folder / planted)
    else:
        (folder / planted).mkdir()
    code = "source.unreadable" if kind == "symlink" else "source.unsuitable"
    with refused(code, planted):
        await open_vmdk(Files(), workers, path)


@QEMU
async def test_data_in_another_folder_is_refused(tmp_path: Path, workers: Workers) -> None:
    path = flat_vmdk(tmp_path)
    path.write_text(path.read_text().replace('"disk-flat.vmdk"', '"../disk-flat.vmdk"'))
    with refused("vmdk.outside_folder"):
        await open_vmdk(Files(), workers, path)


@QEMU
async def test_nothing_stays_open(tmp_path: Path, workers: Workers) -> None:
    path = flat_vmdk(tmp_path)
    await (await open_vmdk(Files(), workers, path)).close()
    before = len(os.listdir("/proc/self/fd"))
    await (await open_vmdk(Files(), workers, path)).close()
    os.truncate(tmp_path / "disk-flat.vmdk", 512)
    with refused("vmdk.extent_size"):
        await open_vmdk(Files(), workers, path)
    path.write_bytes(b"KDMV")
    with refused("vmdk.sparse_unsupported"):
        await open_vmdk(Files(), workers, path)
    assert len(os.listdir("/proc/self/fd")) == before
