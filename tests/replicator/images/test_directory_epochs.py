"""Images of a group over several OPENs: what each of them may be said to hold."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.messages import NO_ID, Consistency, Mode, Open, OpenDisk
from protocol.payload import Extent
from replicator.files import Files
from replicator.images.coverage_journal import CoverageJournal, journal_name
from replicator.images.directory import ImageDirectory, OpenedGroup
from replicator.private_directory import PrivateDirectory

MIB = 1 << 20
A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def wanted(epoch: bytes, parent: bytes = NO_ID, names: tuple[str, ...] = ("one", "two")) -> Open:
    disks = tuple(OpenDisk(name, MIB) for name in names)
    return Open("web", b"", epoch, parent, Mode.RESYNC, Consistency.FUZZY, 0, disks)


@pytest.fixture
def retention(tmp_path: Path) -> PrivateDirectory:
    return PrivateDirectory(Files(), tmp_path / "retention")


@pytest.fixture
def directory(folder: Path, retention: PrivateDirectory) -> Iterator[ImageDirectory]:
    with ImageDirectory(Files(), folder, retention, thin=True) as made:
        yield made


def sealed(directory: ImageDirectory, epoch: bytes) -> None:
    group = directory.open_group("ps", wanted(epoch))
    for disk in group.disks:
        disk.image.write([Extent(0, MIB)], memoryview(bytearray(b"x" * MIB)))
    directory.seal(group)
    group.close()


def opened(directory: ImageDirectory, epoch: bytes, parent: bytes = NO_ID) -> tuple[Mode, list[int]]:
    group: OpenedGroup = directory.open_group("ps", wanted(epoch, parent))
    group.close()
    return group.epochs.mode, [disk.durable.covered_bytes for disk in group.disks]


def test_an_epoch_goes_on_where_it_was(directory: ImageDirectory) -> None:
    group = directory.open_group("ps", wanted(A))
    assert group.epochs.mode is Mode.FULL
    assert group.journal is not None
    group.journal.append([(group.disks[1].number, 0, 65536)])
    group.close()
    assert opened(directory, A) == (Mode.FULL, [0, 65536])
    assert opened(directory, B) == (Mode.RESYNC, [0, 0])
    assert opened(directory, A) == (Mode.RESYNC, [0, 0])


def test_what_is_sealed_takes_its_difference_and_says_so_again(directory: ImageDirectory) -> None:
    sealed(directory, A)
    assert opened(directory, A) == (Mode.FULL, [MIB, MIB])
    assert opened(directory, B, parent=A) == (Mode.INCREMENTAL, [0, 0])
    assert opened(directory, B) == (Mode.INCREMENTAL, [0, 0])
    assert opened(directory, C, parent=B) == (Mode.RESYNC, [0, 0])  # which was never sealed
    assert opened(directory, C, parent=A) == (Mode.RESYNC, [0, 0])  # it goes on as it was begun


def test_somebody_elses_write_makes_it_unknown(directory: ImageDirectory, folder: Path) -> None:
    sealed(directory, A)
    with (folder / "two-flat.vmdk").open("r+b") as data:
        data.write(b"y")
    assert opened(directory, B, parent=A) == (Mode.RESYNC, [0, 0])


@pytest.mark.parametrize("gone", ["one.replica.json", "two.replica.json"])
def test_without_its_sidecar_it_is_unknown(directory: ImageDirectory, folder: Path, gone: str) -> None:
    sealed(directory, A)
    (folder / gone).unlink()
    assert opened(directory, B, parent=A) == (Mode.RESYNC, [0, 0])


def test_disks_that_changed_places_are_unknown(directory: ImageDirectory, folder: Path) -> None:
    """With descriptor, data, times and sidecar: only the sidecar's number tells."""
    sealed(directory, A)
    for name in ("NAME.vmdk", "NAME-flat.vmdk", "NAME.replica.json"):
        one, two = folder / name.replace("NAME", "one"), folder / name.replace("NAME", "two")
        one.rename(folder / "spare")
        two.rename(one)
        (folder / "spare").rename(two)
    for name, other in (("one", "two"), ("two", "one")):
        path = folder / f"{name}.vmdk"
        path.write_text(path.read_text().replace(f"{other}-flat", f"{name}-flat"))
    assert opened(directory, B, parent=A) == (Mode.RESYNC, [0, 0])


def test_the_journal_of_a_lost_catalogue_says_nothing(
    directory: ImageDirectory, retention: PrivateDirectory
) -> None:
    with retention.held() as held:
        for number in (1, 2):
            left = CoverageJournal.open(held, number)
            left.append([(1, 0, MIB), (2, 0, MIB)])
            left.close()
    assert opened(directory, A) == (Mode.FULL, [0, 0])
    assert journal_name(1) in os.listdir(retention.path)


def test_a_disk_whose_data_is_gone_has_no_coverage(directory: ImageDirectory, folder: Path) -> None:
    group = directory.open_group("ps", wanted(A))
    assert group.journal is not None
    group.journal.append([(disk.number, 0, 65536) for disk in group.disks])
    group.close()
    (folder / "one-flat.vmdk").unlink()
    assert opened(directory, A) == (Mode.RESYNC, [0, 0])


def test_a_group_that_cannot_be_opened_whole_leaves_no_new_disk(
    directory: ImageDirectory, folder: Path
) -> None:
    sealed(directory, A)
    os.truncate(folder / "two-flat.vmdk", MIB - 512)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Exception, match="two-flat"):
        directory.open_group("ps", wanted(B, names=("new", "two")))
    assert not (folder / "new-flat.vmdk").exists()
    assert len(os.listdir("/proc/self/fd")) == before
