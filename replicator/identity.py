"""What a joined side knows of itself: one folder per authority, below ``identities`` of the state directory.

::

    identities/1f0c…/key.pem        a key that waits for its first certificate; gone once there is one
                     identity.json  the server's id and the addresses it was reached at
                     identity.pem   private key, certificate, authority's certificate

A folder's name begins the authority's pin. Key and certificate are in one file because a renewal changes
both: a crash leaves the old pair or the new. Not here: how they are got (``enrolment.py``). All methods
block.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from cryptography import x509

from replicator import certificates
from replicator.certificates import Credentials, PrivateKey
from replicator.errors import StateError
from replicator.failpoints import reach
from replicator.private_directory import HeldDirectory, PrivateDirectory, decode_record, encode_record

KEY_FILE = "key.pem"
PEM_FILE = "identity.pem"
RECORD_FILE = "identity.json"
ADDRESSES_MAX = 16  # the latest ones; a server has a few names and addresses

_FOLDER = re.compile(r"[0-9a-f]{16}")
_FIELDS = {"version": int, "server": str, "addresses": list}
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """What the authority of an installation made of us.

    Attributes:
        authority: the authority's certificate, DER.
        server: id of the server we joined at; its certificate must be for this id.
        addresses: where it was reached, latest first, as ``HOST:PORT``.
        credentials: our key and certificate.
    """

    authority: bytes
    server: str
    addresses: tuple[str, ...]
    credentials: Credentials

    @property
    def pin(self) -> bytes:
        """SPKI SHA-256 of the authority, 32 bytes."""
        return certificates.spki(certificates.public_key_of(certificates.from_der(self.authority)))

    @property
    def id(self) -> str:
        """Our id in the installation."""
        return certificates.id_of(self.certificate)

    @property
    def certificate(self) -> x509.Certificate:
        """Our certificate, taken apart."""
        return certificates.from_der(self.credentials.certificate)

    @property
    def expires(self) -> datetime:
        """When the certificate ends."""
        return self.certificate.not_valid_after_utc


class Identities:
    """All identities of a state directory.

    Raises, from every method:
        StateError: ``identity.damaged``; ``state.unusable``.
    """

    def __init__(self, state: PrivateDirectory) -> None:
        self._root = state.below("identities")

    def find(self, pin: bytes) -> Identity | None:
        """The identity that the authority with this pin gave us, or None when we have not (wholly) joined."""
        return self._load(_folder(pin)) if _folder(pin) in self._root.names() else None

    def find_by_address(self, address: str) -> Identity | None:
        """The identity for the server at ``HOST:PORT``; of several (it was installed anew), the latest."""
        known = (self._load(name) for name in self._root.names() if _FOLDER.fullmatch(name))
        there = [identity for identity in known if identity and address in identity.addresses]
        return max(there, key=lambda identity: identity.certificate.not_valid_before_utc, default=None)

    def key_for_joining(self, pin: bytes) -> PrivateKey:
        """The key to join with: durable before it is returned, the same until ``store``."""
        with self._root.below(_folder(pin)).held() as held:
            content = held.read(KEY_FILE)
            try:
                key = certificates.new_key() if content is None else certificates.key_from_pem(content)
            except ValueError as error:
                raise _damaged(held, KEY_FILE, error) from None
            held.replace(KEY_FILE, certificates.key_to_pem(key))
        reach("join.key_stored")
        return key

    def store(self, identity: Identity) -> None:
        """Keep an identity, durably; it replaces the one that the same authority gave before."""
        pem = map(ssl.DER_cert_to_PEM_cert, (identity.credentials.certificate, identity.authority))
        with self._root.below(_folder(identity.pin)).held() as held:
            _store_record(held, identity)
            held.replace(PEM_FILE, identity.credentials.key + "".join(pem).encode())
            reach("join.stored")
            held.remove(KEY_FILE)

    def remember(self, identity: Identity, address: str) -> Identity:
        """The identity with another address at which its server was reached, kept durably."""
        if identity.addresses[:1] == (address,):
            return identity
        others = tuple(other for other in identity.addresses if other != address)
        known = replace(identity, addresses=(address, *others)[:ADDRESSES_MAX])
        with self._root.below(_folder(identity.pin)).held() as held:
            _store_record(held, known)
        return known

    def _load(self, folder: str) -> Identity | None:
        with self._root.below(folder).held() as held:
            pem = held.read(PEM_FILE)
            if pem is None:
                return None
            damaged = partial(_damaged, held)
            try:
                server, addresses = _parse_record(held.read(RECORD_FILE) or b"")
            except ValueError as error:
                raise damaged(RECORD_FILE, error) from None
            try:
                credentials, authority = _parse_pem(pem)
                identity = Identity(authority, server, addresses, credentials)
                if _folder(identity.pin) != folder:
                    raise ValueError("it belongs to another authority than its folder's name says")
            except ValueError as error:
                raise damaged(PEM_FILE, error) from None
            return identity


def _folder(pin: bytes) -> str:
    return pin[:8].hex()


def _store_record(held: HeldDirectory, identity: Identity) -> None:
    record = {"version": _VERSION, "server": identity.server, "addresses": list(identity.addresses)}
    held.replace(RECORD_FILE, encode_record(record))


def _parse_record(content: bytes) -> tuple[str, tuple[str, ...]]:
    record = decode_record(content, _FIELDS)
    if record["version"] != _VERSION:
        raise ValueError(f"version {record['version']} is not known")
    certificates.kind_of(record["server"])
    if not all(isinstance(address, str) for address in record["addresses"]):
        raise ValueError("an address is no text")
    return record["server"], tuple(record["addresses"])


def _parse_pem(content: bytes) -> tuple[Credentials, bytes]:
    try:
        found = x509.load_pem_x509_certificates(content)
    except (ValueError, x509.InvalidVersion):  # whose text may quote the private key: it is never passed on
        raise ValueError("its certificates cannot be read") from None
    if len(found) != 2:
        raise ValueError(f"{len(found)} certificates, our own and the authority's are wanted")
    own, authority = map(certificates.to_der, found)
    key = certificates.key_from_pem(content)
    check_credentials(own, key, authority)
    return Credentials(own, certificates.key_to_pem(key)), authority


def check_credentials(own: bytes, key: PrivateKey, authority: bytes) -> str:
    """The id in our own certificate; ``ValueError`` unless it fits our key and is the authority's (DER)."""
    certificate = certificates.from_der(own)
    if certificates.spki(certificates.public_key_of(certificate)) != certificates.spki(key.public_key()):
        raise ValueError("the certificate is not for our key")
    if not certificates.issued_by(certificate, certificates.authority_from_der(authority)):
        raise ValueError("the certificate was not issued by the authority")
    return certificates.id_of(certificate)


def _damaged(held: HeldDirectory, name: str, error: ValueError) -> StateError:
    return StateError(
        "identity.damaged",
        f"{held.path / name} cannot be used: {error}",
        cause="the file was edited, cut short or overwritten, or comes from a newer release",
        fix=f"restore it from a backup; without one, move {held.path} away and join again with a new token",
    )
