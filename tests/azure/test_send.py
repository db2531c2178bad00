"""`send azure://…`: cycles of snapshots against Azurite, bare and behind a proxy that answers diffs."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from agents.process_server import send as send_disks
from agents.send_config import AzureConfig, DiskConfig, SendConfig, SendReport
from replicator.clock import Clock
from replicator.files import Files
from replicator.formats.vhd import make_footer
from replicator.framing import Progress
from replicator.transport.dial import Address
from tests.agents.harness import BOUND_S, MIB, Process, Target, receiving
from tests.azure.azurite import KEY, Disk, Emulator
from tests.azure.diff_proxy import RunningProxy

pytestmark = pytest.mark.peer("azurite", "qemu-img")

SIZE = 8 * MIB
PAGE = 512
NewDisk = Callable[..., Disk]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def target(tmp_path: Path):
    with receiving(tmp_path / "target") as target:
        yield target


@pytest.fixture
def credentials(tmp_path: Path, proxy: RunningProxy) -> Path:
    """A file with the connection string of the proxy."""
    path = tmp_path / "credentials"
    path.write_text(proxy.connection_string)
    return path


def sending(target: Target, state: Path, credentials: Path, *sources: str, **how) -> Process:
    """The command, started."""
    options = ("--to", target.address, "--state", state, "--json", "--give-up-after", "0")
    given = ("--token-file", "-", "--azure-credentials", credentials)
    return Process("send", *sources, *options, *given, stdin=target.token, **how)


async def send_here(target: Target, state: Path, credentials: Path, *disks: Disk) -> SendReport:
    """What it does, in this process, which need not import the SDKs for every cycle."""
    config = SendConfig(
        group="disk",
        disks=tuple(DiskConfig(f"disk{number or ''}", disk.address) for number, disk in enumerate(disks)),
        to=Address.parse(target.address),
        token=target.token,
        state=state,
        streams=2,
        level=None,
        quiesced=False,
        give_up_after_s=0,
        azure=AzureConfig(credentials),
    )
    return await send_disks(config, Progress(), Clock(), Files(), lambda _: None)


def fill(disk: Disk, rng: random.Random) -> None:
    """Data in a third of it, here and there."""
    for _ in range(10):
        write(disk, rng, PAGE * rng.randrange(1, MIB // PAGE // 2))


def write(disk: Disk, rng: random.Random, length: int, size: int = SIZE) -> None:
    offset = PAGE * rng.randrange((size - length) // PAGE)
    disk.write(offset, rng.randbytes(length))


def scribble(disk: Disk, rng: random.Random) -> None:
    """A cycle's worth: pages written, rewritten as they were, and cleared."""
    for _ in range(8):
        write(disk, rng, PAGE * rng.choice([1, 8, 129, 700]))
    for _ in range(6):
        length = PAGE * rng.choice([1, 8, 129, 2048])
        disk.clear(PAGE * rng.randrange((SIZE - length) // PAGE), length)


def identical(disk: Disk, vmdk: Path, folder: Path) -> bool:
    """Whether qemu-img finds the blob in the VMDK."""
    raw = folder / "blob.raw"
    raw.write_bytes(disk.blob.download_blob().readall()[:SIZE])
    command = ("qemu-img", "compare", "-f", "raw", "-F", "vmdk", raw, vmdk)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND_S)
    assert done.returncode in (0, 1), done
    return done.returncode == 0


@pytest.mark.parametrize("mode", ["bare", "diff", "409", "501", "whole"])
async def test_ten_cycles_are_identical_and_leave_one_snapshot(
    mode: str,
    new_disk: NewDisk,
    proxy: RunningProxy,
    credentials: Path,
    target: Target,
    tmp_path: Path,
    seed: int,
    count: Callable[[int, int], int],
) -> None:
    rng = random.Random(seed)
    disk = new_disk(SIZE)
    fill(disk, rng)
    if mode == "bare":
        credentials.write_text(proxy.emulator.connection_string)
    else:
        proxy.set(mode)
    for cycle in range(count(10, 100)):
        done = await send_here(target, tmp_path / "state", credentials, disk)
        assert done.mode == ("incremental" if cycle else "full"), cycle
        assert (done.consistency, done.fuzzy, done.passes) == ("crash", False, 1)
        assert done.recovery_point is not None
        assert identical(disk, target.directory / "disk.vmdk", tmp_path), cycle
        assert len(disk.snapshots()) == 1
        if mode == "diff" and cycle:
            assert done.read_bytes < SIZE / 2, done
        scribble(disk, rng)


@pytest.mark.parametrize("mode", ["409", "501", "whole"])
async def test_without_a_diff_all_is_read_and_the_difference_sent(
    mode: str, new_disk: NewDisk, proxy: RunningProxy, credentials: Path, target: Target, tmp_path: Path
) -> None:
    disk = new_disk(SIZE)
    disk.write(0, os.urandom(SIZE // 2))
    proxy.set(mode)
    await send_here(target, tmp_path / "state", credentials, disk)
    disk.write(0, os.urandom(PAGE))
    disk.clear(SIZE // 4, MIB)
    done = await send_here(target, tmp_path / "state", credentials, disk)
    assert (done.mode, done.passes) == ("incremental", 1)
    assert done.sent_bytes < 2 * 65536
    assert identical(disk, target.directory / "disk.vmdk", tmp_path)


KILLS = (
    "snapshot.before_take",
    "snapshot.taken",
    "epoch.before_begin",
    "epoch.begun",
    "replace.before_rename",
    "replace.done:2",
    "send.acknowledged",
    "epoch.before_publish",
    "epoch.published",
    "snapshot.before_delete",
    "snapshot.deleted",
)


@pytest.mark.parametrize("failpoint", KILLS)
async def test_kill_9_anywhere_leaves_what_the_next_run_needs_and_no_more(
    failpoint: str, new_disk: NewDisk, credentials: Path, target: Target, tmp_path: Path, seed: int
) -> None:
    """Two disks of a group; what is written between the two runs is at the target after the second."""
    rng, state = random.Random(seed), tmp_path / "state"
    disks = [new_disk(SIZE, name=f"{number}.vhd") for number in range(2)]
    for disk in disks:
        fill(disk, rng)
    await send_here(target, state, credentials, *disks)
    for disk in disks:
        scribble(disk, rng)
    addresses = [disk.address for disk in disks]
    names = ("--group", "disk", "--disk", "disk", "--disk", "disk1")
    with sending(target, state, credentials, *addresses, *names, failpoint=failpoint) as process:
        assert process.wait().status == -signal.SIGKILL
    for disk in disks:
        assert 1 <= len(disk.snapshots()) <= 2
        scribble(disk, rng)
    done = await send_here(target, state, credentials, *disks)
    assert (done.mode, done.fuzzy) == ("incremental", False)
    assert done.consistency in ("crash", "per-disk")  # two snapshots may be of one millisecond
    for number, disk in enumerate(disks):
        assert identical(disk, target.directory / f"disk{number or ''}.vmdk", tmp_path)
        assert len(disk.snapshots()) == 1


async def test_an_interrupted_epoch_goes_on_with_its_own_snapshots(
    new_disk: NewDisk, credentials: Path, proxy: RunningProxy, target: Target, state: Path, seed: int
) -> None:
    disk = new_disk(SIZE)
    fill(disk, random.Random(seed))
    with sending(target, state, credentials, disk.address, failpoint="send.acknowledged") as process:
        assert process.wait().status == -signal.SIGKILL
    before = disk.snapshots()
    proxy.set("diff")
    with sending(target, state, credentials, disk.address) as process:
        done = process.wait().ok
    assert len(before) == 1 and done["passes"] == 2
    assert proxy.asked()["snapshot"] == 1  # the second pass, for what was written since
    assert disk.snapshots() != before and len(disk.snapshots()) == 1


async def test_snapshots_of_others_are_never_touched(
    new_disk: NewDisk, credentials: Path, target: Target, state: Path, seed: int
) -> None:
    """Those without our tag, of another group and of another target's; a left-over of ours goes."""
    disk = new_disk(SIZE)
    fill(disk, random.Random(seed))
    await send_here(target, state, credentials, disk)
    ours = disk.blob.from_blob_url(
        disk.blob.url, snapshot=disk.snapshots()[0], credential=disk.blob.credential
    )
    tags = ours.get_blob_properties().metadata
    group, installation = {"replicator_group": "x"}, {"replicator_installation": "f" * 16}
    others = [{}, {"note": "mine"}, tags | group, tags | installation]
    kept = {disk.blob.create_snapshot(metadata=one)["snapshot"] for one in others}
    disk.blob.create_snapshot(metadata=tags | {"replicator_epoch": "ab" * 16})
    await send_here(target, state, credentials, disk)
    assert kept < set(disk.snapshots()) and len(disk.snapshots()) == len(others) + 1


async def test_a_lost_memory_costs_no_truth(
    new_disk: NewDisk, credentials: Path, target: Target, state: Path, tmp_path: Path, seed: int
) -> None:
    """What the snapshots' tags say is enough to go on by differences."""
    rng = random.Random(seed)
    disk = new_disk(SIZE)
    fill(disk, rng)
    await send_here(target, state, credentials, disk)
    scribble(disk, rng)
    (state / "groups").rename(tmp_path / "lost")
    done = await send_here(target, state, credentials, disk)
    assert done.passes == 2 and done.read_bytes < SIZE / 4
    assert identical(disk, target.directory / "disk.vmdk", tmp_path)
    assert len(disk.snapshots()) == 1


async def test_a_snapshot_that_somebody_deleted_costs_a_comparison_and_no_truth(
    new_disk: NewDisk, credentials: Path, target: Target, state: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    disk = new_disk(SIZE)
    fill(disk, rng)
    await send_here(target, state, credentials, disk)
    scribble(disk, rng)
    disk.blob.delete_blob(delete_snapshots="only")
    await send_here(target, state, credentials, disk)
    assert identical(disk, target.directory / "disk.vmdk", tmp_path)
    assert len(disk.snapshots()) == 1


async def test_throttled_and_broken_reads_cost_time_alone(
    new_disk: NewDisk,
    credentials: Path,
    proxy: RunningProxy,
    target: Target,
    state: Path,
    tmp_path: Path,
    seed: int,
) -> None:
    disk = new_disk(SIZE)
    fill(disk, random.Random(seed))
    proxy.set("throttle=4")
    proxy.set("cut=5")
    done = await send_here(target, state, credentials, disk)
    asked = proxy.asked()
    assert asked["throttled"] and asked["cut"]
    assert done.resent_bytes == 0 and identical(disk, target.directory / "disk.vmdk", tmp_path)


async def test_a_footer_is_no_part_of_the_disk(
    new_disk: NewDisk, credentials: Path, target: Target, state: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    disk = new_disk(SIZE, tail=make_footer(SIZE, UUID(int=7), datetime.now(UTC)))
    fill(disk, rng)
    for _ in range(2):
        await send_here(target, state, credentials, disk)
        assert (target.directory / "disk-flat.vmdk").stat().st_size == SIZE
        assert identical(disk, target.directory / "disk.vmdk", tmp_path)
        scribble(disk, rng)


def test_watch_sends_again_and_again_until_it_is_told_to_stop(
    new_disk: NewDisk, credentials: Path, target: Target, state: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    disk = new_disk(SIZE)
    fill(disk, rng)
    with sending(target, state, credentials, disk.address, "--watch", "0.1") as process:
        process.line()
        scribble(disk, rng)
        # The one that is under way as this is written may have begun before.
        count = len(process.line().splitlines())
        lines = process.lines(count + 2)
        process.signal(signal.SIGTERM)
        process.wait()
    assert [line["mode"] for line in lines[1:]] == ["incremental"] * (len(lines) - 1)
    assert identical(disk, target.directory / "disk.vmdk", tmp_path)


def test_a_group_of_a_blob_and_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(512))
    arguments = ("send", "azure://acc0/disks/b.vhd", tmp_path / "a.img", "--group", "g", "--json")
    with Process(*arguments, "--to", "127.0.0.1:1") as process:
        assert process.wait().error["code"] == "usage.sources"


def test_a_refusal_tells_its_reason_and_not_the_key(
    new_disk: NewDisk, emulator: Emulator, target: Target, state: Path, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    wrong = "c2VjcmV0LWNhbmFyeQ=="
    credentials.write_text(emulator.connection_string.replace(KEY, wrong))
    with sending(target, state, credentials, new_disk(SIZE).address) as process:
        done = process.wait()
    assert done.error["code"] == "azure.denied"
    assert wrong not in done.stdout + done.stderr
