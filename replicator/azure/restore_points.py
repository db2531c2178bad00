"""Restore points of a VM: snapshots of all its disks at one instant.

What single snapshots cannot promise (``per-disk``) a restore point does: ``crash`` (as after a power cut) or
``application`` (the guest had flushed). In return it is coarse: an hour apart at best, three for
``application``, and not for VMs with Ultra or Premium SSD v2 disks.

Each call may be repeated: names follow from the group and the epoch. Restore points have no tags; the
collection that holds them does, and is ours alone. Not here: single disks (``compute.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from azure.core.exceptions import ResourceNotFoundError
from azure.mgmt.compute import models
from azure.mgmt.compute.aio import ComputeManagementClient

from protocol.messages import Consistency
from replicator.azure.arm import POLL_S, REPEATABLE, ResourceRef, asking, moment_ns, refused
from replicator.azure.compute import ManagedDisk
from replicator.azure.exports import GRANT_S, Grant, Tag, grant_of, limit_reached, pause
from replicator.azure.limits import APPLICATION_POINT, CRASH_POINT, SnapshotLimits, has_room
from replicator.clock import Clock
from replicator.errors import SourceError

UNSUITABLE_SKUS: Final = frozenset({"UltraSSD_LRS", "PremiumV2_LRS"})

_LIMITS: Final = {Consistency.CRASH: CRASH_POINT, Consistency.APPLICATION: APPLICATION_POINT}
_MODES: Final = {Consistency.CRASH: "CrashConsistent", Consistency.APPLICATION: "ApplicationConsistent"}


@dataclass(frozen=True, slots=True)
class DiskPoint:
    """A disk in a restore point. ``disk_id``: id of the disk's resource, in lower case."""

    name: str
    disk_id: str


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """A restore point that is ours.

    Attributes:
        vm: whose it is.
        collection, name: of the point.
        epoch: for which it was made.
        taken_ns: the one instant of all its disks, since 1970.
        consistency: what it is worth, CRASH or APPLICATION.
        disks: what it holds.
    """

    vm: ResourceRef
    collection: str
    name: str
    epoch: bytes
    taken_ns: int
    consistency: Consistency
    disks: tuple[DiskPoint, ...]


