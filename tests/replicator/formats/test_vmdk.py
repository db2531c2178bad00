"""VMDK descriptors: read, written, changed in one place, and refused whatever they contain."""

import random
import re
from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.constants import DISK_MAX_BYTES, SECTOR_BYTES
from replicator.formats.vmdk import (
    DESCRIPTOR_MAX_BYTES,
    Adapter,
    CreateType,
    Descriptor,
    Geometry,
    VmdkError,
    geometry_for,
    new,
    parse,
    render,
    with_cid,
)

GIB = 1 << 30

# The form that ESXi 8 writes, with change tracking and a long content id.
ESXI = b"""# Disk DescriptorFile
version=4
encoding="UTF-8"
CID=7b1c22a5
parentCID=ffffffff
createType="vmfs"

# Extent description
RW 83886080 VMFS "app01-flat.vmdk"

# Change Tracking File
changeTrackPath="app01-ctk.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "5221"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.longContentID = "0f4c1d9a2b3e4f50617283947b1c22a5"
ddb.thinProvisioned = "1"
ddb.toolsVersion = "12352"
ddb.uuid = "60 00 C2 9c 1b 63 5d 5e-0a 8e 0d 0f 7f 2f 9a 11"
ddb.virtualHWVersion = "20"
"""

FLAT = b"""# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="monolithicFlat"
RW 2048 FLAT "disk-flat.vmdk" 0
"""


def code_of(content: bytes, name: str = "disk.vmdk") -> str:
    with pytest.raises(VmdkError) as caught:
        parse(content, name)
    assert caught.value.cause
    assert caught.value.fix
    return caught.value.code


# ------------------------------------------------------------------ reading and writing


def test_a_descriptor_of_esxi_is_read_and_rendered_unchanged() -> None:
    found = parse(ESXI, "app01.vmdk")
    assert found.create_type == "vmfs"
    assert found.extent == ("VMFS", 83886080, "app01-flat.vmdk")
    assert found.size_bytes == 40 * GIB
    assert (found.cid, found.thin, found.adapter, found.hw_version) == (0x7B1C22A5, True, "lsilogic", "20")
    assert found.geometry == (5221, 255, 63) == geometry_for("lsilogic", found.size_bytes)
    assert found.uuid == "60 00 C2 9c 1b 63 5d 5e-0a 8e 0d 0f 7f 2f 9a 11"
    assert render(found) == ESXI


def test_what_a_descriptor_does_not_say_is_none() -> None:
    found = parse(FLAT, "disk.vmdk")
    assert (found.adapter, found.hw_version, found.geometry, found.uuid) == (None, None, None, None)
    assert not found.thin


def test_a_geometry_that_cannot_be_read_is_no_reason_to_refuse() -> None:
    assert parse(ESXI.replace(b'heads = "255"', b'heads = "many"'), "x").geometry is None


def test_the_content_id_is_changed_in_both_places_and_nothing_else() -> None:
    changed = with_cid(parse(ESXI, "app01.vmdk"), 0x0000BEEF)
    assert changed.cid == 0xBEEF
    assert render(changed) == ESXI.replace(b"7b1c22a5", b"0000beef")
    unrelated = ESXI.replace(b'83947b1c22a5"', b'839400000000"')
    assert render(with_cid(parse(unrelated, "x"), 1)) == unrelated.replace(b"CID=7b1c22a5", b"CID=00000001")


def test_blanks_quotes_and_line_ends_stay_as_they_were() -> None:
    odd = FLAT.replace(b"CID=fffffffe", b'\t cid = "FFFFFFFE"  ').replace(b"\n", b"\r\n") + b"\xff\xfe"
    found = parse(odd, "disk.vmdk")
    assert render(found) == odd
    assert render(with_cid(found, 0xA)) == odd.replace(b"FFFFFFFE", b"0000000a")


names = st.text(
    st.characters(exclude_characters='"/\\\x7f', exclude_categories=["Cs", "Cc"]), min_size=1, max_size=80
).filter(lambda name: name not in (".", "..", "d.vmdk"))
sizes = st.integers(1, DISK_MAX_BYTES // SECTOR_BYTES).map(lambda sectors: sectors * SECTOR_BYTES)
cids = st.integers(0, 0xFFFFFFFE)
uuids = st.none() | st.binary(min_size=16, max_size=16).map(lambda raw: raw.hex(" "))


@given(
    name=names,
    size=sizes,
    cid=cids,
    create_type=st.sampled_from(get_args(CreateType)),
    adapter=st.sampled_from(get_args(Adapter)),
    thin=st.booleans(),
    uuid=uuids,
    next_cid=cids,
)
def test_what_is_rendered_is_parsed_again(
    name: str,
    size: int,
    cid: int,
    create_type: CreateType,
    adapter: Adapter,
    thin: bool,
    uuid: str | None,
    next_cid: int,
) -> None:
    made = new(name, size, cid=cid, create_type=create_type, adapter=adapter, thin=thin, uuid=uuid)
    found = parse(render(made), "d.vmdk")
    assert found == made
    assert (found.extent.name, found.size_bytes, found.cid, found.thin) == (name, size, cid, thin)
    assert (found.create_type, found.adapter, found.uuid) == (create_type, adapter, uuid)
    assert found.geometry == geometry_for(adapter, size)
    changed = with_cid(found, next_cid)
    assert changed.cid == next_cid
    assert with_cid(changed, cid) == found


unknown = st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=60).filter(
    lambda line: not re.match(r"\s*(RW|RDONLY|NOACCESS|version|cid|parentcid|createtype|ddb)", line, re.I)
)


