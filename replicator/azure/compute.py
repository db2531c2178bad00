"""Managed disks: their incremental snapshots, and access to what these hold.

A managed disk cannot be read while it is attached. Its incremental snapshot can: access to it is granted for
a time, as a URL with a signature (SAS) of a read-only page blob that ends in a VHD footer. What differs
between two snapshots of a disk is asked of the newer one's blob with the older one's URL.

Each call may be repeated, whatever became of the one before: a snapshot's name follows from its disk and
epoch.
Not here: restore points of whole VMs (``restore_points.py``), and when a cycle takes and deletes what.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from hashlib import sha256

from azure.core.exceptions import ResourceNotFoundError
from azure.mgmt.compute import models
from azure.mgmt.compute.aio import ComputeManagementClient

from replicator.azure.arm import POLL_S, REPEATABLE, ResourceRef, asking, moment_ns, refused
from replicator.azure.exports import GRANT_S, Grant, Tag, grant_of, limit_reached, pause
from replicator.azure.limits import INCREMENTAL, SAS_PER_FAMILY, has_room
from replicator.clock import Clock
from replicator.errors import LinkError, SourceError, TargetError


@dataclass(frozen=True, slots=True)
class ManagedDisk:
    """A disk as it is now.

    Attributes:
        ref: its name.
        unique_id: tells it from one of the same name that was made later.
        size_bytes, location, sku: as Azure has them.
        vm_id: the machine that it is attached to; empty: none.
        network: who may export it, AllowAll, AllowPrivate or DenyAll.
        access_id: the disk access resource through which AllowPrivate goes.
    """

    ref: ResourceRef
    unique_id: str
    size_bytes: int
    location: str
    sku: str
    vm_id: str
    network: str = "AllowAll"
    access_id: str | None = None


@dataclass(frozen=True, slots=True)
class DiskSnapshot:
    """An incremental snapshot that is ours. ``disk_id``: unique id of its disk; ``taken_ns``: since 1970."""

    ref: ResourceRef
    tag: Tag
    disk_id: str
    size_bytes: int
    taken_ns: int


@dataclass(frozen=True, slots=True)
class ImportedBlob:
    """A page blob that becomes a disk.

    Attributes:
        url: of the blob or its snapshot, without a signature: Azure reads it by the account.
        account_id: ARM's id of the storage account.
        location: region of account and disk.
        sku: kind of the new disk.
        os_type: ``Linux``, ``Windows``; empty: a data disk.
        generation: ``V1`` (BIOS) or ``V2`` (EFI); empty: as Azure finds fit.
    """

    url: str
    account_id: str
    location: str
    sku: str = "Premium_LRS"
    os_type: str = ""
    generation: str = ""


class Disks:
    """The managed disks of one subscription, and our snapshots of them.

    Args:
        client: of the subscription; stays the caller's.
        clock: for limits and the ends of grants.
        tell: takes a line for people, where something is waited for.
        poll_s: seconds between two looks at a copy under way.
    """

    def __init__(
        self,
        client: ComputeManagementClient,
        clock: Clock,
        tell: Callable[[str], None],
        poll_s: float = POLL_S,
    ) -> None:
        self._client = client
        self._clock = clock
        self._tell = tell
        self._poll_s = poll_s

    async def disk(self, ref: ResourceRef) -> ManagedDisk:
        """A disk.

        Raises:
            SourceError: ``compute.missing``. Others as ``arm.asking``.
        """
        what = f"looking at disk {ref.name}"
        with asking(what):
            found = await self._client.disks.get(ref.group, ref.name)
        told = found.properties
        if told is None or told.unique_id is None or told.disk_size_bytes is None:
            raise refused(what, f"the disk is not ready ({told and told.provisioning_state})")
        return ManagedDisk(
            ref,
            told.unique_id,
            told.disk_size_bytes,
            found.location,
            _text(found.sku.name if found.sku is not None else None),
            found.managed_by or "",
            _text(told.network_access_policy) or "AllowAll",
            told.disk_access_id,
        )

    async def ours(self, disk: ManagedDisk, group: str, installation: str) -> list[DiskSnapshot]:
        """Our snapshots of this disk for this group, oldest first. Raises as ``arm.asking``."""
        tags = (group, installation)
        return [
            known
            for known in map(_snapshot, await self._of_disk(disk.ref.group, disk.unique_id))
            if known is not None and (known.tag.group, known.tag.installation) == tags
        ]

    async def take(self, disk: ManagedDisk, tag: Tag) -> DiskSnapshot:
        """A snapshot of a disk for an epoch; the one that is there if an earlier run took it.

        Waits as long as Azure's limits want it, and until the snapshot can be read.

        Raises:
            SourceError: ``compute.limit``, ``compute.export_denied``. Others as ``arm.asking``.
        """
        name = snapshot_name(disk, tag)
        what = f"taking snapshot {name} of disk {disk.ref.name}"
        known = await self._get(disk.ref.group, name)
        if known is None:
            if disk.network == models.NetworkAccessPolicy.DENY_ALL:
                raise _export_denied(disk)
            await self._keep_to_limits(disk, what)
            wanted = models.Snapshot(
                location=disk.location,
                tags=tag.as_tags(),
                sku=models.SnapshotSku(name="Standard_LRS"),  # of premium disks, too
                properties=models.SnapshotProperties(
                    incremental=True,
                    # Not opened to more than its disk is, which is Azure's default.
                    network_access_policy=disk.network,
                    disk_access_id=disk.access_id,
                    creation_data=models.CreationData(create_option="Copy", source_resource_id=disk.ref.id),
                ),
            )
            with asking(what):
                poller = await self._client.snapshots.begin_create_or_update(
                    disk.ref.group, name, wanted, **REPEATABLE
                )
                await poller.result()
        return await self._ready(disk, name, what)

    async def grant(self, snapshot: DiskSnapshot, duration_s: int = GRANT_S) -> Grant:
        """Access to what a snapshot holds; one that is open already is answered with the same URL.

        Raises:
            LinkError: ``compute.open_limit``. Others as ``arm.asking``.
        """
        ref = snapshot.ref
        what = f"opening snapshot {ref.name} for reading"
        family = await self._of_disk(ref.group, snapshot.disk_id)
        others = [other for other in family if _is_open(other) and other.name != ref.name]
        if len(others) >= SAS_PER_FAMILY:
            raise _open_too_many(what)
        wanted = models.GrantAccessData(access="Read", duration_in_seconds=duration_s)
        with asking(what):
            poller = await self._client.snapshots.begin_grant_access(
                ref.group, ref.name, wanted, **REPEATABLE
            )
            return grant_of(what, await poller.result())

    async def revoke(self, snapshot: DiskSnapshot) -> None:
        """End every access to a snapshot; nothing happens where there is none. Raises as ``arm.asking``."""
        ref = snapshot.ref
        with asking(f"closing snapshot {ref.name}"):
            poller = await self._client.snapshots.begin_revoke_access(ref.group, ref.name, **REPEATABLE)
            await poller.result()

    async def delete(self, snapshot: DiskSnapshot) -> None:
        """Delete a snapshot; an access to it ends first, or Azure would refuse. It may be gone already.

        Raises:
            As ``arm.asking``.
        """
        ref = snapshot.ref
        with asking(f"deleting snapshot {ref.name}"):
            try:
                revoking = await self._client.snapshots.begin_revoke_access(ref.group, ref.name, **REPEATABLE)
                await revoking.result()
                deleting = await self._client.snapshots.begin_delete(ref.group, ref.name)
                await deleting.result()
            except ResourceNotFoundError:
                return

    async def import_blob(self, ref: ResourceRef, blob: ImportedBlob, tag: Tag) -> ManagedDisk:
        """A new managed disk of what a page blob holds; the one that is there if an earlier run made it.

        A managed disk that exists cannot be written to: the way back to Azure ends with a new one.

        Raises:
            TargetError: ``compute.exists``. Others as ``arm.asking``.
        """
        what = f"importing disk {ref.name}"
        with asking(what):
            try:
                known = await self._client.disks.get(ref.group, ref.name)
            except ResourceNotFoundError:
                known = None
        if known is not None and Tag.of(known.tags) != tag:
            raise _exists(what)
        if known is None:
            wanted = models.Disk(
                location=blob.location,
                tags=tag.as_tags(),
                sku=models.DiskSku(name=blob.sku),
                properties=models.DiskProperties(
                    os_type=blob.os_type or None,
                    hyper_v_generation=blob.generation or None,
                    creation_data=models.CreationData(
                        create_option="Import", source_uri=blob.url, storage_account_id=blob.account_id
                    ),
                ),
            )
            with asking(what):
                poller = await self._client.disks.begin_create_or_update(
                    ref.group, ref.name, wanted, **REPEATABLE
                )
                await poller.result()
        return await self.disk(ref)

    # ------------------------------------------------------------------ parts

    async def _get(self, group: str, name: str) -> models.Snapshot | None:
        with asking(f"looking at snapshot {name}"):
            try:
                return await self._client.snapshots.get(group, name)
            except ResourceNotFoundError:
                return None

    async def _of_disk(self, group: str, disk_id: str) -> list[models.Snapshot]:
        """All incremental snapshots of a disk in a resource group, whosever, oldest first."""
        found = []
        with asking(f"listing the snapshots of resource group {group}"):
            async for snapshot in self._client.snapshots.list_by_resource_group(group):
                told = snapshot.properties
                if told is not None and told.incremental and _source_of(snapshot) == disk_id:
                    found.append(snapshot)
        return sorted(found, key=_taken)

    async def _keep_to_limits(self, disk: ManagedDisk, what: str) -> None:
        family = await self._of_disk(disk.ref.group, disk.unique_id)
        taken = [moment_ns(_taken(snapshot), what) for snapshot in family]
        if not has_room(INCREMENTAL, len(taken)):
            raise limit_reached(what, INCREMENTAL, len(taken))
        await pause(INCREMENTAL, taken, self._clock, self._tell, what)

    async def _ready(self, disk: ManagedDisk, name: str, what: str) -> DiskSnapshot:
        """The snapshot once Azure has copied it: those of Ultra and Premium v2 disks say how far that is."""
        while True:
            with asking(what):
                found = await self._client.snapshots.get(disk.ref.group, name)
            told = found.properties
            failure = told and told.copy_completion_error
            if failure:
                raise refused(what, f"Azure's copy of it failed: {failure.error_message}")
            if told is not None and told.provisioning_state == "Failed":
                raise refused(what, "its state is Failed")
            done = told.completion_percent if told is not None else None
            if done is None or done >= 100:
                snapshot = _snapshot(found)
                if snapshot is None or snapshot.disk_id != disk.unique_id:
                    raise refused(what, "one of this name is there that is not ours, or of another disk")
                return snapshot
            self._tell(f"{what}: Azure has copied {done:.0f} %")
            await asyncio.sleep(self._poll_s)


def snapshot_name(disk: ManagedDisk, tag: Tag) -> str:
    """The one name of a disk's snapshot for an epoch: 80 characters at most, of those that Azure takes."""
    of = sha256(f"{disk.unique_id}\0{tag.installation}\0{tag.group}".encode()).hexdigest()[:16]
    return f"replicator-{of}-{tag.epoch.hex()}"


