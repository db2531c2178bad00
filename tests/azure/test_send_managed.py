"""`send azure-disk://…` by the real command: a fake of Azure's management, and exports that Azurite holds."""

import asyncio
import os
import random
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest
from azure.storage.blob import BlobServiceClient

from agents.process_server import send as send_disks
from agents.send_config import DiskConfig, SendConfig, SendReport
from replicator.azure.arm import connect
from replicator.clock import Clock
from replicator.files import Files
from replicator.formats.vhd import make_footer
from replicator.framing import Progress
from replicator.transport.dial import Address
from tests.agents.harness import Done, Target, receiving, run
from tests.azure.azurite import Disk, make_disk
from tests.azure.diff_proxy import RunningProxy
from tests.azure.exports import AzuriteExports
from tests.azure.fake_arm import IDENTITY_HEADER, SECRET, SUBSCRIPTION, FakeArm, Fault, Held
from tests.azure.test_send import SIZE, fill, identical, scribble
from tests.replicator.trust import refused

pytestmark = pytest.mark.peer("azurite", "qemu-img")


@dataclass
class Cloud:
    """Disks of one machine behind the fake, and how a process server in Azure sees them."""

    arm: FakeArm
    service: BlobServiceClient
    container: str

    def add(self, name: str) -> Disk:
        tail = make_footer(SIZE, UUID(int=1), datetime(2025, 1, 1, tzinfo=UTC))
        disk = make_disk(self.service, self.container, name, SIZE, tail)
        self.arm.add_disk(name, SIZE, vm="web01")
        return disk

    async def send(self, target: Target, state: Path, *disks: str) -> SendReport:
        """A send in this process, which need not import the SDKs for every cycle."""
        sources = [DiskConfig(disk, f"azure-disk://{SUBSCRIPTION}/rg/{disk}") for disk in disks]
        config = SendConfig(
            group="web01",
            disks=tuple(sources),
            to=Address.parse(target.address),
            token=target.token,
            state=state,
            streams=2,
            level=None,
            quiesced=False,
            give_up_after_s=0,
        )
        return await send_disks(config, Progress(), Clock(), Files(), lambda _: None)

    async def command(self, target: Target, state: Path, disk: str, failpoint: str | None = None) -> Done:
        """The command, by one disk."""
        environment = self.environment | ({"FAILPOINT": failpoint} if failpoint else {})
        arguments = [f"azure-disk://{SUBSCRIPTION}/rg/{disk}", "--disk", "system", "--group", "web01"]
        arguments += ["--to", target.address, "--state", str(state), "--json"]
        arguments += ["--give-up-after", "0", "--token-file", "-"]
        call = partial(run, "send", *arguments, stdin=target.token, environment=environment)
        return await asyncio.to_thread(call)

    @property
    def environment(self) -> dict[str, str]:
        """What a machine in Azure knows of its identity, and where the fake is."""
        return {
            "AZURE_RESOURCE_MANAGER_ENDPOINT": self.arm.endpoint,
            "AZURE_TOKEN_CREDENTIALS": "ManagedIdentityCredential",
            "IDENTITY_ENDPOINT": self.arm.identity_endpoint,
            "IDENTITY_HEADER": IDENTITY_HEADER,
            "SSL_CERT_FILE": str(self.arm.ca),
        }


ONE_LEFT = {"snapshots": 1, "collections": 0, "points": 0, "open": 0}


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with receiving(tmp_path / "target") as target:
        yield target


@pytest.fixture
async def cloud(
    proxy: RunningProxy, service: BlobServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Cloud]:
    container = f"managed-{secrets.token_hex(6)}"
    service.create_container(container)
    arm = FakeArm(tmp_path, AzuriteExports(proxy.url, service, container))
    await arm.start()
    cloud = Cloud(arm, service, container)
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    # A process reads SSL_CERT_FILE as it imports the SDK; this one has done so.
    monkeypatch.setattr("agents.azure_disks.connect", partial(connect, connection_verify=str(arm.ca)))
    yield cloud
    await arm.stop()
    service.delete_container(container)


@pytest.mark.parametrize("mode", ["diff", "409", "whole"])
async def test_cycles_are_identical_and_leave_one_snapshot_that_nobody_can_read(
    cloud: Cloud, proxy: RunningProxy, target: Target, tmp_path: Path, seed: int, mode: str
) -> None:
    rng, disk = random.Random(seed), cloud.add("system")
    fill(disk, rng)
    proxy.set(mode)
    for cycle in range(4):
        done = await cloud.send(target, tmp_path / "state", "system")
        assert done.mode == ("incremental" if cycle else "full"), cycle
        assert (done.consistency, done.passes) == ("crash", 1)
        assert identical(disk, target.directory / "system.vmdk", tmp_path), cycle
        assert cloud.arm.census() == ONE_LEFT
        if mode == "diff" and cycle:
            assert done.read_bytes < SIZE / 2, done
        scribble(disk, rng)


