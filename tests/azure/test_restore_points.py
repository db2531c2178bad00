"""Restore points of VMs, and VMs that are stopped and started, against a fake of Azure's management."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from azure.mgmt.compute.aio import ComputeManagementClient

from protocol.messages import Consistency
from replicator.azure.arm import RETRIES
from replicator.azure.compute import Disks, ManagedDisk
from replicator.azure.machine import power_state, start, stop
from replicator.azure.restore_points import RestorePoints
from replicator.clock import Clock
from replicator.errors import ReplicatorError
from replicator.sender import DiskToSend, consistency_of
from tests.azure.arm_client import MIB, client_of, disk_ref, tag, vm_ref
from tests.azure.fake_arm import SECRET, FakeArm, Fault, Point
from tests.replicator.trust import refused

VM = vm_ref("web01")
CRASH, APPLICATION = Consistency.CRASH, Consistency.APPLICATION


@pytest.fixture
async def arm(tmp_path: Path) -> AsyncIterator[FakeArm]:
    arm = FakeArm(tmp_path)
    await arm.start()
    for name in ("system", "data", "scratch"):
        arm.add_disk(name, 64 * MIB, vm="web01")
    yield arm
    await arm.stop()


@pytest.fixture
async def client(arm: FakeArm) -> AsyncIterator[ComputeManagementClient]:
    async with client_of(arm) as client:
        yield client


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def points(client: ComputeManagementClient, told: list[str]) -> RestorePoints:
    return RestorePoints(client, Clock(), told.append, poll_s=0.01)


@pytest.fixture
async def disks(client: ComputeManagementClient) -> list[ManagedDisk]:
    known = Disks(client, Clock(), print)
    return [await known.disk(disk_ref(name)) for name in ("system", "data")]


# ------------------------------------------------------------------ restore points


@pytest.mark.parametrize("consistency", [CRASH, APPLICATION])
async def test_a_point_holds_the_disks_asked_for_at_one_instant(
    points: RestorePoints, disks: list[ManagedDisk], consistency: Consistency
) -> None:
    point = await points.take(VM, disks, tag(1), consistency)
    assert point.consistency is consistency
    assert {disk.disk_id for disk in point.disks} == {disk.ref.id.lower() for disk in disks}
    source: object = None
    sent = [DiskToSend(disk.name, source, point.taken_ns) for disk in point.disks]  # type: ignore[arg-type]
    assert consistency_of(sent) is CRASH  # no skew: single snapshots of two disks would be PER_DISK
    assert await points.ours(VM, tag(99)) == [point]


async def test_what_the_guest_did_not_flush_as_an_application_is_no_more_than_crash(
    arm: FakeArm, points: RestorePoints, disks: list[ManagedDisk]
) -> None:
    await points.take(VM, disks, tag(1), APPLICATION)
    collection, *_ = arm.collections.values()
    for held in collection.points.values():
        held.body["properties"]["consistencyMode"] = "FileSystemConsistent"
    assert [point.consistency for point in await points.ours(VM, tag(1))] == [CRASH]


async def test_the_same_epoch_again_is_the_point_that_is_there(
    arm: FakeArm, points: RestorePoints, disks: list[ManagedDisk]
) -> None:
    first = await points.take(VM, disks, tag(1), CRASH)
    assert await points.take(VM, disks, tag(1), CRASH) == first
    assert arm.count("PUT", "/restorePoints/") == 1


async def test_an_answer_that_is_lost_leaves_one_point(
    arm: FakeArm, points: RestorePoints, disks: list[ManagedDisk]
) -> None:
    arm.faults = [Fault("PUT", "/restorePoints/", status=0, after=True)]
    await points.take(VM, disks, tag(1), CRASH)
    assert arm.census() == {"snapshots": 0, "collections": 1, "points": 1, "open": 0}


async def test_a_point_is_used_only_once_all_its_disks_are_copied(
    arm: FakeArm, points: RestorePoints, disks: list[ManagedDisk], told: list[str]
) -> None:
    arm.copy_step = 40.0
    point = await points.take(VM, disks, tag(1), CRASH)
    assert [line.rsplit(" copied ")[-1] for line in told] == ["40 %", "80 %"]
    assert SECRET in (await points.grant(point, point.disks[0])).url


@pytest.mark.parametrize("sku", ["UltraSSD_LRS", "PremiumV2_LRS"])
async def test_of_disks_that_have_none_no_point_is_asked_for(
    arm: FakeArm, client: ComputeManagementClient, points: RestorePoints, sku: str
) -> None:
    arm.add_disk("fast", 64 * MIB, vm="web01", sku=sku)
    fast = await Disks(client, Clock(), print).disk(disk_ref("fast"))
    with refused("compute.no_restore_point") as caught:
        await points.take(VM, [fast], tag(1), CRASH)
    assert sku in caught.value.message
    assert arm.count("PUT", "/") == 0


@pytest.mark.parametrize(("consistency", "hours"), [(CRASH, 1), (APPLICATION, 3)])
async def test_the_next_point_waits_for_azures_hours(
    arm: FakeArm,
    points: RestorePoints,
    disks: list[ManagedDisk],
    told: list[str],
    consistency: Consistency,
    hours: int,
) -> None:
    first = await points.take(VM, disks, tag(1), consistency)
    body = arm.collections[first.collection].points[first.name].body["properties"]
    taken = datetime.fromisoformat(body["timeCreated"])
    almost = timedelta(hours=hours) - timedelta(seconds=0.5)
    body["timeCreated"] = (datetime.now(taken.tzinfo) - almost).isoformat()
    await points.take(VM, disks, tag(2), consistency)
    assert [f"in {hours * 3600} s" in line for line in told] == [True]
    assert arm.census()["points"] == 2


async def test_deleting_closes_first_and_leaves_nothing_and_again_is_fine(
    arm: FakeArm, points: RestorePoints, disks: list[ManagedDisk]
) -> None:
    point = await points.take(VM, disks, tag(1), CRASH)
    for disk in point.disks:
        await points.grant(point, disk)
    assert arm.census() == {"snapshots": 0, "collections": 1, "points": 1, "open": 2}
    await points.delete(point)
    await points.delete(point)
    assert set(arm.census().values()) == {0}
    assert await points.ours(VM, tag(1)) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "endGetAccess", operation=True),
        Fault("DELETE", "/restorePoints/", status=503, times=RETRIES + 1),
        Fault("DELETE", "/restorePoints/", status=0, after=True, times=RETRIES + 1),
        Fault("DELETE", "/restorePoints/", operation=True),
        Fault("DELETE", "/restorePointCollections/", status=409),
    ],
    ids=lambda fault: f"{fault.method} {fault.part} {fault.status} {fault.operation}",
)
async def test_a_deletion_that_fails_half_way_is_finished_by_the_next(
    arm: FakeArm, points: RestorePoints, disks: list[ManagedDisk], fault: Fault
) -> None:
    point = await points.take(VM, disks, tag(1), CRASH)
    await points.grant(point, point.disks[0])
    arm.faults = [fault]
    try:
        await points.delete(point)
    except ReplicatorError as error:
        assert error.code in ("compute.refused", "compute.unreachable", "compute.conflict")
    arm.faults = []
    await points.delete(point)
    assert set(arm.census().values()) == {0}


async def test_points_of_others_in_the_collection_stay_and_keep_it(
    arm: FakeArm, points: RestorePoints, disks: list[ManagedDisk]
) -> None:
    point = await points.take(VM, disks, tag(1), CRASH)
    held = arm.collections[point.collection].points
    held["by-hand"] = Point({**held[point.name].body, "name": "by-hand"}, {})
    await points.delete(point)
    assert list(held) == ["by-hand"]
    assert arm.census()["collections"] == 1
    assert await points.ours(VM, tag(1)) == []


# ------------------------------------------------------------------ machines


async def test_a_machine_is_stopped_and_started_and_looked_at_afterwards(
    arm: FakeArm, client: ComputeManagementClient
) -> None:
    assert await power_state(client, VM) == "running"
    await stop(client, VM)
    assert await power_state(client, VM) == arm.vms["web01"]["power"] == "deallocated"
    await stop(client, VM)
    assert arm.count("POST", "deallocate") == 1
    await start(client, VM)
    await start(client, VM)
    assert arm.vms["web01"]["power"] == "running"
    assert arm.count("POST", "start") == 1


async def test_a_machine_that_only_looks_stopped_to_its_guest_is_stopped_for_good(
    arm: FakeArm, client: ComputeManagementClient
) -> None:
    arm.vms["web01"]["power"] = "stopped"
    await stop(client, VM)
    assert arm.vms["web01"]["power"] == "deallocated"


async def test_a_machine_that_does_not_do_as_told_is_not_believed(
    arm: FakeArm, client: ComputeManagementClient
) -> None:
    arm.ignore_power = True
    with refused("compute.not_stopped") as caught:
        await stop(client, VM)
    assert "web01" in caught.value.message
    assert "running" in caught.value.message
    arm.vms["web01"]["power"] = "deallocated"
    with refused("compute.not_started"):
        await start(client, VM)


async def test_throttling_on_the_way_is_waited_out(arm: FakeArm, client: ComputeManagementClient) -> None:
    arm.faults = [
        Fault("POST", "deallocate", status=429, code="TooManyRequests", times=3),
        Fault("GET", "/operations/", status=503, times=2),
        Fault("GET", "instanceView", status=429, times=2),
    ]
    await stop(client, VM)
    assert [fault.times for fault in arm.faults] == [0, 0, 0]
    assert arm.vms["web01"]["power"] == "deallocated"


async def test_a_machine_that_is_not_there_is_missing(client: ComputeManagementClient) -> None:
    with refused("compute.missing"):
        await stop(client, vm_ref("nothing"))
