"""Managed disks and their snapshots, through the real SDK over HTTPS against a fake of Azure's management."""

import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from replicator.azure.arm import RETRIES, ResourceRef, parse_disk_address
from replicator.azure.compute import Disks, ImportedBlob, ManagedDisk, snapshot_name
from replicator.azure.exports import GRANT_S, Renewed, Tag
from replicator.azure.limits import INCREMENTAL
from replicator.clock import Clock
from replicator.errors import LinkError, Remedy, UsageError
from tests.azure.arm_client import MIB, client_of, disk_ref, tag
from tests.azure.fake_arm import SECRET, SUBSCRIPTION, FakeArm, Fault
from tests.replicator.trust import SetClock, refused


@pytest.fixture
async def arm(tmp_path: Path) -> AsyncIterator[FakeArm]:
    arm = FakeArm(tmp_path)
    await arm.start()
    arm.add_disk("system", 64 * MIB, vm="web01")
    yield arm
    await arm.stop()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
async def disks(arm: FakeArm, told: list[str]) -> AsyncIterator[Disks]:
    async with client_of(arm) as client:
        yield Disks(client, Clock(), told.append, poll_s=0.01)


@pytest.fixture
async def disk(disks: Disks) -> ManagedDisk:
    return await disks.disk(disk_ref("system"))


def age(arm: FakeArm, name: str, by: timedelta) -> None:
    """A snapshot was taken earlier than it was."""
    properties = arm.snapshots[name].body["properties"]
    taken = datetime.fromisoformat(properties["timeCreated"]) - by
    properties["timeCreated"] = taken.isoformat()


# ------------------------------------------------------------------ names


def test_an_address_names_subscription_group_and_disk() -> None:
    found = parse_disk_address(f"azure-disk://{SUBSCRIPTION}/rg/system")
    assert found == disk_ref("system")
    assert ResourceRef.of_id(found.id) == found
    assert ResourceRef.of_id(found.id.replace("/resourceGroups/", "/RESOURCEGROUPS/")) == found