def _export_denied(disk: ManagedDisk) -> SourceError:
    return SourceError(
        "compute.export_denied",
        f"disk {disk.ref.name} must not be exported: its network access policy is {disk.network}",
        cause="somebody has closed it, or a policy of the subscription does so",
        fix="allow access by private endpoint: a disk access resource, and AllowPrivate for this disk",
    )


def _exists(what: str) -> TargetError:
    return TargetError(
        "compute.exists",
        f"{what} is not possible: a disk of this name is there",
        cause="it is somebody else's, or of another epoch; Azure writes to no disk that exists",
        fix="give the new disk another name, or delete that one",
    )


def _open_too_many(what: str) -> LinkError:
    """More of a disk's snapshots are open for reading than Azure allows."""
    return LinkError(
        "compute.open_limit",
        f"{what} is put off: {SAS_PER_FAMILY} snapshots of this disk are open for reading",
        cause="others read snapshots of this disk just now, or somebody left them open",
        fix="end an access in the portal (Snapshot export: cancel), or wait for it to end",
    )


def _snapshot(found: models.Snapshot) -> DiskSnapshot | None:
    """What is ours of a snapshot that Azure lists; None if it is somebody else's."""
    tag, told = Tag.of(found.tags), found.properties
    if tag is None or told is None or found.id is None or told.disk_size_bytes is None:
        return None
    source = _source_of(found)
    taken = moment_ns(told.time_created, f"looking at snapshot {found.name}")
    return DiskSnapshot(ResourceRef.of_id(found.id), tag, source, told.disk_size_bytes, taken)


def _text(value: str | Enum | None) -> str:
    """What Azure called it: a word that the SDK knows comes as a member of an enumeration."""
    return str(value.value) if isinstance(value, Enum) else value or ""


def _is_open(snapshot: models.Snapshot) -> bool:
    told = snapshot.properties
    return told is not None and told.disk_state == models.DiskState.ACTIVE_SAS


def _source_of(snapshot: models.Snapshot) -> str:
    """The unique id of its disk."""
    told = snapshot.properties
    return (told.creation_data.source_unique_id or "") if told is not None else ""


def _taken(snapshot: models.Snapshot) -> datetime:
    told = snapshot.properties
    return (told.time_created if told is not None else None) or datetime(1970, 1, 1, tzinfo=UTC)