class RestorePoints:
    """The restore points of one subscription's VMs, as far as they are ours.

    Args:
        client: of the subscription; stays the caller's.
        clock: for limits.
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

    async def take(
        self, vm: ResourceRef, disks: Sequence[ManagedDisk], tag: Tag, consistency: Consistency
    ) -> RestorePoint:
        """A restore point of a VM for an epoch; the one that is there if an earlier run took it.

        Args:
            vm: whose disks these are.
            disks: that are to be read; the VM's others are left out.
            tag: of the epoch.
            consistency: CRASH or APPLICATION.

        Raises:
            SourceError: ``compute.no_restore_point``, ``compute.limit``. Others as ``arm.asking``.
        """
        what = f"taking a restore point of VM {vm.name}"
        for disk in disks:
            if disk.sku in UNSUITABLE_SKUS:
                raise _unsuitable(what, disk)
        collection, name = collection_name(vm, tag), point_name(tag)
        if await self._get(vm.group, collection, name) is None:
            await self._collection(vm, collection, tag)
            limits = _LIMITS[consistency]
            await self._keep_to_limits(vm.group, collection, limits, what)
            wanted = models.RestorePoint(
                properties=models.RestorePointProperties(
                    consistency_mode=_MODES[consistency], exclude_disks=await self._others(vm, disks)
                )
            )
            with asking(what):
                poller = await self._client.restore_points.begin_create(
                    vm.group, collection, name, wanted, **REPEATABLE
                )
                await poller.result()
        return await self._ready(vm, collection, name, what)

    async def ours(self, vm: ResourceRef, tag: Tag) -> list[RestorePoint]:
        """Our restore points of a VM, oldest first. ``tag``: of any epoch. Raises as ``arm.asking``."""
        collection = collection_name(vm, tag)
        found = []
        for name in await self._names(vm.group, collection):
            point = await self._get(vm.group, collection, name)
            if point is not None and (epoch := _epoch_of(name)) is not None:
                found.append(await self._described(vm, collection, name, epoch, point))
        return sorted(found, key=lambda point: point.taken_ns)

    async def grant(self, point: RestorePoint, disk: DiskPoint, duration_s: int = GRANT_S) -> Grant:
        """Access to what a disk held at the point. Raises as ``arm.asking``."""
        what = f"opening restore point {point.name} of disk {disk.disk_id.rsplit('/', 1)[-1]}"
        wanted = models.GrantAccessData(access="Read", duration_in_seconds=duration_s)
        with asking(what):
            poller = await self._client.disk_restore_point.begin_grant_access(
                point.vm.group, point.collection, point.name, disk.name, wanted, **REPEATABLE
            )
            return grant_of(what, await poller.result())

    async def revoke(self, point: RestorePoint, disk: DiskPoint) -> None:
        """End every access to a disk of a point. Raises as ``arm.asking``."""
        with asking(f"closing restore point {point.name}"):
            await self._revoke(point, disk)

    async def delete(self, point: RestorePoint) -> None:
        """Delete a point, access to it first, and with the last one its collection. It may be gone already.

        Raises:
            As ``arm.asking``.
        """
        group, collection = point.vm.group, point.collection
        with asking(f"deleting restore point {point.name} of VM {point.vm.name}"):
            for disk in point.disks:
                with suppress(ResourceNotFoundError):
                    await self._revoke(point, disk)
            with suppress(ResourceNotFoundError):
                deleting = await self._client.restore_points.begin_delete(group, collection, point.name)
                await deleting.result()
            if not await self._names(group, collection):
                emptying = await self._client.restore_point_collections.begin_delete(group, collection)
                await emptying.result()

    # ------------------------------------------------------------------ parts

    async def _revoke(self, point: RestorePoint, disk: DiskPoint) -> None:
        poller = await self._client.disk_restore_point.begin_revoke_access(
            point.vm.group, point.collection, point.name, disk.name, **REPEATABLE
        )
        await poller.result()

    async def _collection(self, vm: ResourceRef, collection: str, tag: Tag) -> None:
        with asking(f"making the restore point collection of VM {vm.name}"):
            machine = await self._client.virtual_machines.get(vm.group, vm.name)
            wanted = models.RestorePointCollection(
                location=machine.location,
                tags=tag.as_tags(),
                properties=models.RestorePointCollectionProperties(
                    source=models.RestorePointCollectionSourceProperties(id=vm.id)
                ),
            )
            await self._client.restore_point_collections.create_or_update(vm.group, collection, wanted)

    async def _others(self, vm: ResourceRef, disks: Sequence[ManagedDisk]) -> list[models.ApiEntityReference]:
        """The VM's disks that are not asked for."""
        with asking(f"looking at VM {vm.name}"):
            machine = await self._client.virtual_machines.get(vm.group, vm.name)
        told = machine.properties
        storage = told.storage_profile if told is not None else None
        if storage is None:
            return []
        parts = [storage.os_disk, *(storage.data_disks or [])]
        held = [part.managed_disk.id for part in parts if part is not None and part.managed_disk is not None]
        wanted = {disk.ref.id.lower() for disk in disks}
        return [models.ApiEntityReference(id=one) for one in held if one and one.lower() not in wanted]

    async def _names(self, group: str, collection: str) -> list[str]:
        """Names of the points in a collection, which may not be there."""
        with asking(f"looking at restore point collection {collection}"):
            try:
                found = await self._client.restore_point_collections.get(
                    group, collection, expand="restorePoints"
                )
            except ResourceNotFoundError:
                return []
        points = (found.properties.restore_points if found.properties is not None else None) or []
        return [point.name for point in points if point.name]

    async def _get(self, group: str, collection: str, name: str) -> models.RestorePoint | None:
        with asking(f"looking at restore point {name}"):
            try:
                return await self._client.restore_points.get(group, collection, name)
            except ResourceNotFoundError:
                return None

    async def _keep_to_limits(self, group: str, collection: str, limits: SnapshotLimits, what: str) -> None:
        names = await self._names(group, collection)
        if not has_room(limits, len(names)):
            raise limit_reached(what, limits, len(names))
        taken = []
        for name in names:
            point = await self._get(group, collection, name)
            if point is not None and point.properties is not None:
                taken.append(moment_ns(point.properties.time_created, what))
        await pause(limits, taken, self._clock, self._tell, what)

    async def _ready(self, vm: ResourceRef, collection: str, name: str, what: str) -> RestorePoint:
        """The point once Azure has copied all its disks in the background."""
        while True:
            point = await self._get(vm.group, collection, name)
            if point is None or point.properties is None or point.properties.provisioning_state == "Failed":
                raise refused(what, "it is gone, or its state is Failed")
            slowest = 100.0
            with asking(what):
                async for disk in self._client.disk_restore_point.list_by_restore_point(
                    vm.group, collection, name
                ):
                    done = disk.properties.completion_percent if disk.properties is not None else None
                    slowest = min(slowest, 100.0 if done is None else done)
            epoch = _epoch_of(name)
            if slowest >= 100 and epoch is not None:
                return await self._described(vm, collection, name, epoch, point)
            self._tell(f"{what}: Azure has copied {slowest:.0f} %")
            await asyncio.sleep(self._poll_s)

    async def _described(
        self, vm: ResourceRef, collection: str, name: str, epoch: bytes, point: models.RestorePoint
    ) -> RestorePoint:
        what = f"looking at restore point {name}"
        told = point.properties
        disks = []
        with asking(what):
            async for disk in self._client.disk_restore_point.list_by_restore_point(
                vm.group, collection, name
            ):
                source = disk.properties.source_resource_id if disk.properties is not None else None
                if disk.name and source:
                    disks.append(DiskPoint(disk.name, source.lower()))
        mode = told.consistency_mode if told is not None else None
        # File-system consistency is what Linux guests without scripts give: less than was asked for.
        is_application = mode == models.ConsistencyModeTypes.APPLICATION_CONSISTENT
        return RestorePoint(
            vm,
            collection,
            name,
            epoch,
            moment_ns(told.time_created if told is not None else None, what),
            Consistency.APPLICATION if is_application else Consistency.CRASH,
            tuple(disks),
        )


def collection_name(vm: ResourceRef, tag: Tag) -> str:
    """The one name of a group's collection for a VM."""
    of = sha256(f"{vm.id.lower()}\0{tag.installation}\0{tag.group}".encode()).hexdigest()[:16]
    return f"replicator-{of}"


def point_name(tag: Tag) -> str:
    """The one name of an epoch's restore point."""
    return f"epoch-{tag.epoch.hex()}"


def _epoch_of(name: str) -> bytes | None:
    """The epoch of a point of this name; None: somebody else has put it there."""
    try:
        return bytes.fromhex(name.removeprefix("epoch-")) if name.startswith("epoch-") else None
    except ValueError:
        return None


def _unsuitable(what: str, disk: ManagedDisk) -> SourceError:
    return SourceError(
        "compute.no_restore_point",
        f"{what} is not possible: disk {disk.ref.name} is of kind {disk.sku}",
        cause="Azure takes no crash-consistent restore points of Ultra and Premium SSD v2 disks",
        fix="replicate these disks by single snapshots, or freeze the machine first",
    )
