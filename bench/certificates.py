"""Certificates for the peers: one authority, a server's and a client's, in the layouts that they want.

Replicator brings its own; nothing of this is used by it. GnuTLS tools (nbdkit, nbdcopy, qemu) take a folder
with fixed names, socat and stunnel take paths.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY, SERVER, SERVER_KEY = "ca-cert.pem", "server-cert.pem", "server-key.pem"
CLIENT, CLIENT_KEY = "client-cert.pem", "client-key.pem"
LIFE = timedelta(days=2)


def make(folder: Path, address: str) -> Path:
    """An authority, and certificates for a server at ``address`` and a client, in a new folder."""
    folder.mkdir(mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    authority = _signed("bench authority", key, None, key, [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_usage(signs=True), True),
    ])  # fmt: skip
    _store(folder / AUTHORITY, authority.public_bytes(serialization.Encoding.PEM))
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address(address))])
    for use, certificate, key_file in (
        (ExtendedKeyUsageOID.SERVER_AUTH, SERVER, SERVER_KEY),
        (ExtendedKeyUsageOID.CLIENT_AUTH, CLIENT, CLIENT_KEY),
    ):
        own = ec.generate_private_key(ec.SECP256R1())
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(signs=False), True),
            (x509.ExtendedKeyUsage([use]), False),
            (names, False),
        ]
        issued = _signed(address, own, authority.subject, key, extensions)
        _store(folder / certificate, issued.public_bytes(serialization.Encoding.PEM))
        _store(folder / key_file, own.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ))  # fmt: skip
    return folder


def _signed(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name | None,
    signing: ec.EllipticCurvePrivateKey,
    extensions: list[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + LIFE)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signing, hashes.SHA256())


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _store(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
