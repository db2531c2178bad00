"""VMDK descriptors: the small text beside (or, in sparse disks, inside) the data, to values and back.

For disks of one flat extent in the descriptor's own folder, which is what datastores hold and what we write.
Not for sparse formats, snapshots or raw device mappings: they are recognised and refused. No I/O; a
descriptor is untrusted input, and every check on its text is here. Whether the extent's file has the stated
size is for who opens it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, NoReturn

from protocol.constants import DISK_MAX_BYTES, MIB, SECTOR_BYTES

CreateType = Literal["vmfs", "monolithicFlat"]  # the first on datastores, the second for files outside
Adapter = Literal["ide", "buslogic", "lsilogic", "legacyESX"]

DESCRIPTOR_MAX_BYTES: Final = 64 * 1024  # real ones have about 1 KiB; many custom ddb entries fit
NO_PARENT: Final = 0xFFFFFFFF
HW_VERSION: Final = "4"  # read by ESX 3 and older alone; newer hosts take any, old ones none above their own

_SPARSE_MAGICS: Final = (b"KDMV", b"COWD")  # hosted sparse and streamOptimized; ESX 2 sparse
_SPARSE_TYPES: Final = frozenset(
    {"monolithicsparse", "twogbmaxextentsparse", "streamoptimized", "vmfssparse", "sesparse"}
)
_SPARSE_KINDS: Final = frozenset({"SPARSE", "VMFSSPARSE", "SESPARSE"})
_FLAT_TYPES: Final = frozenset({"vmfs", "monolithicflat"})
_FLAT_KINDS: Final = frozenset({"FLAT", "VMFS"})
_VERSIONS: Final = frozenset({"1", "2", "3", "4"})  # all that VMware has written

_CONVERT: Final = "convert it: vmkfstools -i OLD NEW, or qemu-img convert -O vmdk -o subformat=monolithicFlat"
_BLANKS: Final = " \t\r"
_CID_DIGITS: Final = 8  # at most
_ENTRY = re.compile(r"([A-Za-z][A-Za-z0-9_.]*)[ \t]*=[ \t]*(.*)", re.DOTALL)
_EXTENT_START = re.compile(r"(RW|RDONLY|NOACCESS)[ \t]", re.IGNORECASE)
_EXTENT = re.compile(
    r'(\w+)[ \t]+([0-9]{1,20})[ \t]+(\w+)[ \t]+"([^"]*)"(?:[ \t]+([0-9]{1,20}))?', re.IGNORECASE | re.ASCII
)
_CID = re.compile(r"[0-9A-Fa-f]{1,8}")
_COUNT = re.compile(r"[0-9]{1,10}")
_UUID = re.compile(r"[0-9A-Fa-f -]{1,64}")
_READ: Final = frozenset(
    {
        "version",
        "cid",
        "parentcid",
        "parentfilenamehint",
        "createtype",
        "ddb.adaptertype",
        "ddb.virtualhwversion",
        "ddb.geometry.cylinders",
        "ddb.geometry.heads",
        "ddb.geometry.sectors",
        "ddb.thinprovisioned",
        "ddb.uuid",
        "ddb.longcontentid",
    }
)


class VmdkError(ValueError):
    """A descriptor is refused. Who is to blame depends on who reads it: it is no leaf of ``errors.py`` yet.

    Attributes:
        code, message, cause, fix: as in ``ReplicatorError``; source and image pass them on as their own leaf.
    """

    def __init__(self, code: str, message: str, *, cause: str, fix: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.cause = cause
        self.fix = fix


class Geometry(NamedTuple):
    """Cylinders, heads and sectors a track."""

    cylinders: int
    heads: int
    sectors: int


class FlatExtent(NamedTuple):
    """The one extent: its kind (FLAT or VMFS), its length and the base name of its file."""

    kind: str
    sectors: int
    name: str


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor as it stands in its file, and what it says. Made by ``parse``, ``new`` and ``with_cid``.

    Attributes:
        lines: all of it, in order, without the line feeds; bytes that are not UTF-8 are surrogate-escaped.
        cid: content id, 32 bits; changes whenever the content does.
        thin: ``ddb.thinProvisioned``.
        adapter, hw_version, geometry, uuid: None where the descriptor does not say.
    """

    lines: tuple[str, ...]
    create_type: str
    cid: int
    extent: FlatExtent
    thin: bool
    adapter: str | None
    hw_version: str | None
    geometry: Geometry | None
    uuid: str | None

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return self.extent.sectors * SECTOR_BYTES


def geometry_for(adapter: Adapter, size_bytes: int) -> Geometry:
    """The geometry that VMware gives a disk of this size behind this adapter; cylinders are rounded down.

    Sources: VMware's open-vmdk (SCSI: 255/63, at most 65,535 cylinders); GSX Server guide, "Specifications"
    (BusLogic's smaller disks); ATA-5 (IDE: at most 16,383/16/63). ESXi writes 5,221 for 83,886,080 sectors:
    down.
    """
    most = 65_535
    heads, track = 255, 63
    if adapter == "ide":
        most, heads, track = 16_383, 16, 63
    elif adapter == "buslogic" and size_bytes <= 2048 * MIB:
        heads, track = (64 if size_bytes <= 1024 * MIB else 128), 32
    cylinders = size_bytes // SECTOR_BYTES // (heads * track)
    return Geometry(max(1, min(cylinders, most)), heads, track)


