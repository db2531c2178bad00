"""A disk that is there already costs its difference: after damage, loss of memory, and writing by others."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agents.harness import MIB, Target, digest, identical, make_disk, receiving, send, sidecar
from tests.real_disks import run as system

pytestmark = pytest.mark.peer("qemu-img")

SIZE = 64 * MIB
BLOCK = 4096
LITTLE = 64 * 1024


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SIZE)


def scribble(path: Path, rng: random.Random, blocks: int) -> set[int]:
    """Write to so many random blocks of 4 KiB; returns which."""
    numbers = set(rng.sample(range(SIZE // BLOCK), blocks))
    with path.open("r+b") as file:
        for number in numbers:
            file.seek(number * BLOCK)
            file.write(rng.randbytes(BLOCK))
    return numbers


def sent_again(source: Path, target: Target, state: Path) -> dict:
    """Send what was sent before; afterwards both are the same."""
    done = send(source, target.address, state, token=target.token).ok
    assert done["fuzzy"] is False
    assert identical(source, target.directory / "disk.vmdk")
    assert sidecar(target.directory, "disk")["state"] == "clean"
    return done


def sealed(source: Path, target: Target, state: Path) -> None:
    assert sent_again(source, target, state)["mode"] == "full"


# ------------------------------------------------------------------ VMDKs of others


def test_a_vmdk_that_qemu_img_made_takes_only_blocks_that_differ(
    source: Path, target: Target, state: Path, seed: int, count: Callable
) -> None:
    rng = random.Random(seed)
    vmdk = target.directory / "disk.vmdk"
    options = ("-O", "vmdk", "-o", "subformat=monolithicFlat")
    system("qemu-img", "convert", "-f", "raw", *options, source, vmdk)
    blocks = count(100, 160)
    differ = scribble(source, rng, blocks) | scribble(target.directory / "disk-flat.vmdk", rng, blocks)
    done = sent_again(source, target, state)
    different_bytes = len(differ) * BLOCK
    print(f"{different_bytes} bytes differ, {done['sent_bytes']} were sent")
    assert done["mode"] == "resync"
    assert done["sent_bytes"] <= 1.05 * different_bytes + LITTLE
    assert done["matched_bytes"] == SIZE - different_bytes


def test_an_adopted_vmdk_is_ours_from_then_on(source: Path, target: Target, state: Path) -> None:
    options = ("-O", "vmdk", "-o", "subformat=monolithicFlat")
    system("qemu-img", "convert", "-f", "raw", *options, source, target.directory / "disk.vmdk")
    first = sent_again(source, target, state)
    assert (first["mode"], first["matched_bytes"]) == ("resync", SIZE)
    assert sent_again(source, target, state)["mode"] == "incremental"


# ------------------------------------------------------------------ behind our back


def test_a_vmdk_that_was_written_to_since_is_compared(
    source: Path, target: Target, state: Path, seed: int
) -> None:
    sealed(source, target, state)
    differ = scribble(target.directory / "disk-flat.vmdk", random.Random(seed), 50)
    done = sent_again(source, target, state)
    assert done["mode"] == "resync"
    assert done["matched_bytes"] == SIZE - len(differ) * BLOCK


def test_a_vmdk_whose_content_id_is_another_is_compared(
    source: Path, target: Target, state: Path, seed: int
) -> None:
    """Its times may lie: hosts that write to a disk give it a new content id."""
    sealed(source, target, state)
    flat, vmdk = target.directory / "disk-flat.vmdk", target.directory / "disk.vmdk"
    before = flat.stat()
    scribble(flat, random.Random(seed), 50)
    os.utime(flat, ns=(before.st_atime_ns, before.st_mtime_ns))
    lines = vmdk.read_text().splitlines(keepends=True)
    vmdk.write_text("".join("CID=12345678\n" if line.startswith("CID=") else line for line in lines))
    assert sent_again(source, target, state)["mode"] == "resync"


def test_a_vmdk_without_its_sidecar_is_compared(source: Path, target: Target, state: Path) -> None:
    sealed(source, target, state)
    (target.directory / "disk.replica.json").unlink()
    done = sent_again(source, target, state)
    assert (done["mode"], done["matched_bytes"]) == ("resync", SIZE)


def test_a_vmdk_that_was_replaced_by_an_older_copy_of_itself_is_compared(
    source: Path, target: Target, state: Path, seed: int, tmp_path: Path
) -> None:
    """All of it, sidecar too, with its times: an older epoch is another one."""
    sealed(source, target, state)
    names = ("disk.vmdk", "disk-flat.vmdk", "disk.replica.json")
    for name in names:
        shutil.copy2(target.directory / name, tmp_path / name)
    scribble(source, random.Random(seed), 50)
    assert sent_again(source, target, state)["mode"] == "incremental"
    for name in names:
        shutil.copy2(tmp_path / name, target.directory / name)
    assert sent_again(source, target, state)["mode"] == "resync"


# ------------------------------------------------------------------ forgotten


def test_a_sender_without_its_memory_compares(source: Path, target: Target, state: Path) -> None:
    sealed(source, target, state)
    shutil.rmtree(state / "groups")
    done = sent_again(source, target, state)
    assert (done["mode"], done["matched_bytes"]) == ("resync", SIZE)
    assert done["sent_bytes"] <= LITTLE


@pytest.mark.parametrize("damage", ["flipped", "cut", "swapped"])
def test_a_damaged_map_is_not_believed(
    damage: str, source: Path, target: Target, state: Path, seed: int
) -> None:
    sealed(source, target, state)
    (path,) = (state / "groups").glob("*/*.map")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[random.Random(seed).randrange(16, 4096)] ^= 1
    elif damage == "cut":
        del content[-4096:]
    else:
        content[:4096], content[4096:8192] = content[4096:8192], content[:4096]
    path.write_bytes(content)
    scribble(source, random.Random(seed), 20)
    assert sent_again(source, target, state)["mode"] == "resync"


def test_a_map_of_an_older_epoch_is_not_believed(
    source: Path, target: Target, state: Path, seed: int, tmp_path: Path
) -> None:
    """As a state directory that was restored from a backup would have it."""
    sealed(source, target, state)
    shutil.copytree(state / "groups", tmp_path / "backup")
    scribble(source, random.Random(seed), 20)
    assert sent_again(source, target, state)["mode"] == "incremental"
    shutil.rmtree(state / "groups")
    shutil.copytree(tmp_path / "backup", state / "groups")
    assert sent_again(source, target, state)["mode"] == "resync"


def test_a_target_that_was_installed_anew_wants_a_new_token_and_then_compares(
    source: Path, state: Path, tmp_path: Path
) -> None:
    with receiving(tmp_path / "target") as first:
        sealed(source, first, state)
        address, _ = first.address, first.stop()
    shutil.rmtree(first.retention)
    with receiving(tmp_path / "target", listen=address) as second:
        refused = send(source, address, state, give_up_after_s=None)
        assert (refused.error["code"], refused.status) == ("identity.server_not_trusted", 1)
        assert "join again with a new token" in refused.error["fix"]
        done = sent_again(source, second, state)
        assert (done["mode"], done["matched_bytes"]) == ("resync", SIZE)


# ------------------------------------------------------------------ the difference


def test_an_unchanged_disk_costs_next_to_nothing(source: Path, target: Target, state: Path) -> None:
    sealed(source, target, state)
    before = digest(target.directory / "disk-flat.vmdk")
    done = sent_again(source, target, state)
    assert (done["mode"], done["matched_bytes"], done["read_bytes"]) == ("incremental", SIZE, 0)
    assert done["sent_bytes"] <= LITTLE
    assert digest(target.directory / "disk-flat.vmdk") == before


def test_a_difference_costs_what_it_is(source: Path, target: Target, state: Path, seed: int) -> None:
    sealed(source, target, state)
    differ = scribble(source, random.Random(seed), 100)
    done = sent_again(source, target, state)
    assert done["mode"] == "incremental"
    assert done["sent_bytes"] <= 1.05 * len(differ) * BLOCK + LITTLE
    assert done["matched_bytes"] == SIZE - len(differ) * BLOCK