async def test_a_diff_that_comes_in_many_lists_is_taken_whole(
    cloud: Cloud, proxy: RunningProxy, target: Target, tmp_path: Path, seed: int
) -> None:
    rng, disk = random.Random(seed), cloud.add("system")
    fill(disk, rng)
    await cloud.send(target, tmp_path / "state", "system")
    for _ in range(2):
        scribble(disk, rng)
        proxy.set("page=40")
        done = await cloud.send(target, tmp_path / "state", "system")
        assert done.mode == "incremental"
        assert proxy.asked()["diff"] > 2
        assert identical(disk, target.directory / "system.vmdk", tmp_path)


async def test_disks_of_a_machine_are_a_group_with_a_skew(
    cloud: Cloud, target: Target, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    disks = {name: cloud.add(name) for name in ("system", "data")}
    for disk in disks.values():
        fill(disk, rng)
    for _ in range(2):
        done = await cloud.send(target, tmp_path / "state", *disks)
        assert done.consistency == "per-disk"
        for name, disk in disks.items():
            assert identical(disk, target.directory / f"{name}.vmdk", tmp_path)
            scribble(disk, rng)
        assert cloud.arm.census() == {**ONE_LEFT, "snapshots": 2}


KILLS = ("snapshot.before_take", "snapshot.taken", "epoch.published", "snapshot.before_delete")


@pytest.mark.parametrize("failpoint", KILLS)
async def test_after_a_kill_the_next_run_ends_it_and_nothing_is_left_behind(
    cloud: Cloud, target: Target, tmp_path: Path, seed: int, failpoint: str
) -> None:
    rng, disk = random.Random(seed), cloud.add("system")
    fill(disk, rng)
    await cloud.send(target, tmp_path / "state", "system")
    scribble(disk, rng)
    killed = await cloud.command(target, tmp_path / "state", "system", failpoint)
    assert killed.status == -signal.SIGKILL, killed
    done = await cloud.send(target, tmp_path / "state", "system")
    assert done.recovery_point is not None
    assert identical(disk, target.directory / "system.vmdk", tmp_path)
    assert cloud.arm.census() == ONE_LEFT


async def test_snapshots_of_others_stay(cloud: Cloud, target: Target, tmp_path: Path, seed: int) -> None:
    disk = cloud.add("system")
    fill(disk, random.Random(seed))
    await cloud.send(target, tmp_path / "state", "system")
    held = next(iter(cloud.arm.snapshots.values()))
    content = await cloud.arm.exports.capture("system")
    cloud.arm.snapshots["by-hand"] = Held({**held.body, "name": "by-hand", "tags": {}}, content)
    for _ in range(2):
        await cloud.send(target, tmp_path / "state", "system")
    assert "by-hand" in cloud.arm.snapshots
    assert cloud.arm.census()["snapshots"] == 2


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("GET", "/disks/", status=403, code="AuthorizationFailed"), "compute.denied"),
        (Fault("PUT", "/snapshots/", operation=True, code="SnapshotFailed"), "compute.refused"),
        (Fault("POST", "beginGetAccess", operation=True, code="ExportFailed"), "compute.refused"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.part,
)
async def test_what_azure_refuses_is_told_and_leaves_nothing_open(
    cloud: Cloud, target: Target, tmp_path: Path, fault: Fault, code: str
) -> None:
    cloud.add("system")
    cloud.arm.faults = [fault]
    with refused(code):
        await cloud.send(target, tmp_path / "state", "system")
    assert cloud.arm.census()["open"] == 0
    assert os.listdir(target.directory) in ([], [".replicator"])
    cloud.arm.faults = []
    await cloud.send(target, tmp_path / "state", "system")
    assert cloud.arm.census() == ONE_LEFT


async def test_the_command_finds_its_identity_and_refuses_what_is_no_address(
    cloud: Cloud, target: Target, tmp_path: Path, seed: int
) -> None:
    disk = cloud.add("system")
    fill(disk, random.Random(seed))
    done = await cloud.command(target, tmp_path / "state", "a/b")
    assert (done.error["code"], done.status) == ("compute.address", 2)
    assert cloud.arm.requests == []
    done = await cloud.command(target, tmp_path / "state", "system")
    assert done.ok["mode"] == "full"
    assert SECRET not in done.stdout + done.stderr
    assert "sig=" not in done.stdout + done.stderr
    assert identical(disk, target.directory / "system.vmdk", tmp_path)
