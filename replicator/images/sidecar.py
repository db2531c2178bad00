"""The small file beside each VMDK that says whose it is, which epoch it holds, and whether that is whole.

``NAME.replica.json``, for people and for us. ``clean``: the disk holds exactly the epoch, and nobody has
written to it since: its content id and the time of its last change are noted. ``dirty``: an epoch is under
way; the disk is between two states.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from replicator.failpoints import reach
from replicator.files import Files, read_small_file, replace_file
from replicator.images.opening import failure
from replicator.private_directory import decode_record, encode_record

_FIELDS = {
    "version": int, "owner": str, "disk": int, "epoch": str, "state": str, "cid": str, "modified_ns": int
}  # fmt: skip
_VERSION = 1
_NONE_OF_OURS = frozenset({errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What stands in it. ``modified_ns``: last change of the data as the epoch ended; 0 while it is under
    way.
    """

    owner: str
    disk: int
    epoch: bytes
    clean: bool
    cid: int
    modified_ns: int


def sidecar_name(disk: str) -> str:
    """File name of a disk's sidecar."""
    return f"{disk}.replica.json"


def content_id(epoch: bytes) -> int:
    """What the descriptor of a disk that holds this epoch says: so ours is known again after a crash."""
    return int.from_bytes(epoch[:4], "little") % 0xFFFFFFFE  # the two above have meanings of their own


def read_sidecar(files: Files, dir_fd: int, disk: str) -> Sidecar | None:
    """A disk's sidecar; None where there is none that holds: the disk is then as good as unknown.

    Raises:
        TargetError, SpaceError: it cannot be read now. That says nothing about the disk.
    """
    name = sidecar_name(disk)
    try:
        content = read_small_file(files, dir_fd, name)
    except OSError as error:
        if error.errno in _NONE_OF_OURS:
            return None
        raise failure(error, "target.read_failed", f"cannot read {name}") from error
    try:
        record = decode_record(content, _FIELDS)
        return Sidecar(
            record["owner"],
            record["disk"],
            bytes.fromhex(record["epoch"]),
            record["state"] == "clean" and record["version"] == _VERSION,
            int(record["cid"], 16),
            record["modified_ns"],
        )
    except ValueError:
        return None


def write_sidecar(files: Files, dir_fd: int, disk: str, sidecar: Sidecar) -> None:
    """Replace a disk's sidecar, durably.

    Raises:
        TargetError, SpaceError: as ``opening.failure`` says.
    """
    record = {
        "version": _VERSION,
        "owner": sidecar.owner,
        "disk": sidecar.disk,
        "epoch": sidecar.epoch.hex(),
        "state": "clean" if sidecar.clean else "dirty",
        "cid": f"{sidecar.cid:08x}",
        "modified_ns": sidecar.modified_ns,
    }
    name = sidecar_name(disk)
    reach("sidecar.before_mark")
    try:
        replace_file(files, dir_fd, name, encode_record(record), mode=0o644)
    except OSError as error:
        raise failure(error, "target.write_failed", f"cannot write {name}") from error
    reach("sidecar.marked")
