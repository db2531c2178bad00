"""X.509 as this product uses it: what is issued to whom, what is checked before one is believed.

Pure: bytes and key objects in, the same out; the time is an argument. Not here: where keys are kept
(``authority.py``, ``identity.py``), how they get to TLS (``transport/tls.py``), who may ask
(``enrolment.py``). Certificates are DER and private keys PKCS#8 PEM wherever they are bytes.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from replicator.errors import TrustError

SUFFIX = (
    ".replicator.internal"  # .internal is reserved by ICANN for private use: it never resolves in public DNS
)
BACKDATED = timedelta(minutes=10)  # clocks of two sites that differ by a few minutes must not stop a join
AUTHORITY_LIFE = timedelta(days=3652)
IDENTITY_LIFE = timedelta(days=7)
RSA_MAX_BITS = 4096  # what fits a JOIN; larger keys only cost time to check
RENEW_AFTER = 2 / 3  # of the life: at 7 days that leaves more than two for a site that is cut off
RENEW_SPREAD = 1 / 12  # of the life, so that servers installed together do not come back together

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


class ServerKind(StrEnum):
    """What a server is; the prefix of its id. It decides what its certificate is good for."""

    PROCESS_SERVER = "ps"
    MASTER_TARGET = "mt"
    CONTROL_SERVER = "cs"


_ID = re.compile(rf"({'|'.join(ServerKind)})-[0-9a-f]{{32}}")
_SHOWS_ITSELF_AS = {
    # Without serverAuth, TLS refuses it as a server: a stolen process server cannot pose as a target.
    ServerKind.PROCESS_SERVER: [ExtendedKeyUsageOID.CLIENT_AUTH],
    ServerKind.MASTER_TARGET: [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
    ServerKind.CONTROL_SERVER: [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a server shows of itself: its certificate (DER) and the private key that fits it (PEM)."""

    certificate: bytes
    key: bytes = field(repr=False)


# ------------------------------------------------------------------ keys


def new_key() -> PrivateKey:
    """A fresh ECDSA P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: PrivateKey) -> bytes:
    """A private key as unencrypted PKCS#8 PEM; what keeps it must be of mode 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(pem: bytes) -> PrivateKey:
    """The private key in ``pem``; ``ValueError`` (which never quotes it) if there is no EC key in it."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("no readable private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic-curve key")
    return key


def spki(key: PublicKey) -> bytes:
    """SHA-256, 32 bytes, of a public key's SubjectPublicKeyInfo: its name in pins and bindings."""
    return sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def sign(key: PrivateKey, statement: bytes) -> bytes:
    """A DER-encoded ECDSA signature with SHA-256 over ``statement``."""
    return key.sign(statement, ec.ECDSA(hashes.SHA256()))


