"""The footer of a fixed VHD: ours is qemu-img's, and qemu-img's is understood."""

import json
import random
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.formats.vhd import FOOTER_BYTES, Footer, make_footer, parse_footer

MIB = 1024 * 1024
QEMU = pytest.mark.peer("qemu-img")
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SIZES = [MIB, 3 * MIB, 511 * MIB, 2048 * MIB, 127 * 1024 * MIB, 2000 * 1024 * MIB]


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True, text=True).stdout


@QEMU
@pytest.mark.parametrize("size", SIZES)
def test_ours_differs_from_qemus_in_origin_alone(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.vhd"
    options = "subformat=fixed,force_size=on"
    qemu_img("create", "-q", "-f", "vpc", "-o", options, path, str(size))
    with path.open("rb") as file:
        file.seek(size)
        theirs = file.read()
    found = parse_footer(theirs)
    assert found is not None and found.disk_bytes == size
    ours = make_footer(size, found.id, CREATED)
    # Features, version, offset; sizes, geometry, kind; id and the rest. Not: time, creator, checksum.
    assert ours[:24] == theirs[:24] and ours[40:64] == theirs[40:64] and ours[68:] == theirs[68:]


@QEMU
def test_qemu_reads_a_disk_with_our_footer(tmp_path: Path, seed: int) -> None:
    content = random.Random(seed).randbytes(3 * MIB)
    (tmp_path / "raw").write_bytes(content)
    (tmp_path / "vhd").write_bytes(content + make_footer(len(content), UUID(int=seed), CREATED))
    told = json.loads(qemu_img("info", "--output=json", "-f", "vpc", tmp_path / "vhd"))
    assert told["virtual-size"] == len(content)
    disks = (tmp_path / "raw", tmp_path / "vhd")
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "vpc", *disks)


@given(st.integers(1, 2**43).map(lambda sectors: sectors * 512), st.uuids())
def test_what_is_made_is_understood(size: int, identity: UUID) -> None:
    footer = make_footer(size, identity, CREATED)
    assert len(footer) == FOOTER_BYTES
    assert parse_footer(footer) == Footer(size, identity)


@given(st.integers(0, FOOTER_BYTES - 1), st.integers(1, 255))
def test_a_footer_with_any_byte_changed_is_none(at: int, flip: int) -> None:
    """Its zeros, too: the checksum is over all of it."""
    footer = bytearray(make_footer(MIB, UUID(int=5), CREATED))
    footer[at] ^= flip
    assert parse_footer(bytes(footer)) is None


@pytest.mark.parametrize("content", [b"", bytes(512), b"conectix", b"conectix" + bytes(504), b"x" * 511])
def test_what_is_no_footer_is_none(content: bytes) -> None:
    assert parse_footer(content) is None


@QEMU
def test_a_disk_that_grows_is_none(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    qemu_img("create", "-q", "-f", "vpc", "-o", "subformat=dynamic", path, str(MIB))
    assert parse_footer(path.read_bytes()[-FOOTER_BYTES:]) is None


@pytest.mark.parametrize("size", [0, -512, 511, MIB + 1])
def test_a_disk_of_no_whole_sectors_gets_none(size: int) -> None:
    with pytest.raises(ValueError, match="sectors"):
        make_footer(size, UUID(int=1), CREATED)