@pytest.mark.parametrize(
    "rest", ["", "sub", "sub/rg", "sub/rg/", "sub//disk", "s/g/d/e", "s/g/d?x", "s/g/d e"]
)
def test_an_address_with_a_part_too_few_or_too_many_is_refused(rest: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_disk_address(f"azure-disk://{rest}")
    assert caught.value.code == "compute.address"


def test_an_id_of_something_else_is_no_compute_resource() -> None:
    for bad in ("", "/subscriptions/s/resourceGroups/g", disk_ref("d").id.replace("Compute", "Network")):
        with pytest.raises(ValueError, match="is no id"):
            ResourceRef.of_id(bad)


def test_names_of_snapshots_fit_and_differ_by_disk_group_installation_and_epoch() -> None:
    disk = ManagedDisk(disk_ref("system"), "unique", 1 << 20, "westeurope", "Premium_LRS", "")
    other = ManagedDisk(disk_ref("system"), "another", 1 << 20, "westeurope", "Premium_LRS", "")
    tags = [tag(1), tag(2), tag(1, group="db01"), tag(1, installation="installation-2")]
    names = {snapshot_name(disk, one) for one in tags} | {snapshot_name(other, tag(1))}
    assert len(names) == 5
    assert all(
        len(name) <= 80 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names
    )


# ------------------------------------------------------------------ taking


async def test_a_snapshot_is_incremental_tagged_and_dated_by_azure(
    arm: FakeArm, disks: Disks, disk: ManagedDisk
) -> None:
    snapshot = await disks.take(disk, tag(1))
    body = arm.snapshots[snapshot.ref.name].body
    assert body["properties"]["incremental"] is True
    assert Tag.of(body["tags"]) == tag(1) == snapshot.tag
    assert snapshot.size_bytes == disk.size_bytes == 64 * MIB
    taken = datetime.fromtimestamp(snapshot.taken_ns / 1e9, UTC)
    assert abs(taken - datetime.fromisoformat(body["properties"]["timeCreated"])) < timedelta(milliseconds=1)
    assert await disks.ours(disk, "web01", "installation-1") == [snapshot]


async def test_the_same_epoch_again_is_the_snapshot_that_is_there(
    arm: FakeArm, disks: Disks, disk: ManagedDisk
) -> None:
    first = await disks.take(disk, tag(1))
    assert await disks.take(disk, tag(1)) == first
    assert await disks.take(disk, tag(2)) != first
    assert arm.census()["snapshots"] == 2
    assert arm.count("PUT", "/snapshots/") == 2


async def test_a_snapshot_is_used_only_once_azure_has_copied_it(
    arm: FakeArm, disks: Disks, disk: ManagedDisk, told: list[str]
) -> None:
    arm.copy_step = 30.0
    snapshot = await disks.take(disk, tag(1))
    assert arm.snapshots[snapshot.ref.name].copied == 100.0
    assert [line.rsplit(" copied ")[-1] for line in told] == ["60 %", "90 %"]
    assert (await disks.grant(snapshot)).url


async def test_a_snapshot_is_open_to_no_more_than_its_disk(arm: FakeArm, disks: Disks) -> None:
    access = "/subscriptions/s/resourceGroups/rg/providers/Microsoft.Compute/diskAccesses/private"
    arm.add_disk("private", 64 * MIB, networkAccessPolicy="AllowPrivate", diskAccessId=access)
    snapshot = await disks.take(await disks.disk(disk_ref("private")), tag(1))
    made = arm.snapshots[snapshot.ref.name].body["properties"]
    assert (made["networkAccessPolicy"], made["diskAccessId"]) == ("AllowPrivate", access)
    arm.add_disk("closed", 64 * MIB, networkAccessPolicy="DenyAll")
    with refused("compute.export_denied"):
        await disks.take(await disks.disk(disk_ref("closed")), tag(1))
    assert arm.census()["snapshots"] == 1


@pytest.mark.parametrize("status", [0, 500, 503])
async def test_an_answer_that_is_lost_leaves_one_snapshot(
    arm: FakeArm, disks: Disks, disk: ManagedDisk, status: int
) -> None:
    arm.faults = [Fault("PUT", "/snapshots/", status=status, after=True)]
    snapshot = await disks.take(disk, tag(1))
    assert arm.census()["snapshots"] == 1
    assert snapshot.tag == tag(1)


async def test_an_operation_that_fails_half_way_is_told_and_the_next_call_finishes(
    arm: FakeArm, disks: Disks, disk: ManagedDisk
) -> None:
    arm.faults = [Fault("PUT", "/snapshots/", operation=True, code="SnapshotQuotaExceeded")]
    with refused("compute.refused") as caught:
        await disks.take(disk, tag(1))
    assert "SnapshotQuotaExceeded" in caught.value.message
    assert arm.census()["snapshots"] == 0
    assert (await disks.take(disk, tag(1))).tag == tag(1)


async def test_a_copy_that_fails_is_told(arm: FakeArm, disks: Disks, disk: ManagedDisk) -> None:
    snapshot = await disks.take(disk, tag(1))
    arm.snapshots[snapshot.ref.name].body["properties"]["copyCompletionError"] = {
        "errorCode": "CopySourceNotFound",
        "errorMessage": "the source went away",
    }
    with refused("compute.refused") as caught:
        await disks.take(disk, tag(1))
    assert "the source went away" in caught.value.message


async def test_a_name_that_somebody_else_has_taken_is_not_ours(
    arm: FakeArm, disks: Disks, disk: ManagedDisk
) -> None:
    snapshot = await disks.take(disk, tag(1))
    del arm.snapshots[snapshot.ref.name].body["tags"]["replicator-epoch"]
    with refused("compute.refused"):
        await disks.take(disk, tag(1))


# ------------------------------------------------------------------ whose


async def test_only_our_own_snapshots_of_this_very_disk_are_ours(
    arm: FakeArm, disks: Disks, disk: ManagedDisk
) -> None:
    arm.add_disk("data", 64 * MIB)
    data = await disks.disk(disk_ref("data"))
    ours = [await disks.take(disk, tag(epoch)) for epoch in (3, 1, 2)]
    await disks.take(data, tag(1))
    await disks.take(disk, tag(1, group="db01"))
    await disks.take(disk, tag(1, installation="installation-2"))
    by_hand = await disks.take(disk, tag(4))
    arm.snapshots[by_hand.ref.name].body["tags"] = {"owner": "the night shift"}
    assert await disks.ours(disk, "web01", "installation-1") == ours
    arm.disks["system"]["properties"]["uniqueId"] = "made-anew"
    assert await disks.ours(await disks.disk(disk_ref("system")), "web01", "installation-1") == []


# ------------------------------------------------------------------ limits


async def test_the_eighth_snapshot_in_five_minutes_waits_for_the_first_to_be_old_enough(
    arm: FakeArm, disks: Disks, disk: ManagedDisk, told: list[str]
) -> None:
    first, *_ = [await disks.take(disk, tag(epoch)) for epoch in range(7)]
    taken = datetime.fromtimestamp(first.taken_ns / 1e9, UTC)
    age(arm, first.ref.name, timedelta(seconds=299.5) - (datetime.now(UTC) - taken))
    snapshot = await disks.take(disk, tag(7))
    assert arm.census()["snapshots"] == 8
    assert snapshot.tag == tag(7)
    assert [line for line in told if "waits" in line]


async def test_where_azure_keeps_no_more_nothing_is_asked(
    arm: FakeArm, disks: Disks, disk: ManagedDisk
) -> None:
    name = (await disks.take(disk, tag(0))).ref.name
    age(arm, name, timedelta(days=1))
    for number in range(1, INCREMENTAL.held):
        arm.snapshots[f"other-{number}"] = arm.snapshots[name]
    with refused("compute.limit") as caught:
        await disks.take(disk, tag(1))
    assert "500" in caught.value.message
    assert arm.count("PUT", "/snapshots/") == 1


async def test_a_sixth_snapshot_of_a_disk_is_not_opened_while_five_are(
    arm: FakeArm, disks: Disks, disk: ManagedDisk
) -> None:
    snapshots = [await disks.take(disk, tag(epoch)) for epoch in range(6)]
    for snapshot in snapshots[:5]:
        await disks.grant(snapshot)
    with refused("compute.open_limit") as caught:
        await disks.grant(snapshots[5])
    assert caught.value.remedy is Remedy.RETRY
    await disks.grant(snapshots[4])  # one that is open stays so
    await disks.revoke(snapshots[0])
    await disks.grant(snapshots[5])
    assert arm.census()["open"] == 5


# ------------------------------------------------------------------ access


async def test_an_access_ends_when_azure_says_and_is_no_secret_in_print(
    disks: Disks, disk: ManagedDisk
) -> None:
    grant = await disks.grant(await disks.take(disk, tag(1)))
    assert SECRET in grant.url
    assert grant.ends is not None
    left = grant.ends - datetime.now(UTC)
    assert timedelta(seconds=GRANT_S - 60) < left <= timedelta(seconds=GRANT_S)
    assert SECRET not in repr(grant) + str(grant)


async def test_no_log_line_holds_the_signature(
    arm: FakeArm, disks: Disks, disk: ManagedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        snapshot = await disks.take(disk, tag(1))
        await disks.grant(snapshot)
        arm.faults = [Fault("POST", "beginGetAccess", operation=True, code="Nope")]
        with refused("compute.refused") as caught:
            await disks.grant(snapshot)
    assert caplog.records
    assert not [record for record in caplog.records if SECRET in record.getMessage()]
    assert SECRET not in str(caught.value)


async def test_an_access_is_renewed_before_it_ends(arm: FakeArm, disks: Disks, disk: ManagedDisk) -> None:
    clock = SetClock()
    snapshot = await disks.take(disk, tag(1))
    renewed = Renewed(partial(disks.grant, snapshot), partial(disks.revoke, snapshot), clock)
    first = await renewed.url()
    assert await renewed.url() == first
    clock.advance(timedelta(seconds=GRANT_S - 1900))
    assert await renewed.url() == first
    clock.advance(timedelta(seconds=200))
    second = await renewed.url()
    assert second != first
    assert arm.count("POST", "beginGetAccess") == 2
    await renewed.close()
    await renewed.close()
    assert arm.census()["open"] == 0


# ------------------------------------------------------------------ deleting


async def test_a_snapshot_that_is_open_is_closed_and_deleted_and_again_is_fine(
    arm: FakeArm, disks: Disks, disk: ManagedDisk
) -> None:
    snapshot = await disks.take(disk, tag(1))
    await disks.grant(snapshot)
    await disks.delete(snapshot)
    await disks.delete(snapshot)
    assert set(arm.census().values()) == {0}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "endGetAccess", status=500, times=RETRIES + 1),
        Fault("POST", "endGetAccess", operation=True),
        Fault("DELETE", "/snapshots/", status=503, times=RETRIES + 1),
        Fault("DELETE", "/snapshots/", operation=True),
        Fault("DELETE", "/snapshots/", status=0, after=True, times=RETRIES + 1),
        Fault("GET", "/operations/", status=500, times=RETRIES + 1),
    ],
    ids=lambda fault: f"{fault.method} {fault.part} {fault.status} {fault.operation}",
)
async def test_a_deletion_that_fails_half_way_is_finished_by_the_next_and_leaves_nothing(
    arm: FakeArm, disks: Disks, disk: ManagedDisk, fault: Fault
) -> None:
    snapshot = await disks.take(disk, tag(1))
    await disks.grant(snapshot)
    arm.faults = [fault]
    try:
        await disks.delete(snapshot)
    except LinkError as error:
        assert error.code == "compute.unreachable"
    except Exception as error:
        assert getattr(error, "code", "") == "compute.refused", error
    arm.faults = []
    for left in await disks.ours(disk, "web01", "installation-1"):
        await disks.delete(left)
    assert set(arm.census().values()) == {0}


