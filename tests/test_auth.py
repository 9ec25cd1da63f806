"""The server's identity: made once, kept, readable by its owner only, accepted by real TLS."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from splitfrozen.errors import StoreError
from splitfrozen.server.auth import digest, fingerprint, identity, matches, new_token

NAMES = ["server.example", "192.0.2.7", "::1", "localhost"]


def test_a_certificate_names_hosts_and_addresses(tmp_path: Path) -> None:
    made = identity(tmp_path / "tls", NAMES)
    loaded = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "::1"]
    years = (loaded.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days / 365
    assert 9.8 < years < 10


def test_the_key_is_private_and_both_load_into_tls(tmp_path: Path) -> None:
    made = identity(tmp_path, ["localhost"])
    assert made.key.stat().st_mode & 0o777 == 0o600
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    der = ssl.PEM_cert_to_DER_cert(made.certificate.read_text())
    assert made.fingerprint == fingerprint(der)
    assert len(made.fingerprint) == 64


def test_it_stays_the_same_also_under_other_names(tmp_path: Path) -> None:
    first = identity(tmp_path, ["localhost"])
    first.key.chmod(0o644)
    assert identity(tmp_path, ["elsewhere"]) == first
    assert first.key.stat().st_mode & 0o777 == 0o600
    assert identity(tmp_path / "other", ["localhost"]).fingerprint != first.fingerprint


def test_a_key_without_certificate_is_made_anew(tmp_path: Path) -> None:
    first = identity(tmp_path, ["localhost"])
    first.certificate.unlink()
    assert identity(tmp_path, ["localhost"]).fingerprint != first.fingerprint


@pytest.mark.parametrize("which", ["cert.pem", "key.pem"])
def test_a_damaged_file_is_an_error_with_a_remedy(tmp_path: Path, which: str) -> None:
    identity(tmp_path, ["localhost"])
    (tmp_path / which).write_text("-----BEGIN NOTHING-----")
    with pytest.raises(StoreError, match="give devices their join strings again"):
        identity(tmp_path, ["localhost"])


def test_a_strange_key_is_an_error(tmp_path: Path) -> None:
    identity(tmp_path / "a", ["localhost"])
    identity(tmp_path / "b", ["localhost"])
    (tmp_path / "a/key.pem").write_bytes((tmp_path / "b/key.pem").read_bytes())
    with pytest.raises(StoreError, match="not the certificate's"):
        identity(tmp_path / "a", ["localhost"])


def test_an_old_certificate_is_an_error(tmp_path: Path) -> None:
    identity(tmp_path, ["localhost"])
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3700)
    with pytest.raises(StoreError, match="ended"):
        identity(tmp_path, ["localhost"], now=lambda: later)


def test_tokens_and_digests() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 32
    kept = digest("secret")
    assert "secret" not in kept
    assert matches("secret", kept)
    assert not matches("Secret", kept)
    assert not matches("\udc80", kept)
