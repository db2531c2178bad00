"""The installation's certificate authority: made once, kept in one file, issuing every certificate there is.

Not here: who may have a certificate (``enrolment.py``, ``tokens.py``) and what one looks like
(``certificates.py``). A copy of ``authority.json`` is a copy of the installation's identity, as
secret as it is.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from hashlib import sha256

from cryptography import x509

from replicator import certificates
from replicator.certificates import Credentials, PrivateKey, PublicKey, ServerKind
from replicator.clock import Clock
from replicator.errors import StateError
from replicator.failpoints import reach
from replicator.private_directory import HeldDirectory, PrivateDirectory, decode_record, encode_record

FILE = "authority.json"
_FIELDS = {
    "version": int,
    "installation": str,
    "hash_seed": str,
    "certificate": str,
    "key": str,
    "sha256": str,  # of the rest: another seed or id would look right too, and spoil every log
}
_VERSION = 1


class Authority:
    """An authority in memory. Methods need some 0.1 ms of CPU and touch no file.

    Attributes:
        installation: the installation's id, 32 hex digits.
        hash_seed: u64, the installation's seed for XXH3.
        certificate: DER.
        pin: SHA-256 of its SubjectPublicKeyInfo, 32 bytes: what tokens carry.
    """

    def __init__(
        self, installation: str, hash_seed: int, key: PrivateKey, certificate: x509.Certificate
    ) -> None:
        self.installation = installation
        self.hash_seed = hash_seed
        self.certificate = certificates.to_der(certificate)
        self.pin = certificates.spki(key.public_key())
        self._x509 = certificate
        self._key = key

    @classmethod
    def open(cls, directory: PrivateDirectory, clock: Clock) -> Authority:
        """The authority kept in a directory, made if there is none yet. Blocks.

        All of it is in one file that appears whole: whoever dies before that has used nothing of it, and the
        next one makes another.

        Raises:
            StateError: ``authority.damaged``; ``state.unusable``. Nothing is changed then.
        """
        with directory.held() as held:
            content = held.read(FILE)
            if content is None:
                return _create(held, clock.now())
            try:
                return _load(content)
            except ValueError as error:
                raise _damaged(held, error) from None

    def issue(self, key: PublicKey, server_id: str, now: datetime) -> bytes:
        """A certificate (DER) for a key whose owner has proven to be ``server_id``."""
        return certificates.to_der(certificates.issue(self._x509, self._key, key, server_id, now))

    def own_id(self, kind: ServerKind) -> str:
        """The id of the server that keeps this authority: the same after every start."""
        return f"{kind}-{self.installation}"

    def own_credentials(self, kind: ServerKind, now: datetime) -> Credentials:
        """A fresh key and certificate for that server, made at its start and when ``renewal_due`` says so."""
        key = certificates.new_key()
        return Credentials(self.issue(key.public_key(), self.own_id(kind), now), certificates.key_to_pem(key))

    def has_issued(self, certificate: x509.Certificate) -> bool:
        """Whether a certificate, expired or not, is this authority's."""
        return certificates.issued_by(certificate, self._x509)


def _create(held: HeldDirectory, now: datetime) -> Authority:
    key = certificates.new_key()
    installation = secrets.token_hex(16)
    made = Authority(
        installation,
        secrets.randbits(64),
        key,
        certificates.make_authority_certificate(key, installation, now),
    )
    record = {
        "version": _VERSION,
        "installation": installation,
        "hash_seed": f"{made.hash_seed:016x}",
        "certificate": made.certificate.hex(),
        "key": certificates.key_to_pem(key).decode(),
    }
    record["sha256"] = sha256(encode_record(record)).hexdigest()
    reach("authority.before_store")
    held.replace(FILE, encode_record(record))
    reach("authority.stored")
    return made


def _load(content: bytes) -> Authority:
    record = decode_record(content, _FIELDS)
    if record["version"] != _VERSION:
        raise ValueError(f"version {record['version']} is not known")
    checksum = record.pop("sha256")
    if sha256(encode_record(record)).hexdigest() != checksum:
        raise ValueError("its checksum is wrong")
    key = certificates.key_from_pem(record["key"].encode())
    certificate = certificates.authority_from_der(bytes.fromhex(record["certificate"]))
    if certificates.spki(certificates.public_key_of(certificate)) != certificates.spki(key.public_key()):
        raise ValueError("the key does not fit the certificate")
    return Authority(record["installation"], int(record["hash_seed"], 16), key, certificate)


def _damaged(held: HeldDirectory, error: ValueError) -> StateError:
    return StateError(
        "authority.damaged",
        f"{held.path / FILE} cannot be used: {error}",
        cause="the file was edited, cut short or overwritten, or comes from a newer release",
        fix="restore it from a backup; without one, move it away, start again and let every server join anew "
        "with a fresh token",
    )
