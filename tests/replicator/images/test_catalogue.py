"""The catalogue: numbers are given out once, groups belong to who began them, epochs come back as stored."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.messages import NO_ID, Mode, OpenDisk
from replicator.errors import PeerError, StateError
from replicator.files import Files
from replicator.images.catalogue import FILE, Catalogue, Entry, GroupEpochs, admit, load, store
from replicator.private_directory import HeldDirectory, PrivateDirectory

A, B = b"a" * 16, b"b" * 16


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldDirectory]:
    with PrivateDirectory(Files(), tmp_path / "retention").held() as held:
        yield held


def wanted(*names: str) -> list[OpenDisk]:
    return [OpenDisk(name, 512) for name in names]


def test_a_new_one_is_empty_and_what_is_stored_comes_back(held: HeldDirectory) -> None:
    assert load(held) == Catalogue()
    _, catalogue = admit(Catalogue(), "one", "web", wanted("system", "data"))
    for mode in Mode:
        full = catalogue.with_epochs(GroupEpochs("web", A, B, 3, mode)).with_epochs(GroupEpochs("db"))
        store(held, full)
        assert load(held) == full


def test_numbers_are_given_once_and_kept(held: HeldDirectory) -> None:
    entries, catalogue = admit(Catalogue(), "one", "web", wanted("system", "data"))
    assert [(entry.number, entry.name) for entry in entries] == [(1, "system"), (2, "data")]
    entries, catalogue = admit(catalogue, "one", "web", wanted("third", "data"))
    assert [(entry.number, entry.name) for entry in entries] == [(3, "third"), (2, "data")]
    entries, catalogue = admit(catalogue, "two", "db", wanted("other"))
    assert (entries, catalogue.next_number) == ([Entry(4, "db", "other", "two")], 5)
    store(held, catalogue)
    assert load(held).next_number == 5


def test_epoch_numbers_only_rise() -> None:
    catalogue = Catalogue().with_epochs(GroupEpochs("web", A, B, 7, Mode.RESYNC))
    assert catalogue.next_epoch == 8
    catalogue = catalogue.with_epochs(GroupEpochs("db", NO_ID, A, 3))
    assert catalogue.next_epoch == 8
    assert catalogue.epochs_of("web") == GroupEpochs("web", A, B, 7, Mode.RESYNC)
    assert catalogue.epochs_of("unknown") == GroupEpochs("unknown")
    assert len(catalogue.with_epochs(GroupEpochs("web")).groups) == 2


@pytest.mark.parametrize(
    ("owner", "group", "names", "code"),
    [
        ("two", "web", ["system"], "group.not_yours"),
        ("two", "web", ["new"], "group.not_yours"),
        ("one", "other", ["system"], "disk.name_taken"),
        ("two", "other", ["new", "system"], "disk.name_taken"),
        ("one", "web", ["new", "new"], "disk.listed_twice"),
    ],
)
def test_what_belongs_to_others_is_refused(owner: str, group: str, names: list[str], code: str) -> None:
    _, catalogue = admit(Catalogue(), "one", "web", wanted("system"))
    with pytest.raises(PeerError) as caught:
        admit(catalogue, owner, group, wanted(*names))
    assert caught.value.code == code


def test_a_damaged_catalogue_is_refused_and_never_taken_for_a_new_one(
    held: HeldDirectory, seed: int, count
) -> None:
    _, catalogue = admit(Catalogue(), "one", "web", wanted("system"))
    catalogue = catalogue.with_epochs(GroupEpochs("web", A, B, 3, Mode.INCREMENTAL))
    store(held, catalogue)
    path, rng = held.path / FILE, random.Random(seed)
    good = path.read_bytes()
    record = json.loads(good)
    damaged = [good[:cut] for cut in range(0, len(good) - 1, 11)]
    changes: tuple[dict[str, object], ...] = (
        {"version": 2},
        {"next_number": "1"},
        {"next_epoch": True},
        {"groups": [1]},
        {"groups": [record["groups"][0] | {"mode": "HALF"}]},
        {"groups": [record["groups"][0] | {"sealed": "aa"}]},
        {"groups": [record["groups"][0] | {"under_way": "x" * 32}]},
        {"disks": [{}]},
        {"more": 1},
    )
    for change in changes:
        damaged.append(json.dumps(record | change).encode())
    for spoilt in damaged:
        path.write_bytes(spoilt)
        with pytest.raises(StateError) as caught:
            load(held)
        assert caught.value.code == "catalogue.damaged"
    for _ in range(count(100, 5_000)):
        content = bytearray(good)
        content[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            assert load(held) != Catalogue()
        except StateError as error:
            assert error.code == "catalogue.damaged"