def new(
    extent_name: str,
    size_bytes: int,
    *,
    cid: int,
    create_type: CreateType = "vmfs",
    adapter: Adapter = "lsilogic",
    thin: bool = True,
    uuid: str | None = None,
) -> Descriptor:
    """The descriptor of a new flat disk whose data is in the file ``extent_name`` beside it.

    Raises:
        VmdkError: the name is no base name. ValueError: size, content id or UUID are no such thing.
    """
    _check_cid(cid)
    if uuid is not None and not _UUID.fullmatch(uuid):
        raise ValueError(f"{uuid!r} is no UUID")
    if not 0 < size_bytes <= DISK_MAX_BYTES or size_bytes % SECTOR_BYTES:
        raise ValueError(f"{size_bytes} is no size of a disk")
    _check_base_name(extent_name, "")
    cylinders, heads, track = geometry_for(adapter, size_bytes)
    sectors = size_bytes // SECTOR_BYTES
    # VMFS extents have no offset and FLAT ones must have one: qemu refuses either the other way round.
    extent = (
        f'RW {sectors} VMFS "{extent_name}"'
        if create_type == "vmfs"
        else f'RW {sectors} FLAT "{extent_name}" 0'
    )
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        f"CID={cid:08x}",
        f"parentCID={NO_PARENT:08x}",
        f'createType="{create_type}"',
        "",
        "# Extent description",
        extent,
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        f'ddb.adapterType = "{adapter}"',
        f'ddb.geometry.cylinders = "{cylinders}"',
        f'ddb.geometry.heads = "{heads}"',
        f'ddb.geometry.sectors = "{track}"',
    ]
    if thin:
        lines.append('ddb.thinProvisioned = "1"')
    if uuid is not None:
        lines.append(f'ddb.uuid = "{uuid}"')
    lines += [f'ddb.virtualHWVersion = "{HW_VERSION}"', ""]
    return _read(tuple(lines), "")


def parse(content: bytes, name: str) -> Descriptor:
    """Read the descriptor that is the file ``name`` in its folder.

    ``content`` may be cut off behind ``DESCRIPTOR_MAX_BYTES + 1`` bytes; that is enough to refuse what is
    longer.

    Raises:
        VmdkError: ``vmdk.malformed``, ``vmdk.sparse_unsupported``, ``vmdk.has_parent``,
            ``vmdk.several_extents``, ``vmdk.outside_folder`` or ``vmdk.unsupported``; nothing else, whatever
            the content.
    """
    if content[:4] in _SPARSE_MAGICS:
        _refuse_sparse("a binary sparse header")
    if len(content) > DESCRIPTOR_MAX_BYTES:
        _malformed(f"it is longer than {DESCRIPTOR_MAX_BYTES} bytes")
    # qemu-img pads to a sector when it sets the content id. Where that has fewer digits than the one before,
    # a few bytes of the old end are left behind the NUL that ends the new text.
    text, _, behind = content.partition(b"\0")
    if len(behind.strip(b"\0")) >= _CID_DIGITS or (content and not text):
        _malformed("it is not text")
    return _read(tuple(text.decode("utf-8", "surrogateescape").split("\n")), name)


def render(descriptor: Descriptor) -> bytes:
    """The descriptor's file, byte for byte as it was parsed, without what was behind its end."""
    return "\n".join(descriptor.lines).encode("utf-8", "surrogateescape")


def with_cid(descriptor: Descriptor, cid: int) -> Descriptor:
    """The same descriptor with another content id; every other byte stays.

    The content id stands in two places: ``CID``, and as the last eight digits of ``ddb.longContentID`` where
    there is one. Source: VMware's open-vmdk writes them so.
    """
    _check_cid(cid)
    old, fresh = f"{descriptor.cid:08x}", f"{cid:08x}"

    def changed(line: str) -> str:
        entry = _ENTRY.fullmatch(line.strip(_BLANKS))
        key = entry[1].lower() if entry else ""
        if key == "cid":
            return re.sub(r"(=[ \t]*\"?)[0-9A-Fa-f]+", rf"\g<1>{fresh}", line, count=1)
        if key == "ddb.longcontentid":
            return re.sub(rf"{old}(?=\"?[ \t\r]*$)", fresh, line, flags=re.IGNORECASE)
        return line

    return _read(tuple(map(changed, descriptor.lines)), "")


