"""Who is who: the server's certificate, join tokens and the devices' secrets.

The server signs its own certificate; a join string carries the certificate's fingerprint, so a
device needs no certificate authority. Tokens and secrets are long random strings, so one SHA-256
of them is enough: there is nothing to guess.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from splitfrozen.disk import write_whole
from splitfrozen.errors import RefusedError, StoreError

LIFETIME = datetime.timedelta(days=3640)
SKEW = datetime.timedelta(days=2)
"""Clocks of devices are wrong; the certificate is valid from so long ago."""


class UnknownCredentialError(RefusedError):
    """No credential, or one that this run does not know."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the server shows to devices.

    Attributes:
        certificate: PEM file.
        key: PEM file, readable by its owner only.
        fingerprint: SHA-256 of the DER certificate, hexadecimal.
    """

    certificate: Path
    key: Path
    fingerprint: str


def identity(
    folder: Path,
    names: Sequence[str],
    now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
) -> Identity:
    """Load the certificate and key in `folder`, or make them.

    An existing certificate stays whatever `names` are, as devices know it by its fingerprint.

    Args:
        folder: where `cert.pem` and `key.pem` are; made if missing.
        names: host names and IP addresses that devices may use.
        now: the clock.

    Raises:
        StoreError: the files there are damaged, or the certificate is out of date.
    """
    certificate, key = folder / "cert.pem", folder / "key.pem"
    if not (certificate.exists() and key.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        _make(certificate, key, names, now())
    try:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
        matching = private.public_key() == loaded.public_key()
    except (ValueError, TypeError, OSError) as error:
        raise _unusable(folder, str(error)) from error
    if not matching:
        raise _unusable(folder, "a key that is not the certificate's")
    if now() > loaded.not_valid_after_utc:
        raise _unusable(folder, f"a certificate that ended {loaded.not_valid_after_utc:%Y-%m-%d}")
    key.chmod(0o600)
    der = loaded.public_bytes(serialization.Encoding.DER)
    return Identity(certificate, key, fingerprint(der))


def fingerprint(der: bytes) -> str:
    """SHA-256 of a DER certificate, hexadecimal."""
    return hashlib.sha256(der).hexdigest()


def new_token() -> str:
    """A token for one enrolment."""
    return secrets.token_urlsafe(24)


def digest(secret: str) -> str:
    """What is kept of a token or secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def bearer(header: str) -> str:
    """The secret in an Authorization header. Raises UnknownCredentialError where it has none."""
    scheme, _, secret = header.partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise UnknownCredentialError(
            "the request has no credential",
            got="no bearer token",
            allowed="Authorization: Bearer SECRET",
            remedy="enrol first: splitfrozen join",
        )
    return secret


def matches(secret: str, kept: str) -> bool:
    """Whether `kept` is the digest of `secret`, in constant time."""
    return hmac.compare_digest(digest(secret), kept)


def _make(certificate: Path, key: Path, names: Sequence[str], now: datetime.datetime) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "splitfrozen")])
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now - SKEW + LIFETIME)
        .add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    # The certificate comes last: without it the next start makes both anew.
    certificate.unlink(missing_ok=True)
    write_whole(
        key,
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        mode=0o600,
    )
    write_whole(certificate, made.public_bytes(serialization.Encoding.PEM))


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name.encode("idna").decode("ascii"))


def _unusable(folder: Path, got: str) -> StoreError:
    return StoreError(
        f"the certificate in {folder} cannot be used",
        got=got,
        allowed="the cert.pem and key.pem that `serve` made",
        remedy=f"delete {folder} and give devices their join strings again",
    )
