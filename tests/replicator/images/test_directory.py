"""A directory of VMDKs: whose is what, what is refused before anything changes, and what a failure leaves."""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import NO_ID, Consistency, Mode, Open, OpenDisk
from protocol.payload import Extent
from replicator.errors import PeerError, SpaceError, StateError, TargetError
from replicator.files import Files
from replicator.images.catalogue import NAME_MAX_BYTES, check_disk
from replicator.images.directory import ImageDirectory, OpenedGroup
from replicator.private_directory import PrivateDirectory
from tests.faulty_files import FaultyFiles
from tests.replicator.pipeline import descriptors, ends
from tests.replicator.trust import mode_of

SIZE = 1 << 20
EPOCH, LATER = bytes(range(16)), bytes(range(16, 32))


class Store:
    """A datastore and its retention directory."""

    def __init__(self, path: Path) -> None:
        self.path = path / "disks"
        self.path.mkdir()
        self.retention = PrivateDirectory(Files(), path / "retention")

    def directory(self, files: Files | None = None, *, thin: bool = True) -> ImageDirectory:
        return ImageDirectory(files or Files(), self.path, self.retention, thin=thin)

    @contextmanager
    def group(
        self,
        *names: str,
        owner: str = "ps-1",
        group: str = "web",
        epoch: bytes = EPOCH,
        parent: bytes = NO_ID,
        size: int = SIZE,
        files: Files | None = None,
        thin: bool = True,
    ) -> Iterator[tuple[ImageDirectory, OpenedGroup]]:
        with self.directory(files, thin=thin) as directory:
            disks = tuple(OpenDisk(name, size) for name in names)
            mode = Mode.RESYNC if parent == NO_ID else Mode.INCREMENTAL
            wanted = Open(group, b"", epoch, parent, mode, Consistency.FUZZY, 0, disks)
            opened = directory.open_group(owner, wanted)
            try:
                yield directory, opened
            finally:
                opened.close()

    def sidecar(self, name: str) -> dict:
        return json.loads((self.path / f"{name}.replica.json").read_text())

    def catalogue(self) -> dict:
        return json.loads((self.retention.path / "catalogue.json").read_text())

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path))

    def seal(self, *names: str, **how) -> OpenedGroup:
        """An epoch, sealed and, if it went to a log, applied."""
        with self.group(*names, **how) as (directory, opened):
            seal(directory, opened)
            return opened


def seal(directory: ImageDirectory, opened: OpenedGroup) -> None:
    logged = opened.journal is None and not opened.sealed
    directory.seal(opened)
    if logged:
        directory.unsettle(opened, opened.epoch)
        directory.settle(opened, opened.epoch)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


# ------------------------------------------------------------------ the way of an epoch


def test_a_descriptor_appears_only_when_the_epoch_is_sealed(store: Store) -> None:
    with store.group("os") as (directory, opened):
        assert store.names() == ["os-flat.vmdk", "os.replica.json"]
        assert store.sidecar("os") == {
            "version": 1,
            "owner": "ps-1",
            "disk": 1,
            "epoch": EPOCH.hex(),
            "state": "dirty",
            "cid": "00000000",
            "modified_ns": 0,
        }
        opened.disks[0].image.write([Extent(0, 512)], memoryview(b"x" * 512))
        directory.seal(opened)
    assert store.names() == ["os-flat.vmdk", "os.replica.json", "os.vmdk"]
    sealed = store.sidecar("os")
    assert (sealed["state"], sealed["epoch"]) == ("clean", EPOCH.hex())
    assert f"CID={sealed['cid']}" in (store.path / "os.vmdk").read_text()
    assert sealed["modified_ns"] == (store.path / "os-flat.vmdk").stat().st_mtime_ns
    assert mode_of(store.path / "os.replica.json") == 0o644
    assert (store.path / "os-flat.vmdk").read_bytes() == b"x" * 512 + bytes(SIZE - 512)