@given(st.lists(unknown, max_size=8), st.integers(0, 6), cids)
def test_lines_that_mean_nothing_to_us_are_kept_in_their_places(
    extra: list[str], place: int, cid: int
) -> None:
    lines = FLAT.decode().split("\n")
    content = "\n".join([*lines[:place], *extra, *lines[place:]]).encode()
    found = with_cid(parse(content, "disk.vmdk"), cid)
    assert render(found) == content.replace(b"CID=fffffffe", b"CID=%08x" % cid)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: new("x", 513, cid=1), "no size"),
        (lambda: new("x", 0, cid=1), "no size"),
        (lambda: new("x", 2**63, cid=1), "no size"),
        (lambda: new("x", 512, cid=0xFFFFFFFF), "no content id"),
        (lambda: new("x", 512, cid=-1), "no content id"),
        (lambda: new("x", 512, cid=1, uuid='1"\nparentCID=1'), "no UUID"),
        (lambda: new('x"\nRW 1 FLAT "y', 512, cid=1), "said to be in"),
        (lambda: with_cid(parse(FLAT, "d"), 0xFFFFFFFF), "no content id"),
    ],
)
def test_values_that_no_descriptor_can_say_are_refused(call: Callable[[], Descriptor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call()


# ------------------------------------------------------------------ geometry


@pytest.mark.parametrize(
    ("adapter", "size", "expected"),
    [
        ("lsilogic", 20 * GIB, (2610, 255, 63)),  # as qemu-img and ESXi say
        ("legacyESX", 20 * GIB, (2610, 255, 63)),
        ("buslogic", GIB, (1024, 64, 32)),
        ("buslogic", GIB + 512, (512, 128, 32)),
        ("buslogic", 2 * GIB, (1024, 128, 32)),
        ("buslogic", 2 * GIB + 512, (261, 255, 63)),
        ("ide", 4 * GIB, (8322, 16, 63)),
        ("ide", 20 * GIB, (16383, 16, 63)),
        ("lsilogic", 512, (1, 255, 63)),
        ("ide", 512, (1, 16, 63)),
        ("lsilogic", DISK_MAX_BYTES, (65535, 255, 63)),
    ],
)
def test_geometry_follows_adapter_and_size(adapter: Adapter, size: int, expected: Geometry) -> None:
    assert geometry_for(adapter, size) == expected


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "vmdk.malformed"),
        (b"hello\n", "vmdk.malformed"),
        (b"\x7fELF\0\0", "vmdk.malformed"),
        (FLAT + b"#" * DESCRIPTOR_MAX_BYTES, "vmdk.malformed"),
        (FLAT[:30] + b"\0" + FLAT[30:], "vmdk.malformed"),
        (FLAT.replace(b"version=1\n", b""), "vmdk.malformed"),
        (FLAT.replace(b"CID=fffffffe\n", b"", 1), "vmdk.malformed"),
        (FLAT.replace(b"CID=fffffffe", b"CID=xyz"), "vmdk.malformed"),
        (FLAT.replace(b"CID=fffffffe", b"CID=123456789"), "vmdk.malformed"),
        (FLAT.replace(b"parentCID=ffffffff\n", b""), "vmdk.malformed"),
        (FLAT + b"CID=00000001\n", "vmdk.malformed"),
        (FLAT + b"parentcid=00000001\n", "vmdk.malformed"),
        (FLAT.replace(b"RW 2048", b"# RW 2048"), "vmdk.malformed"),
        (FLAT.replace(b" FLAT ", b" FLAT"), "vmdk.malformed"),
        (FLAT.replace(b'"disk-flat.vmdk"', b"disk-flat.vmdk"), "vmdk.malformed"),
        (FLAT.replace(b"RW 2048", b"RW 0"), "vmdk.malformed"),
        (FLAT.replace(b"RW 2048", b"RW -1"), "vmdk.malformed"),
        (FLAT.replace(b"RW 2048", b"RW 18014398509481984"), "vmdk.malformed"),  # 2^63 bytes
        (FLAT.replace(b"RW 2048", b"RW " + b"9" * 5000), "vmdk.malformed"),
        (FLAT.replace(b"2048", "٢٠٤٨".encode()), "vmdk.malformed"),
        (b"KDMV" + bytes(508), "vmdk.sparse_unsupported"),
        (b"KDMV" + bytes(DESCRIPTOR_MAX_BYTES), "vmdk.sparse_unsupported"),
        (b"COWD" + bytes(508), "vmdk.sparse_unsupported"),
        (FLAT.replace(b"monolithicFlat", b"monolithicSparse"), "vmdk.sparse_unsupported"),
        (FLAT.replace(b"monolithicFlat", b"twoGbMaxExtentSparse"), "vmdk.sparse_unsupported"),
        (FLAT.replace(b"monolithicFlat", b"streamOptimized"), "vmdk.sparse_unsupported"),
        (FLAT.replace(b"monolithicFlat", b"vmfsSparse"), "vmdk.sparse_unsupported"),
        (FLAT.replace(b"monolithicFlat", b"seSparse"), "vmdk.sparse_unsupported"),
        (FLAT.replace(b" FLAT ", b" SESPARSE "), "vmdk.sparse_unsupported"),
        (FLAT.replace(b"parentCID=ffffffff", b"parentCID=7b1c22a5"), "vmdk.has_parent"),
        (FLAT + b'parentFileNameHint="base.vmdk"\n', "vmdk.has_parent"),
        (FLAT + b'RW 2048 FLAT "more-flat.vmdk" 0\n', "vmdk.several_extents"),
        (FLAT + b"RW 2048 ZERO\n", "vmdk.several_extents"),
        (FLAT.replace(b"version=1", b"version=9"), "vmdk.unsupported"),
        (FLAT.replace(b"monolithicFlat", b"fullDevice"), "vmdk.unsupported"),
        (FLAT.replace(b"monolithicFlat", b"vmfsRawDeviceMap"), "vmdk.unsupported"),
        (FLAT.replace(b'createType="monolithicFlat"\n', b""), "vmdk.unsupported"),
        (FLAT.replace(b" FLAT ", b" VMFSRDM "), "vmdk.unsupported"),
        (FLAT.replace(b"RW ", b"RDONLY "), "vmdk.unsupported"),
        (FLAT.replace(b'" 0', b'" 1'), "vmdk.unsupported"),
    ],
)
def test_each_refusal_has_its_code(content: bytes, code: str) -> None:
    assert code_of(content) == code


