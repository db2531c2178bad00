"""The authority is made once, survives every way to die, and says so when it is damaged."""

import json
import os
import random
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from replicator import certificates
from replicator.authority import FILE, Authority
from replicator.certificates import ServerKind
from replicator.clock import Clock
from replicator.errors import StateError
from replicator.files import Files
from replicator.private_directory import PrivateDirectory
from tests.replicator.trust import ROOT, SetClock, mode_of, refused

OPEN = (
    "import sys, pathlib\n"
    "from replicator.authority import Authority\n"
    "from replicator.clock import Clock\n"
    "from replicator.files import Files\n"
    "from replicator.private_directory import PrivateDirectory\n"
    "print(Authority.open(PrivateDirectory(Files(), pathlib.Path(sys.argv[1])), Clock()).pin.hex())\n"
)


def opened(path: Path) -> Authority:
    return Authority.open(PrivateDirectory(Files(), path), Clock())


def child(path: Path, failpoint: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "FAILPOINT": failpoint}
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, str(path)], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_it_is_made_once_and_found_again(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    for name in ("installation", "hash_seed", "certificate", "pin"):
        assert getattr(first, name) == getattr(second, name)
    assert opened(tmp_path / "another").pin != first.pin
    issued = second.issue(
        certificates.new_key().public_key(), certificates.new_id(ServerKind.MASTER_TARGET), Clock().now()
    )
    assert first.has_issued(x509.load_der_x509_certificate(issued))


def test_its_file_is_for_its_owner_only(tmp_path: Path) -> None:
    opened(tmp_path / "new")
    assert mode_of(tmp_path / "new" / FILE) == 0o600
    assert mode_of(tmp_path / "new") == 0o700


def test_its_pin_is_what_openssl_says(tmp_path: Path) -> None:
    authority = opened(tmp_path)
    public = certificates.public_key_of(x509.load_der_x509_certificate(authority.certificate))
    assert authority.pin == certificates.spki(public)
    out = subprocess.run(
        [
            "sh",
            "-c",
            "openssl x509 -inform der -noout -pubkey | openssl pkey -pubin -outform der | sha256sum",
        ],
        input=authority.certificate,
        capture_output=True,
        check=True,
    ).stdout
    assert out.split()[0].decode() == authority.pin.hex()


@pytest.mark.parametrize(
    ("failpoint", "kept"),
    [
        ("authority.before_store", False),
        ("replace.before_write", False),
        ("replace.before_fsync", False),
        ("replace.before_rename", False),
        ("replace.before_fsync_dir", True),
        ("replace.done", True),
        ("authority.stored", True),
    ],
)
def test_killed_while_it_is_made_there_is_one_authority_afterwards(
    tmp_path: Path, failpoint: str, kept: bool
) -> None:
    process = child(tmp_path, failpoint)
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert out == ""  # nobody has heard of what was lost
    assert (tmp_path / FILE).exists() is kept
    left = (tmp_path / FILE).read_bytes() if kept else None
    first = opened(tmp_path)
    assert left in (None, (tmp_path / FILE).read_bytes())
    assert opened(tmp_path).certificate == first.certificate


def test_processes_that_start_together_agree_on_one(tmp_path: Path) -> None:
    processes = [child(tmp_path) for _ in range(4)]
    pins = {process.communicate()[0] for process in processes}
    assert pins == {opened(tmp_path).pin.hex() + "\n"}


def test_its_own_server_has_the_same_id_and_a_fresh_key_after_every_start(tmp_path: Path) -> None:
    clock = SetClock()
    one = opened(tmp_path).own_credentials(ServerKind.MASTER_TARGET, clock.now())
    clock.advance(timedelta(days=5))
    two = opened(tmp_path).own_credentials(ServerKind.MASTER_TARGET, clock.now())
    first, second = (x509.load_der_x509_certificate(found.certificate) for found in (one, two))
    assert (
        certificates.id_of(first)
        == certificates.id_of(second)
        == opened(tmp_path).own_id(ServerKind.MASTER_TARGET)
    )
    assert one.key != two.key
    assert second.not_valid_after_utc - first.not_valid_after_utc == timedelta(days=5)


def _damage(path: Path, **fields: object) -> None:
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2},
        {"more": 1},
        {"hash_seed": "0123456789abcdef"},
        {"installation": "0" * 32},
        {"key": "-----BEGIN PRIVATE KEY-----"},
        {"certificate": "00"},
        {"sha256": "0" * 64},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_changed_field_is_damage_and_the_file_is_left_alone(tmp_path: Path, fields) -> None:
    opened(tmp_path)
    _damage(tmp_path / FILE, **fields)
    left = (tmp_path / FILE).read_bytes()
    with refused("authority.damaged") as caught:
        opened(tmp_path)
    assert isinstance(caught.value, StateError)
    assert (tmp_path / FILE).read_bytes() == left


def test_another_key_in_an_otherwise_whole_file_is_damage(tmp_path: Path) -> None:
    from hashlib import sha256

    from replicator.private_directory import encode_record

    opened(tmp_path)
    record = json.loads((tmp_path / FILE).read_bytes())
    record["key"] = certificates.key_to_pem(certificates.new_key()).decode()
    del record["sha256"]
    record["sha256"] = sha256(encode_record(record)).hexdigest()
    (tmp_path / FILE).write_bytes(encode_record(record))
    with refused("authority.damaged") as caught:
        opened(tmp_path)
    assert "does not fit" in caught.value.message


def test_no_flipped_bit_or_cut_gives_another_authority(tmp_path: Path, count, seed) -> None:
    rng = random.Random(seed)
    true = opened(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    secret = json.loads(whole)["key"].splitlines()[1]
    for number in range(count(300, 20_000)):
        changed = bytearray(whole)
        if number % 10:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        else:
            del changed[rng.randrange(len(changed) - 1) :]
        (tmp_path / FILE).write_bytes(changed)
        try:
            found = opened(tmp_path)
        except StateError as error:
            assert error.code == "authority.damaged"
            assert secret not in str(error)
        else:  # white space
            assert (found.pin, found.hash_seed, found.installation, found.certificate) == (
                true.pin,
                true.hash_seed,
                true.installation,
                true.certificate,
            )


def test_a_file_that_cannot_be_written_stops_it(tmp_path: Path) -> None:
    (tmp_path / f".{FILE}.new").mkdir()
    with refused("state.unusable"):
        opened(tmp_path)