def test_the_next_epoch_changes_nothing_before_it_is_applied(store: Store) -> None:
    with store.group("os") as (directory, opened):
        opened.disks[0].image.write([Extent(0, 512)], memoryview(b"x" * 512))
        directory.seal(opened)
    sealed = store.sidecar("os")
    with store.group("os", epoch=LATER) as (directory, again):
        assert (again.disks[0].number, again.epochs.number) == (1, 2)
        assert again.journal is None and not again.sealed
        directory.seal(again)
        assert store.sidecar("os") == sealed
        directory.unsettle(again, LATER)
        dirty = {"state": "dirty", "epoch": LATER.hex(), "modified_ns": 0}
        assert store.sidecar("os") == {**sealed, **dirty}
        directory.settle(again, LATER)
        assert (store.sidecar("os")["state"], store.sidecar("os")["epoch"]) == ("clean", LATER.hex())
        assert not again.disks[0].image.blank
    assert (store.path / "os-flat.vmdk").read_bytes()[:512] == b"x" * 512


def test_a_first_epoch_that_was_interrupted_is_gone_on_with(store: Store) -> None:
    with store.group("os"):
        pass
    with store.group("os", epoch=LATER) as (directory, opened):
        assert opened.disks[0].number == 1
        directory.seal(opened)
    assert store.sidecar("os")["state"] == "clean"


@pytest.mark.parametrize("thin", [True, False])
def test_an_interrupted_first_epoch_stays_as_thin_or_thick_as_it_was_meant(store: Store, thin: bool) -> None:
    with store.group("os", thin=thin):
        pass
    with store.group("os", thin=thin) as (directory, opened):
        image = opened.disks[0].image
        assert image.thin is thin
        image.write([Extent(0, SIZE, True)], memoryview(b""))
        directory.seal(opened)
    assert ("thinProvisioned" in (store.path / "os.vmdk").read_text()) is thin
    allocated = (store.path / "os-flat.vmdk").stat().st_blocks * 512
    assert allocated == 0 if thin else allocated >= SIZE


@pytest.mark.peer("qemu-img")
def test_what_is_sealed_is_a_vmdk_for_others(store: Store) -> None:
    store.seal("os", "data")
    for name in ("os", "data"):
        said = subprocess.run(
            ["qemu-img", "info", "--output=json", store.path / f"{name}.vmdk"],
            capture_output=True,
            check=True,
        )
        assert json.loads(said.stdout)["virtual-size"] == SIZE


# ------------------------------------------------------------------ what an epoch has to say


def mode_after(store: Store, *names: str, epoch: bytes = LATER) -> Mode:
    """What the next epoch has to say, of a sender that knows what differs from EPOCH."""
    with store.group(*names, epoch=epoch, parent=EPOCH) as (_, opened):
        return opened.epochs.mode


def write_over(store: Store) -> None:
    with (store.path / "a-flat.vmdk").open("r+b") as file:
        file.write(b"x")
    touch(store)