@pytest.mark.parametrize(
    "name", ["/etc/shadow", "../x", "a/b", "..", ".", "", "disk.vmdk", "C:\\x", "a\\b", "a\tb", "a\x7f"]
)
def test_an_extent_outside_the_folder_is_refused(name: str) -> None:
    assert code_of(FLAT.replace(b"disk-flat.vmdk", name.encode())) == "vmdk.outside_folder"


def test_the_largest_disk_is_read() -> None:
    sectors = DISK_MAX_BYTES // SECTOR_BYTES
    found = parse(FLAT.replace(b"2048", str(sectors).encode()), "x")
    assert found.size_bytes == DISK_MAX_BYTES


PIECES = [
    *FLAT.splitlines(keepends=True),
    *ESXI.splitlines(keepends=True),
    b"=",
    b'"',
    b"\r",
    b"\xff",
    b"RW ",
    b"ddb.",
    b"9" * 30,
]


def test_whatever_the_content_it_is_read_or_refused(seed: int, count: Callable[[int, int], int]) -> None:
    rng = random.Random(seed)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(count(5_000, 500_000)):
        content = bytearray(rng.choice((FLAT, ESXI, b"".join(rng.choices(PIECES, k=rng.randrange(30))))))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(content) + 1)
            content[at : at + rng.randrange(4)] = (
                rng.choice(PIECES) if rng.random() < 0.5 else rng.randbytes(2)
            )
        try:
            found = parse(bytes(content), "disk.vmdk")
        except VmdkError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert render(found) == content.partition(b"\0")[0]  # what follows is padding, or left over
            assert "/" not in found.extent.name
            assert 0 < found.size_bytes <= DISK_MAX_BYTES
            assert with_cid(found, 5).cid == 5
    assert min(outcomes.values()) > 0


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(VmdkError):
        parse(content, "x")


def test_zeros_behind_the_text_are_padding() -> None:
    """As qemu-img leaves them: it sets the content id in whole sectors."""
    assert render(parse(FLAT.ljust(512, b"\0"), "disk.vmdk")) == FLAT
    assert render(parse(FLAT + b"\0", "disk.vmdk")) == FLAT


@pytest.mark.parametrize("digits", range(1, 9))
def test_what_qemu_img_leaves_behind_a_shorter_content_id_is_no_text(digits: int) -> None:
    """It writes the new id over the old as a C string, and the end of the old text stays behind the NUL."""
    old = FLAT.replace(b"CID=" + _cid_of(FLAT), b"CID=12345678", 1)
    new = old.replace(b"CID=12345678", b"CID=" + b"123456789"[:digits], 1)
    found = parse((new + b"\0" + old[len(new) + 1 :]).ljust(10_240, b"\0"), "disk.vmdk")
    assert render(found) == new


def _cid_of(content: bytes) -> bytes:
    return content.partition(b"CID=")[2].partition(b"\n")[0]