def _read(lines: tuple[str, ...], name: str) -> Descriptor:
    entries: dict[str, str] = {}
    extents: list[str] = []
    for line in lines:
        text = line.strip(_BLANKS)
        if _EXTENT_START.match(text):
            extents.append(text)
        elif (entry := _ENTRY.fullmatch(text)) and (key := entry[1].lower()) in _READ:
            if key in entries:
                _malformed(f"{entry[1]} stands in it twice")
            entries[key] = _unquoted(entry[2])
    if "version" not in entries:
        _malformed("it has no version line")
    if entries["version"] not in _VERSIONS:
        _unsupported(f"version {entries['version'][:20]!r}")
    if _cid(entries, "parentcid") != NO_PARENT or "parentfilenamehint" in entries:
        raise VmdkError(
            "vmdk.has_parent",
            "the VMDK is the delta of a snapshot or linked clone",
            cause="its descriptor names a parent disk, so it holds only part of the content",
            fix="delete (consolidate) the machine's snapshots, or name the disk they are based on",
        )
    create_type = entries.get("createtype", "")
    if create_type.lower() in _SPARSE_TYPES:
        _refuse_sparse(f"createType {create_type}")
    extent = _extent(extents, name)
    if create_type.lower() not in _FLAT_TYPES:
        _unsupported(f"createType {create_type[:40]!r}")
    return Descriptor(
        lines=lines,
        create_type=create_type,
        cid=_cid(entries, "cid"),
        extent=extent,
        thin=entries.get("ddb.thinprovisioned") == "1",
        adapter=entries.get("ddb.adaptertype"),
        hw_version=entries.get("ddb.virtualhwversion"),
        geometry=_geometry(entries),
        uuid=entries.get("ddb.uuid"),
    )


def _extent(lines: list[str], name: str) -> FlatExtent:
    if not lines:
        _malformed("it describes no extent")
    if len(lines) > 1:
        raise VmdkError(
            "vmdk.several_extents",
            f"the VMDK consists of {len(lines)} extents",
            cause="it was made in pieces, of 2 GB for example; only disks of one extent are supported",
            fix=_CONVERT,
        )
    found = _EXTENT.fullmatch(lines[0])
    if found is None:
        _malformed("its extent line cannot be read")
    access, sectors, kind, extent_name, offset = found.groups()
    kind = kind.upper()
    if kind in _SPARSE_KINDS:
        _refuse_sparse(f"an extent of kind {kind}")
    if access.upper() != "RW" or kind not in _FLAT_KINDS or int(offset or 0):
        _unsupported("an extent other than RW, FLAT or VMFS, at offset 0")
    if not 0 < int(sectors) * SECTOR_BYTES <= DISK_MAX_BYTES:
        _malformed(f"{sectors} sectors are no size of a disk")
    _check_base_name(extent_name, name)
    return FlatExtent(kind, int(sectors), extent_name)


def _check_base_name(extent_name: str, own_name: str) -> None:
    control = any(ord(char) < 0x20 or char in '/\\"\x7f' for char in extent_name)
    if control or extent_name in ("", ".", "..", own_name):
        raise VmdkError(
            "vmdk.outside_folder",
            f"the VMDK's data is said to be in {extent_name[:200]!r}",
            cause="only a file beside the descriptor, given by its base name, is opened",
            fix="put both files into one folder and name the data file in the descriptor without a path",
        )


def _geometry(entries: dict[str, str]) -> Geometry | None:
    """None, too, where it cannot be read: hosts take it as a hint, and a bad one is no reason to refuse."""
    found = [entries.get(f"ddb.geometry.{part}", "") for part in Geometry._fields]
    return Geometry(*map(int, found)) if all(map(_COUNT.fullmatch, found)) else None


def _unquoted(value: str) -> str:
    quoted = len(value) >= 2 and value[0] == value[-1] == '"'
    return value[1:-1] if quoted else value


def _cid(entries: dict[str, str], key: str) -> int:
    text = entries.get(key, "")
    if not _CID.fullmatch(text):
        _malformed(f"it has no valid {'CID' if key == 'cid' else 'parentCID'}")
    return int(text, 16)


def _check_cid(cid: int) -> None:
    if not 0 <= cid < NO_PARENT:
        raise ValueError(f"{cid:#x} is no content id")


def _malformed(why: str) -> NoReturn:
    raise VmdkError(
        "vmdk.malformed",
        f"the VMDK descriptor cannot be used: {why}",
        cause="the file is damaged or is no VMDK descriptor",
        fix="name the small descriptor file, not the -flat file; if it is damaged, make a new one",
    )


def _unsupported(what: str) -> NoReturn:
    raise VmdkError(
        "vmdk.unsupported",
        f"the VMDK has {what}",
        cause="only flat disks (createType vmfs or monolithicFlat, whole files) are supported",
        fix=_CONVERT,
    )


def _refuse_sparse(what: str) -> NoReturn:
    raise VmdkError(
        "vmdk.sparse_unsupported",
        f"the VMDK is sparse: it has {what}",
        cause="sparse and stream-optimized VMDKs need a translation table; only flat ones are supported",
        fix=_CONVERT,
    )