def touch(store: Store) -> None:
    found = (store.path / "a-flat.vmdk").stat()
    os.utime(store.path / "a-flat.vmdk", ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def other_content_id(store: Store) -> None:
    """As ESXi does at the first write after a power-on."""
    path = store.path / "a.vmdk"
    path.write_text(path.read_text().replace(f"CID={store.sidecar('a')['cid']}", "CID=12345678"))


def edit_sidecar(**fields: object) -> Callable[[Store], None]:
    def edit(store: Store) -> None:
        path = store.path / "a.replica.json"
        path.write_text(json.dumps(store.sidecar("a") | fields))

    return edit


def lose_retention(store: Store) -> None:
    for name in store.retention.names():
        (store.retention.path / name).unlink()


def remove_image(store: Store) -> None:
    for path in store.path.glob("a*"):
        path.unlink()


DOUBTS: dict[str, tuple[Callable[[Store], object], Mode]] = {
    "nothing happened": (lambda store: None, Mode.INCREMENTAL),
    "somebody wrote to it": (write_over, Mode.RESYNC),
    "its time changed": (touch, Mode.RESYNC),
    "its content id changed": (other_content_id, Mode.RESYNC),
    "no sidecar": (lambda store: (store.path / "a.replica.json").unlink(), Mode.RESYNC),
    "a damaged sidecar": (lambda store: (store.path / "a.replica.json").write_text("{"), Mode.RESYNC),
    "a dirty sidecar": (edit_sidecar(state="dirty"), Mode.RESYNC),
    "another's sidecar": (edit_sidecar(owner="ps-2"), Mode.RESYNC),
    "another disk's sidecar": (edit_sidecar(disk=7), Mode.RESYNC),
    "another epoch's sidecar": (edit_sidecar(epoch="ff" * 16), Mode.RESYNC),
    "retention lost": (lose_retention, Mode.RESYNC),
    "the image is gone": (remove_image, Mode.RESYNC),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_the_difference_alone_is_enough_only_without_any_doubt(store: Store, doubt: str) -> None:
    happens, expected = DOUBTS[doubt]
    store.seal("a", "b")
    happens(store)
    with store.group("a", "b", epoch=LATER, parent=EPOCH) as (directory, opened):
        assert opened.epochs.mode is expected
        assert [disk.durable.intervals() for disk in opened.disks] == [(), ()]
        seal(directory, opened)
    with store.group("a", "b", epoch=EPOCH[:1] * 16, parent=LATER) as (_, opened):  # and all is well again
        assert opened.epochs.mode is Mode.INCREMENTAL


def test_a_disk_that_joins_a_group_has_both_sides_compare(store: Store) -> None:
    store.seal("a")
    with store.group("a", "new", epoch=LATER, parent=EPOCH) as (directory, opened):
        assert opened.epochs.mode is Mode.RESYNC
        seal(directory, opened)
    assert mode_after(store, "a", "new", epoch=EPOCH[::-1]) is Mode.RESYNC  # it compares with what is old
    assert (store.path / "new.vmdk").exists()


def test_an_epoch_under_way_goes_on_with_what_its_journal_holds(store: Store) -> None:
    store.seal("a", "b")
    with store.group("a", "b", epoch=LATER, parent=EPOCH) as (directory, begun):
        directory.note_durable(begun.epochs.number, [(1, 0, 65536), (2, 65536, SIZE)])
    with store.group("a", "b", epoch=LATER) as (_, again):
        assert again.epochs == begun.epochs  # number and mode, though the sender knows no parent any more
        assert [disk.durable.intervals() for disk in again.disks] == [((0, 65536),), ((65536, SIZE),)]
    with store.group("a", "b", epoch=EPOCH[::-1]) as (_, other):
        assert other.epochs.number > begun.epochs.number
        assert [disk.durable.intervals() for disk in other.disks] == [(), ()]
    assert not [name for name in store.retention.names() if name.endswith(".coverage")]


@pytest.mark.parametrize("doubt", [edit_sidecar(epoch="ff" * 16), other_content_id, lose_retention])
def test_what_a_journal_says_of_an_image_that_is_no_longer_the_same_is_not_believed(
    store: Store, doubt: Callable[[Store], None]
) -> None:
    store.seal("a")
    with store.group("a", epoch=LATER) as (directory, begun):
        directory.note_durable(begun.epochs.number, [(1, 0, SIZE)])
    doubt(store)
    with store.group("a", epoch=LATER) as (_, again):
        assert again.disks[0].durable.intervals() == ()


def test_a_sealed_epoch_is_opened_whole_and_sealed_again_without_a_change(store: Store) -> None:
    first = store.seal("a", "b")
    before = store.sidecar("a"), store.catalogue(), store.retention.names()
    again = store.seal("a", "b")
    assert again.sealed and again.epochs.number == first.epochs.number
    assert [disk.durable.intervals() for disk in again.disks] == [((0, SIZE),)] * 2
    assert (store.sidecar("a"), store.catalogue(), store.retention.names()) == before
    touch(store)
    again = store.seal("a", "b")  # not whole: somebody may have written to it
    assert not again.sealed and again.adopted == first.epochs.number + 1


# ------------------------------------------------------------------ numbers and owners


def test_numbers_are_given_in_order_and_never_again(store: Store) -> None:
    first = store.seal("a", "b")
    for name in ("a", "b"):
        for file in store.path.glob(f"{name}*"):
            file.unlink()
    second = store.seal("c", group="mail")
    third = store.seal("b", "a")
    numbers = {disk.name: disk.number for group in (first, second, third) for disk in group.disks}
    assert numbers == {"a": 1, "b": 2, "c": 3}
    assert store.catalogue()["next_number"] == 4


def test_every_epoch_has_a_number_of_its_own(store: Store) -> None:
    epochs = [bytes([number]) * 16 for number in range(1, 5)]
    assert [store.seal("a", epoch=epoch).epochs.number for epoch in epochs[:3]] == [1, 2, 3]
    with ends(PeerError, "disk.bad_size"), store.group("b", size=100):
        pass
    assert store.seal("a", epoch=epochs[3]).epochs.number == 4
    assert store.seal("x", group="mail").epochs.number == 5


def test_disks_are_answered_in_the_order_they_were_asked_for(store: Store) -> None:
    store.seal("a", "b", "c")
    with store.group("c", "new", "a") as (_, opened):
        assert [disk.name for disk in opened.disks] == ["c", "new", "a"]
        assert [disk.number for disk in opened.disks] == [3, 4, 1]
        assert [disk.image.name for disk in opened.disks] == ["c.vmdk", "new.vmdk", "a.vmdk"]


def test_a_group_stays_its_first_senders(store: Store) -> None:
    store.seal("a")
    before = store.sidecar("a"), store.catalogue(), store.names()
    with ends(PeerError, "group.not_yours") as caught, store.group("a", owner="ps-2"):
        pass
    assert "ps-1" in caught.value.message
    with ends(PeerError, "group.not_yours"), store.group("new", owner="ps-2"):
        pass
    assert (store.sidecar("a"), store.catalogue(), store.names()) == before
    assert store.seal("a").owner == "ps-1"


def test_a_disk_name_belongs_to_one_group(store: Store) -> None:
    store.seal("a")
    for owner in ("ps-1", "ps-2"):
        with ends(PeerError, "disk.name_taken"), store.group("a", owner=owner, group="mail"):
            pass
    assert store.catalogue()["disks"] == [{"number": 1, "group": "web", "name": "a", "owner": "ps-1"}]


# ------------------------------------------------------------------ refusals


BAD_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "../a",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "a\x1b[31m",
    "a\u202eb",
    "a\u00adb",
    "x" * (NAME_MAX_BYTES + 1),
    "ä" * (NAME_MAX_BYTES // 2 + 1),
    "os-flat",
    "os-FLAT",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_plain_file_name_is_refused_and_nothing_is_made(store: Store, name: str) -> None:
    with ends(PeerError, "disk.bad_name"), store.group("good", name):
        pass
    assert store.names() == []
    assert not (store.retention.path / "catalogue.json").exists()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_whatever_name_is_accepted_stays_in_the_folder_and_leaves_every_other_disk_alone(name: str) -> None:
    try:
        check_disk(OpenDisk(name, 512))
    except PeerError:
        return
    made = {f"{name}.vmdk", f"{name}-flat.vmdk", f"{name}.replica.json"}
    others = {"disk", name + "x", "x" + name, name[:-1] or "y", name.removesuffix("-flat")} - {name}
    for other in others:
        assert not made & {f"{other}.vmdk", f"{other}-flat.vmdk", f"{other}.replica.json"} or "-flat" in other
    assert not any(os.sep in file or file.startswith(".") or "\0" in file for file in made)


def test_a_disk_cannot_be_named_so_that_its_descriptor_is_anothers_data(store: Store) -> None:
    """Its seal would replace the other's data by a text file."""
    store.seal("os")
    with ends(PeerError, "disk.bad_name"), store.group("os-flat", group="evil", owner="ps-2"):
        pass


@pytest.mark.parametrize("size", [0, 1, 511, 513, SIZE + 1])
def test_a_size_that_no_disk_has_is_refused(store: Store, size: int) -> None:
    with ends(PeerError, "disk.bad_size"), store.group("a", size=size):
        pass
    assert store.names() == []


def test_a_disk_listed_twice_and_a_group_without_disks_are_refused(store: Store) -> None:
    with ends(PeerError, "disk.listed_twice"), store.group("a", "a"):
        pass
    with ends(PeerError, "group.empty"), store.group():
        pass
    assert store.names() == []


def test_a_disk_of_another_size_is_refused_and_nothing_changes(store: Store) -> None:
    store.seal("a")
    before = store.sidecar("a"), store.catalogue()
    with ends(PeerError, "image.size_mismatch") as caught, store.group("new", "a", size=2 * SIZE):
        pass
    assert str(SIZE) in caught.value.message and str(2 * SIZE) in caught.value.message
    assert (store.sidecar("a"), store.catalogue()) == before
    assert "new-flat.vmdk" not in store.names()


def test_an_interrupted_disk_of_another_size_is_refused(store: Store) -> None:
    with store.group("a"):
        pass
    with ends(TargetError, "vmdk.extent_size"), store.group("a", size=2 * SIZE):
        pass


# ------------------------------------------------------------------ all or nothing


def test_a_disk_that_cannot_be_opened_leaves_none_of_its_group(store: Store) -> None:
    store.seal("old")
    before = descriptors()
    (store.path / "c-flat.vmdk").mkdir()
    with ends(TargetError, "target.open_failed"), store.group("a", "old", "b", "c"):
        pass
    assert store.names() == ["c-flat.vmdk", "old-flat.vmdk", "old.replica.json", "old.vmdk"]
    assert store.catalogue()["next_number"] == 2
    assert store.sidecar("old")["state"] == "clean"
    assert descriptors() == before


class NoSpace(Files):
    """Has none for one kind of call on files whose names begin so."""

    def __init__(self, kind: str, name: str) -> None:
        self._wanted = kind, name

    def _step(self, kind: str, name: str) -> None:
        if kind == self._wanted[0] and name.startswith(self._wanted[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    def _on(self, kind: str, fd: int) -> None:
        self._step(kind, os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))

    def truncate(self, fd: int, size: int) -> None:
        self._on("truncate", fd)
        super().truncate(fd, size)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._on("pwrite", fd)
        return super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self._on("fsync", fd)
        super().fsync(fd)

    def fdatasync(self, fd: int) -> None:
        self._on("fdatasync", fd)
        super().fdatasync(fd)

    def rename(self, dir_fd: int, old: str, new: str) -> None:
        self._step("rename", new)
        super().rename(dir_fd, old, new)


@pytest.mark.parametrize(
    ("kind", "name", "code"),
    [
        ("truncate", "b-flat", "target.full"),
        ("fsync", "b-flat", "target.full"),
        ("pwrite", ".a.replica", "target.full"),
        ("pwrite", ".b.replica", "target.full"),
        ("rename", "b.replica", "target.full"),
    ],
)
def test_no_space_while_a_group_is_opened_is_told_as_such_and_leaves_no_half_of_it(
    store: Store, kind: str, name: str, code: str
) -> None:
    before = descriptors()
    with ends(SpaceError, code), store.group("a", "b", files=NoSpace(kind, name)):
        pass
    assert descriptors() == before
    assert not [found for found in store.names() if found.endswith(".vmdk")]
    assert store.seal("a", "b").disks[1].number == 2  # and with space, it goes on


@pytest.mark.parametrize(
    ("kind", "name", "code"),
    [
        ("fdatasync", "b-flat", "target.sync_failed"),
        ("pwrite", ".b.vmdk", "target.full"),
        ("pwrite", ".a.replica", "target.full"),
    ],
)
def test_a_seal_that_fails_marks_no_disk_of_the_group_clean(
    store: Store, kind: str, name: str, code: str
) -> None:
    with store.group("a", "b"):
        pass
    with store.group("a", "b", epoch=LATER) as (directory, opened):
        directory._files = NoSpace(kind, name)
        for disk in opened.disks:
            disk.image._files = directory._files
        kind_of_error = TargetError if code == "target.sync_failed" else SpaceError
        with ends(kind_of_error, code):
            directory.seal(opened)
    assert {store.sidecar(disk)["state"] for disk in ("a", "b")} == {"dirty"}


def test_a_seal_makes_the_data_durable_before_it_says_so(store: Store) -> None:
    files = FaultyFiles()
    with store.group("a", "b", files=files) as (directory, opened):
        first = len(files.calls)
        directory.seal(opened)
        steps = [
            (call.kind, call.name) for call in files.calls[first:] if call.kind in ("fdatasync", "rename")
        ]
    files.let_go()
    assert steps == [
        ("fdatasync", "a-flat.vmdk"),
        ("fdatasync", "b-flat.vmdk"),
        ("rename", "a.vmdk"),
        ("rename", "b.vmdk"),
        ("rename", "a.replica.json"),
        ("rename", "b.replica.json"),
    ]


def test_the_catalogue_is_durable_before_a_disk_is_marked(store: Store) -> None:
    """A number that a sidecar names must never be given out again."""
    with ends(SpaceError, "target.full"), store.group("a", files=NoSpace("rename", "a.replica")):
        pass
    assert store.catalogue()["next_number"] == 2


# ------------------------------------------------------------------ the catalogue


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"next_number": 3', '"next_number": "3"'),
        lambda text: text.replace('"next_number": 3', '"next_number": 2'),
        lambda text: text.replace('"owner"', '"lord"'),
        lambda text: text.replace('"number": 1', '"number": true'),
        lambda text: text.replace('"disks"', '"more": 1, "disks"'),
    ],
)
def test_a_damaged_catalogue_is_told_and_left_alone(store: Store, damage: Callable[[str], str]) -> None:
    store.seal("a", "b")
    path = store.retention.path / "catalogue.json"
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    before = store.names(), store.sidecar("a")
    with ends(StateError, "catalogue.damaged") as caught, store.group("a", "new"):
        pass
    assert str(path) in caught.value.message
    assert path.read_text() == damaged and (store.names(), store.sidecar("a")) == before


# ------------------------------------------------------------------ the directory itself


def test_one_master_target_at_a_time(store: Store) -> None:
    with store.directory() as first, store.directory() as second:
        first.lock()
        before = descriptors()
        with ends(TargetError, "target.in_use"):
            second.lock()
        assert descriptors() == before
        first.close()
        second.lock()


def test_closing_gives_everything_back_and_may_be_repeated(store: Store) -> None:
    before = descriptors()
    directory = store.directory()
    directory.lock()
    directory.close()
    directory.close()
    assert descriptors() == before


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with ends(TargetError, "target.missing"):
        ImageDirectory(Files(), tmp_path / "no", PrivateDirectory(Files(), tmp_path / "r"), thin=True)
    assert not (tmp_path / "no").exists()


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with ends(TargetError, "target.unusable"):
        ImageDirectory(Files(), tmp_path / "file", PrivateDirectory(Files(), tmp_path / "r"), thin=True)


@pytest.mark.peer("mount", "umount")
def test_a_read_only_directory_is_told_at_once(store: Store) -> None:
    subprocess.run(["mount", "--bind", "-o", "ro", store.path, store.path], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", store.path], check=True)
    try:
        before = descriptors()
        with ends(TargetError, "target.read_only"):
            store.directory()
        assert descriptors() == before
    finally:
        subprocess.run(["umount", "--lazy", store.path], check=True)


def test_a_symbolic_link_in_a_disks_place_is_not_followed(store: Store, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(SIZE))
    (store.path / "a-flat.vmdk").symlink_to(victim)
    with ends(TargetError, "target.not_a_file"), store.group("a"):
        pass
    assert victim.read_bytes() == bytes(SIZE)
