"""A page blob as a place that epochs are written to: which one it holds, and its snapshots as recovery
points.

All of it lies in Azure, so that the process that writes may lose everything and still knows what is there.
The blob's metadata names the epoch that was begun last. A snapshot seals it: one request, that is there or is
not, and that names the ETag which the blob had. A blob whose ETag is another one has been written to since.
Not here: what is written (``way_back.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self
from uuid import UUID

from protocol.messages import NO_ID, Consistency, Mode
from replicator.azure.access import Account
from replicator.azure.blob import BlobAddress, InAccount, PageBlob, Snapshot, snapshots
from replicator.errors import TargetError
from replicator.failpoints import reach
from replicator.images.page_blob import SIZE_KEY, PageBlobImage
from replicator.plan import TargetState

BEGUN: Final = "replicator_begun"  # of the blob: the epoch that was begun last, and what it had to say
MODE: Final = "replicator_mode"
POINT: Final = "replicator_point"  # of a snapshot: the epoch that it seals
GROUP: Final = "replicator_point_group"
ETAG: Final = "replicator_point_etag"
CONSISTENCY: Final = "replicator_point_consistency"


@dataclass(frozen=True, slots=True)
class Point:
    """A sealed epoch of a blob. ``consistency`` FUZZY: it moved the data, and nobody should go back to it."""

    snapshot: Snapshot
    epoch: bytes
    etag: str
    consistency: Consistency


class BlobEpochs:
    """One blob's epochs, from ``open``.

    Attributes:
        image: what is written to.
        points: the sealed epochs, oldest first.
        begun: the epoch that was begun last, NO_ID if there is none; mode: what it had to say.
        clean: the blob holds just what the newest point holds.
    """

    def __init__(self, blob: PageBlob, group: str, image: PageBlobImage, points: Sequence[Point]) -> None:
        self.image = image
        self.points = list(points)
        self.begun = NO_ID
        self.mode = Mode.FULL
        self.clean = False
        self._blob = blob
        self._group = group

    @classmethod
    async def open(
        cls,
        account: Account,
        address: BlobAddress,
        group: str,
        size_bytes: int,
        identity: UUID,
        now: datetime,
    ) -> Self:
        """The blob of a disk, made if it is not there.

        Raises:
            TargetError: ``target.no_vhd``, ``target.other_size``, ``azure.refused``. As ``tries.tried``.
        """
        blob = PageBlob(InAccount(account, address), str(address), blame=TargetError)
        try:
            image = await PageBlobImage.open(blob)
        except TargetError as error:
            if error.code != "azure.missing":
                raise
            image = await PageBlobImage.create(blob, size_bytes, identity, now, {})
        if image.size_bytes != size_bytes:
            raise _other_size(image, size_bytes)
        found = [point for one in await snapshots(account, address) if (point := _point(one, group))]
        epochs = cls(blob, group, image, found)
        properties = await blob.properties()
        epochs.begun = _epoch(properties.metadata.get(BEGUN, ""))
        epochs.mode = _mode(properties.metadata.get(MODE, ""))
        epochs.clean = bool(found) and found[-1].etag == _plain(properties.etag)
        return epochs

    @property
    def sealed(self) -> bytes:
        """The newest sealed epoch; NO_ID if there is none."""
        return self.points[-1].epoch if self.points else NO_ID

    async def begin(self, epoch: bytes, mode: Mode) -> None:
        """The epoch is under way from now on: what the blob holds is between two states. Idempotent."""
        if self.begun == epoch:
            return
        reach("back.before_begin")
        await self._blob.annotate(
            {SIZE_KEY: str(self.image.size_bytes), BEGUN: epoch.hex(), MODE: mode.name.lower()}
        )
        reach("back.begun")
        self.begun, self.mode, self.clean = epoch, mode, False

    async def seal(self, epoch: bytes, consistency: Consistency) -> None:
        """The blob holds the whole epoch: a snapshot says so. Idempotent."""
        etag = _plain((await self._blob.properties()).etag)
        if self.points and (self.points[-1].epoch, self.points[-1].etag) == (epoch, etag):
            return
        reach("back.before_seal")
        told = {
            POINT: epoch.hex(),
            GROUP: self._group.encode().hex(),  # metadata takes ASCII only
            ETAG: etag,
            CONSISTENCY: consistency.name.lower(),
        }
        made = await self._blob.take_snapshot(told)
        reach("back.sealed")
        self.points.append(Point(made, epoch, etag, consistency))
        self.clean = True

    async def prune(self, keep: int) -> None:
        """Delete all recovery points but the newest ``keep``, at least one. Others' snapshots stay."""
        while len(self.points) > max(1, keep):
            await self._blob.at(self.points[0].snapshot.id).delete()
            del self.points[0]


def state_of(blobs: Sequence[BlobEpochs]) -> TargetState:
    """What the blobs of a group hold, for ``plan.decide``: what all of them say, and nothing in doubt."""
    sealed = {blob.sealed for blob in blobs}
    begun = {(blob.begun, blob.mode) for blob in blobs}
    newest = sealed.pop() if len(sealed) == 1 else NO_ID
    under_way, mode = begun.pop() if len(begun) == 1 else (NO_ID, Mode.FULL)
    return TargetState(
        sealed=newest,
        under_way=under_way if under_way != newest else NO_ID,
        under_way_mode=mode,
        blank=all(blob.image.blank for blob in blobs),
        clean=newest != NO_ID and all(blob.clean for blob in blobs),
        history=tuple(point.epoch for point in blobs[0].points) if newest != NO_ID else (),
    )


def _point(snapshot: Snapshot, group: str) -> Point | None:
    """The recovery point that a snapshot is; None if it is somebody else's, or another group's."""
    told = snapshot.metadata
    epoch = _epoch(told.get(POINT, ""))
    if epoch == NO_ID or told.get(GROUP) != group.encode().hex():
        return None
    names = {one.name.lower(): one for one in Consistency}
    return Point(snapshot, epoch, told.get(ETAG, ""), names.get(told.get(CONSISTENCY, ""), Consistency.FUZZY))


def _epoch(text: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        return NO_ID
    return found if len(found) == len(NO_ID) else NO_ID


def _mode(text: str) -> Mode:
    return next((mode for mode in Mode if mode.name.lower() == text), Mode.RESYNC)


def _plain(etag: str) -> str:
    return etag.strip('"')


def _other_size(image: PageBlobImage, size_bytes: int) -> TargetError:
    return TargetError(
        "target.other_size",
        f"{image.name} holds a disk of {image.size_bytes} bytes, the source has {size_bytes}",
        cause="the disk was resized, or the blob is another disk's",
        fix="give the name of a blob that is not there, or delete this one",
    )
