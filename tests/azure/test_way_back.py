"""VMDKs become page blobs, cycle after cycle, and come home again; what kills and other hands leave."""

import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import BlobClient, BlobServiceClient

from protocol.messages import NO_ID, Consistency, Interval, Mode
from replicator.azure import way_back
from replicator.azure.access import Account, Credentials
from replicator.azure.blob import BlobAddress, InAccount, PageBlob
from replicator.azure.blob_epochs import BlobEpochs
from replicator.changes import Changes
from replicator.clock import Clock
from replicator.errors import LinkError
from replicator.failpoints import NAMES
from replicator.files import Files
from replicator.formats.vhd import FOOTER_BYTES, parse_footer
from replicator.framing import Progress, SendingDisk
from replicator.images.flat_vmdk import FlatVmdk
from replicator.local import LocalDisk, LocalEpoch
from replicator.sources.page_blob import PageBlobSource
from replicator.workers import Workers
from tests.azure.azurite import ACCOUNT, Emulator
from tests.azure.back_child import send_back
from tests.house.tree import ROOT
from tests.replicator.trust import refused

pytestmark = pytest.mark.peer("azurite")

MIB = 1 << 20
BLOCK = 64 * 1024
SIZE = 24 * MIB


@dataclass
class Disk:
    """A VMDK, written to behind the product's back, and what it holds."""

    path: Path
    content: bytearray
    rng: random.Random

    @classmethod
    def make(cls, folder: Path, name: str, size: int, rng: random.Random) -> "Disk":
        dir_fd = os.open(folder, os.O_RDONLY)
        image = FlatVmdk.create(Files(), dir_fd, name, size)
        image.publish(cid=1)
        image.close()
        os.close(dir_fd)
        disk = cls(folder / f"{name}.vmdk", bytearray(size), rng)
        for _ in range(6):
            disk.write(rng.randrange(size // 512) * 512, rng.randrange(1, 4 * MIB // 512) * 512)
        return disk

    @property
    def flat(self) -> Path:
        return self.path.with_name(f"{self.path.stem}-flat.vmdk")

    def write(self, offset: int, length: int) -> None:
        self._put(offset, self.rng.randbytes(min(length, len(self.content) - offset)))

    def zero(self, offset: int, length: int) -> None:
        self._put(offset, bytes(min(length, len(self.content) - offset)))

    def _put(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        with self.flat.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def scribble(self) -> None:
        """Small and larger writes, and zeros over data."""
        sectors = len(self.content) // 512
        for _ in range(5):
            self.write(self.rng.randrange(sectors) * 512, self.rng.randrange(1, 40) * 512)
        self.write(self.rng.randrange(sectors) * 512, MIB)
        self.zero(self.rng.randrange(sectors) * 512, self.rng.randrange(1, MIB // 512) * 512)
        self.zero(self.rng.randrange(len(self.content) // BLOCK) * BLOCK, 4 * BLOCK)


@dataclass
class Site:
    """Disks at home, a container in Azure, and what is remembered between runs."""

    emulator: Emulator
    service: BlobServiceClient
    container: str
    state: Path
    folder: Path
    rng: random.Random
    disks: list[Disk] = field(default_factory=list)

    def add(self, name: str, size: int = SIZE) -> Disk:
        self.disks.append(Disk.make(self.folder, name, size, self.rng))
        return self.disks[-1]

    async def cycle(self, changes: Changes | None = None, **options: Any) -> tuple[Any, Progress, list[str]]:
        return await send_back(
            self.emulator.connection_string,
            self.container,
            self.state,
            "web01",
            [disk.path for disk in self.disks],
            changes,
            **options,
        )

    def child(self, failpoint: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.azure.back_child", self.emulator.connection_string]
        command += [self.container, str(self.state), "web01", *(str(disk.path) for disk in self.disks)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "FAILPOINT": failpoint},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def blob(self, disk: Disk) -> BlobClient:
        return self.service.get_blob_client(self.container, f"{disk.path.stem}.vhd")

    def points(self, disk: Disk) -> list[Any]:
        name = f"{disk.path.stem}.vhd"
        found = self.service.get_container_client(self.container).list_blobs(
            name_starts_with=name, include=["snapshots", "metadata"]
        )
        return [item for item in found if item.snapshot]

    def check(self, disk: Disk) -> None:
        """The blob is the disk, a footer, and nothing else; so is its newest snapshot."""
        newest = max(self.points(disk), key=lambda point: point.snapshot)
        for client in (
            self.blob(disk),
            self.service.get_blob_client(self.container, f"{disk.path.stem}.vhd", snapshot=newest.snapshot),
        ):
            content = client.download_blob().readall()
            size = len(disk.content)
            assert content[:size] == disk.content
            assert not any(content[size:-FOOTER_BYTES])
            footer = parse_footer(content[-FOOTER_BYTES:])
            assert footer is not None and footer.disk_bytes == len(content) - FOOTER_BYTES


@pytest.fixture
def site(emulator: Emulator, service: BlobServiceClient, tmp_path: Path, seed: int) -> Iterator[Site]:
    container = f"back-{secrets.token_hex(6)}"
    service.create_container(container)
    folder = tmp_path / "datastore"
    folder.mkdir()
    yield Site(emulator, service, container, tmp_path / "state", folder, random.Random(seed))
    service.delete_container(container)


# ------------------------------------------------------------------ cycles


async def test_ten_incremental_cycles_leave_the_blob_identical_each_time(site: Site) -> None:
    disk = site.add("web01")
    outcome, _, _ = await site.cycle()
    assert outcome.mode is Mode.FULL
    site.check(disk)
    for number in range(10):
        disk.scribble()
        before = outcome.epoch
        outcome, progress, told = await site.cycle()
        assert outcome.mode is Mode.INCREMENTAL, told
        assert outcome.epoch != before
        assert (outcome.consistency, outcome.recovery_point) == (Consistency.CRASH, outcome.epoch)
        assert progress.done == progress.size == SIZE
        assert progress.read < SIZE / 2
        site.check(disk)
        assert len(site.points(disk)) == min(number + 2, way_back.POINTS_KEPT)


@pytest.mark.parametrize("size", [512, MIB - 512, 3 * MIB + 512])
async def test_a_disk_that_is_not_of_whole_mib_is_followed_by_zeros(site: Site, size: int) -> None:
    disk = site.add("odd", size)
    for _ in range(2):
        await site.cycle()
        site.check(disk)
        disk.write(max(0, size - 8 * 512), 8 * 512)


async def test_vmdk_to_blob_to_vmdk_is_identical(site: Site, tmp_path: Path) -> None:
    disk = site.add("web01")
    await site.cycle()
    disk.scribble()
    await site.cycle()
    home = await brought_home(site, disk, tmp_path / "home")
    assert home == disk.content


async def brought_home(site: Site, disk: Disk, folder: Path) -> bytes:
    """The blob as a VMDK again, through the source that reads blobs and the image that writes VMDKs."""
    folder.mkdir()
    dir_fd = os.open(folder, os.O_RDONLY)
    account = Account(ACCOUNT, Credentials.parse(site.emulator.connection_string, "test"), None, Clock())
    with Workers() as workers:
        address = BlobAddress(ACCOUNT, site.container, f"{disk.path.stem}.vhd")
        blob = PageBlob(InAccount(account, address), str(address))
        source = await PageBlobSource.open(blob, workers)
        image = FlatVmdk.create(Files(), dir_fd, "home", source.size_bytes)
        local = LocalDisk(SendingDisk("home", source, number=1), image)
        await LocalEpoch([local], Mode.FULL, workers, 1, Progress(), lambda *_: None).run()
        image.sync()
        image.publish(cid=2)
        image.close()
        await source.close()
    await account.close()
    os.close(dir_fd)
    return (folder / "home-flat.vmdk").read_bytes()


async def test_nothing_changed_costs_no_pages(site: Site) -> None:
    disk = site.add("web01")
    await site.cycle()
    outcome, progress, _ = await site.cycle()
    assert (outcome.mode, progress.read, progress.matched) == (Mode.INCREMENTAL, 0, SIZE)
    site.check(disk)


async def test_a_list_of_changes_spares_the_rest_if_the_blob_is_where_it_begins(site: Site) -> None:
    disk = site.add("web01")
    first, _, _ = await site.cycle()
    disk.write(2 * MIB, 4096)
    disk.write(9 * MIB, 4096)
    listed = {"web01": (Interval(2 * MIB, 2 * MIB + BLOCK), Interval(9 * MIB, 9 * MIB + BLOCK))}
    outcome, progress, _ = await site.cycle(Changes(first.epoch, listed))
    assert outcome.mode is Mode.INCREMENTAL
    assert progress.read <= 2 * BLOCK
    site.check(disk)
    disk.write(5 * MIB, 4096)
    await site.cycle(Changes(first.epoch, listed))  # of an epoch that is over: everything is looked at
    site.check(disk)


# ------------------------------------------------------------------ groups


async def test_a_group_is_sealed_at_one_epoch_in_all_its_blobs(site: Site) -> None:
    disks = [site.add("system"), site.add("data", 8 * MIB)]
    for _ in range(3):
        outcome, _, _ = await site.cycle()
        assert outcome.consistency is Consistency.CRASH
        for disk in disks:
            site.check(disk)
            newest = max(site.points(disk), key=lambda point: point.snapshot)
            assert newest.metadata["replicator_point"] == outcome.epoch.hex()
            disk.scribble()


async def test_a_disk_that_is_new_in_the_group_is_compared_and_so_are_the_others(site: Site) -> None:
    first = site.add("system")
    await site.cycle()
    second = site.add("data", 8 * MIB)
    first.scribble()
    outcome, _, _ = await site.cycle()
    assert outcome.mode is Mode.RESYNC
    site.check(first)
    site.check(second)


# ------------------------------------------------------------------ other hands, and lost memory


async def test_a_blob_that_somebody_has_written_to_is_compared_and_set_right(site: Site) -> None:
    disk = site.add("web01")
    await site.cycle()
    site.blob(disk).upload_page(b"x" * 512, 7 * MIB, 512)
    site.blob(disk).clear_page(0, MIB)
    outcome, progress, _ = await site.cycle()
    assert outcome.mode is Mode.RESYNC
    assert progress.matched > SIZE / 2
    site.check(disk)


async def test_without_its_memory_it_compares_with_the_blob_and_sends_the_difference(site: Site) -> None:
    disk = site.add("web01")
    await site.cycle()
    disk.write(3 * MIB, 4096)
    site.state = site.state.with_name("new")
    outcome, progress, _ = await site.cycle()
    assert outcome.mode is Mode.RESYNC
    assert progress.read <= 2 * BLOCK
    site.check(disk)
    disk.scribble()
    outcome, _, _ = await site.cycle()
    assert outcome.mode is Mode.INCREMENTAL
    site.check(disk)


async def test_snapshots_of_others_stay_and_count_for_nothing(site: Site) -> None:
    disk = site.add("web01")
    await site.cycle()
    theirs = {site.blob(disk).create_snapshot(metadata={"owner": "night"})["snapshot"]}
    theirs.add(site.blob(disk).create_snapshot(metadata={"replicator_point": "zz"})["snapshot"])
    for _ in range(3):
        disk.scribble()
        outcome, _, _ = await site.cycle(points_kept=1)
        assert outcome.mode is Mode.INCREMENTAL
    assert {point.snapshot for point in site.points(disk)} > theirs
    assert len(site.points(disk)) == 3


async def test_a_disk_of_another_size_is_refused_before_anything_is_written(site: Site) -> None:
    disk = site.add("web01")
    await site.cycle()
    before = site.blob(disk).get_blob_properties().etag
    site.disks.clear()
    for path in site.folder.iterdir():
        path.unlink()
    site.add("web01", 2 * SIZE)
    with refused("target.other_size"):
        await site.cycle()
    assert site.blob(disk).get_blob_properties().etag == before


# ------------------------------------------------------------------ what breaks


async def test_what_breaks_in_the_middle_goes_on_with_the_same_epoch_and_repeats_little(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = site.add("web01", 96 * MIB)
    disk.write(0, 96 * MIB)
    left = [60]
    put = PageBlob.put

    async def failing(self: PageBlob, offset: int, data: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise LinkError("azure.unreachable", "gone", cause="c", fix="f")
        await put(self, offset, data)

    monkeypatch.setattr(PageBlob, "put", failing)
    with refused("azure.unreachable"):
        await site.cycle()
    assert site.points(disk) == []
    left[0] = 1 << 30
    outcome, progress, told = await site.cycle()
    assert "goes on" in told[0]
    assert outcome.mode is Mode.FULL
    assert progress.read <= (96 - 60 + 16) * MIB  # what was under way is said again
    site.check(disk)


async def test_what_was_noted_of_a_blob_that_is_gone_counts_for_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = site.add("web01")
    with monkeypatch.context() as patched:
        patched.setattr(BlobEpochs, "seal", _failing)
        with refused("azure.unreachable"):
            await site.cycle()
    site.blob(disk).delete_blob()
    await site.cycle()
    site.check(disk)


async def _failing(*_: object) -> None:
    raise LinkError("azure.unreachable", "gone", cause="c", fix="f")


async def test_a_source_that_changes_meanwhile_makes_no_recovery_point(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = site.add("web01")
    run = LocalEpoch.run

    async def meanwhile(self: LocalEpoch) -> None:
        await run(self)
        disk.write(MIB, 512)

    with monkeypatch.context() as patched:
        patched.setattr(LocalEpoch, "run", meanwhile)
        outcome, _, _ = await site.cycle()
    assert outcome.changed
    assert (outcome.consistency, outcome.recovery_point) == (Consistency.FUZZY, NO_ID)
    outcome, _, _ = await site.cycle()
    assert outcome.consistency is Consistency.CRASH
    site.check(disk)


FAMILIES = ("back.", "coverage.", "epoch.")


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("failpoint", sorted(name for name in NAMES if name.startswith(FAMILIES)))
async def test_kill_at_any_failpoint_and_the_next_run_makes_it_whole(
    site: Site, failpoint: str, first: bool
) -> None:
    disks = [site.add("system", 8 * MIB), site.add("data", 4 * MIB)]
    if not first:
        await site.cycle()
        for disk in disks:
            disk.scribble()
    killed = site.child(failpoint)
    assert killed.returncode == -signal.SIGKILL, killed
    done, _, _ = await site.cycle()
    for disk in disks:
        site.check(disk)
        newest = max(site.points(disk), key=lambda point: point.snapshot)
        assert newest.metadata["replicator_point"] == done.epoch.hex()
        sealed = [point.metadata["replicator_point"] for point in site.points(disk)]
        assert len(sealed) == len(set(sealed))  # one snapshot an epoch
        disk.scribble()
    outcome, _, _ = await site.cycle()
    assert outcome.mode in (Mode.INCREMENTAL, Mode.RESYNC)
    for disk in disks:
        site.check(disk)
        assert len(site.points(disk)) <= way_back.POINTS_KEPT