def signature_fits(key: PublicKey, signature: bytes, statement: bytes) -> bool:
    """Whether ``key`` signed ``statement``: ECDSA or RSA-PSS with SHA-256, or Ed25519."""
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, statement)
        else:
            key.verify(signature, statement, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def public_key_of(holder: x509.Certificate | x509.CertificateSigningRequest) -> PublicKey:
    """The public key in a certificate or request; ``ValueError`` if it is of a kind that we do not accept."""
    try:
        key = holder.public_key()
    except UnsupportedAlgorithm:
        raise ValueError("its key is of an unknown kind") from None
    match key:
        case ec.EllipticCurvePublicKey():
            if isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
                return key
            raise ValueError(f"its key is on the curve {key.curve.name}")
        case ed25519.Ed25519PublicKey():
            return key
        case rsa.RSAPublicKey():
            if 2048 <= key.key_size <= RSA_MAX_BITS:
                return key
            raise ValueError(f"its RSA key has {key.key_size} bits")
        case _:
            raise ValueError("its key is of another kind than ours")


# ------------------------------------------------------------------ ids


def new_id(kind: ServerKind) -> str:
    """A fresh id: the kind's prefix and 16 random bytes in hex."""
    return f"{kind}-{secrets.token_hex(16)}"


def kind_of(server_id: str) -> ServerKind:
    """The kind that an id names; ``ValueError`` if it is no id of ours."""
    found = _ID.fullmatch(server_id)
    if found is None:
        raise ValueError("not an id: ps-, mt- or cs- and 32 hex digits are wanted")
    return ServerKind(found[1])


def host_name(server_id: str) -> str:
    """The DNS name that stands for an id in certificates: what TLS compares as the server's name."""
    return server_id + SUFFIX


def id_of(certificate: x509.Certificate) -> str:
    """The id in a certificate; ``ValueError`` unless its one alternative name is an id's host name."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise ValueError("no alternative names") from None
    found = names.get_values_for_type(x509.DNSName)
    if len(found) != 1 or len(list(names)) != 1 or not found[0].endswith(SUFFIX):
        raise ValueError(f"not exactly one name that ends in {SUFFIX}")
    server_id = found[0].removesuffix(SUFFIX)
    kind_of(server_id)
    return server_id


# ------------------------------------------------------------------ certificates


def make_authority_certificate(key: PrivateKey, installation: str, now: datetime) -> x509.Certificate:
    """The self-signed certificate of an installation's authority; it signs no other authorities."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Replicator installation {installation}")])
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(own, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
        .sign(key, hashes.SHA256())
    )


def issue(
    authority: x509.Certificate, authority_key: PrivateKey, key: PublicKey, server_id: str, now: datetime
) -> x509.Certificate:
    """A server's certificate: its id as the only name, good for 7 days and for what its kind does."""
    issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, server_id)]))
        .issuer_name(authority.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + IDENTITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_SHOWS_ITSELF_AS[kind_of(server_id)]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host_name(server_id))]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def to_der(certificate: x509.Certificate) -> bytes:
    """A certificate as DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def from_der(der: bytes) -> x509.Certificate:
    """A certificate from DER; ``ValueError`` if it is none or its key is of a kind that we do not use."""
    try:
        certificate = x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion):
        raise ValueError("it cannot be read as a certificate") from None
    public_key_of(certificate)
    return certificate


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` signed ``certificate``. Its dates are not looked at."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def authority_from_der(der: bytes) -> x509.Certificate:
    """An authority's certificate from DER; ``ValueError`` unless it is one and signed by its own key.

    A TLS library takes a trust anchor as it is; the signature is what ties the rest of it to the pinned key.
    """
    certificate = from_der(der)
    try:
        limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension):
        raise ValueError("no basic constraints") from None
    if not limits.ca or not issued_by(certificate, certificate):
        raise ValueError("not the certificate of an authority, signed by itself")
    return certificate


def renewal_due(certificate: x509.Certificate, jitter: float) -> datetime:
    """When a certificate is to be renewed: after 2/3 to 3/4 of its life, as ``jitter`` in [0, 1) has it."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begins + (ends - begins) * (RENEW_AFTER + RENEW_SPREAD * jitter)


# ------------------------------------------------------------------ requests


def make_request(key: PrivateKey) -> bytes:
    """A signing request (PKCS #10, DER) for ``key``. It names nobody: the authority assigns the id."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def requested_key(request_der: bytes) -> PublicKey:
    """The public key of a request, proven to be the asker's. The names in it are not looked at.

    Raises:
        TrustError: ``join.request_refused``: malformed, an unacceptable key, or not signed by that key.
    """
    try:
        request = x509.load_der_x509_csr(request_der)
    except (ValueError, x509.InvalidVersion):
        raise _request_refused("it cannot be read") from None
    try:
        key = public_key_of(request)
        if not request.is_signature_valid:
            raise ValueError("its own key did not sign it")
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise _request_refused(str(error)) from None
    return key


def _request_refused(reason: str) -> TrustError:
    return TrustError(
        "join.request_refused",
        f"the certificate request is refused: {reason}",
        cause="the request was damaged or made by other software; accepted are keys on P-256, P-384, Ed25519 "
        f"and RSA of 2048 to {RSA_MAX_BITS} bits, each request signed by its own key",
        fix="ask again with a release of this product that the server knows",
    )