# ------------------------------------------------------------------ the way back


BLOB = ImportedBlob(
    "https://account.blob.core.windows.net/disks/web01.vhd",
    "/subscriptions/s/resourceGroups/rg/providers/Microsoft.Storage/storageAccounts/account",
    "westeurope",
    os_type="Linux",
    generation="V2",
)


async def test_a_blob_becomes_a_new_disk_once(arm: FakeArm, disks: Disks) -> None:
    arm.faults = [Fault("PUT", "/disks/", status=0, after=True)]
    made = await disks.import_blob(disk_ref("home"), BLOB, tag(1))
    assert await disks.import_blob(disk_ref("home"), BLOB, tag(1)) == made
    told = arm.disks["home"]["properties"]
    assert told["creationData"]["sourceUri"] == BLOB.url
    assert (told["osType"], told["hyperVGeneration"], made.sku) == ("Linux", "V2", "Premium_LRS")
    assert arm.count("PUT", "/disks/") == 2  # the lost answer's


async def test_a_disk_that_exists_is_not_written_over(arm: FakeArm, disks: Disks) -> None:
    for other in (tag(1), tag(2)):
        arm.disks["system"]["tags"] = other.as_tags() if other == tag(2) else None
        with refused("compute.exists") as caught:
            await disks.import_blob(disk_ref("system"), BLOB, tag(1))
        assert "system" in caught.value.message
    assert arm.count("PUT", "/disks/") == 0


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("method", "part"), [("GET", "/disks/"), ("PUT", "/snapshots/"), ("POST", "beginGet")]
)
async def test_throttling_is_waited_out_as_azure_says(
    arm: FakeArm, disks: Disks, method: str, part: str
) -> None:
    arm.faults = [
        Fault(method, part, status=429, retry_after="1", code="TooManyRequests"),
        Fault(method, part, status=429, code="TooManyRequests", times=RETRIES - 1),
    ]
    began = Clock().monotonic_s()
    snapshot = await disks.take(await disks.disk(disk_ref("system")), tag(1))
    await disks.grant(snapshot)
    assert Clock().monotonic_s() - began >= 1
    assert [fault.times for fault in arm.faults] == [0, 0]
    assert arm.census() == {"snapshots": 1, "collections": 0, "points": 0, "open": 1}


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("GET", "/disks/", status=401, code="ExpiredToken"), "compute.denied"),
        (Fault("GET", "/disks/", status=403, code="AuthorizationFailed"), "compute.denied"),
        (Fault("GET", "/disks/", status=404, code="ResourceNotFound"), "compute.missing"),
        (Fault("GET", "/disks/", status=409, code="Conflict"), "compute.conflict"),
        (Fault("GET", "/disks/", status=400, code="InvalidParameter"), "compute.refused"),
        (Fault("GET", "/disks/", status=429, code="TooMany", times=99), "compute.throttled"),
        (Fault("GET", "/disks/", status=500, code="InternalError", times=99), "compute.unreachable"),
        (Fault("GET", "/disks/", status=0, times=99), "compute.unreachable"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.status),
)
async def test_what_azure_answers_is_told_by_name_with_its_own_words(
    arm: FakeArm, disks: Disks, fault: Fault, code: str
) -> None:
    arm.faults = [fault]
    with refused(code) as caught:
        await disks.disk(disk_ref("system"))
    assert "disk system" in caught.value.message
    assert not fault.status or fault.code in caught.value.message
    wants_patience = code in ("compute.throttled", "compute.unreachable")
    assert (caught.value.remedy is Remedy.RETRY) is wants_patience


async def test_an_identity_that_is_not_let_in_and_an_endpoint_that_is_not_there_are_told(
    arm: FakeArm,
) -> None:
    async with client_of(arm, token="of somebody else") as client:
        with refused("compute.denied"):
            await Disks(client, Clock(), print).disk(disk_ref("system"))
    async with client_of(arm, endpoint="https://127.0.0.1:1") as client:
        with refused("compute.unreachable"):
            await Disks(client, Clock(), print).disk(disk_ref("system"))


async def test_a_disk_that_is_not_there_is_missing(disks: Disks) -> None:
    with refused("compute.missing") as caught:
        await disks.disk(disk_ref("nothing"))
    assert "nothing" in caught.value.message
