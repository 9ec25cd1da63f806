"""The server's certificate is its identity: the join string names it, and no other is taken.

There is no authority behind it and no name in it to check, so it works for a server on any
address. The first connection only takes the certificate and compares its hash; every later one
trusts exactly that certificate.
"""

from __future__ import annotations

import hashlib
import socket
import ssl

from splitfrozen.device.patience import Again, Patience
from splitfrozen.errors import RefusedError

CONNECT_S = 10.0


def pinned_context(host: str, port: int, fingerprint: str, patience: Patience) -> ssl.SSLContext:
    """Return a TLS context that accepts one certificate: the one with this fingerprint.

    Args:
        host: name or address of the server.
        port: its TCP port.
        fingerprint: sha256 of the certificate (DER) in hexadecimal.
        patience: for a server that is not there yet.

    Raises:
        RefusedError: the server has another certificate, or no TLS 1.2.
        UnreachableError: patience ended.
    """
    certificate = patience.persist(
        f"connecting to {host} port {port}", lambda: _certificate(host, port)
    )
    found = hashlib.sha256(certificate).hexdigest()
    if found != fingerprint.lower():
        raise RefusedError(
            f"the server at {host} port {port} is not the one of the join string",
            got=f"a certificate with fingerprint {found}",
            allowed=f"fingerprint {fingerprint}",
            remedy="ask for the run's current join string; if it is this one, someone else answers",
        )
    context = _context()
    context.load_verify_locations(cadata=certificate)
    # The pinned certificate ends the chain even where it is not its own issuer.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def tls_refusal(error: BaseException) -> RefusedError | None:
    """Return the refusal that a connection error amounts to; None where a later try may pass."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RefusedError(
                "the server's certificate is not accepted",
                got=cause.verify_message,
                allowed="the certificate that the join string names, within its dates",
                remedy="check this machine's clock; else ask for the run's current join string",
            )
        if isinstance(cause, ssl.SSLError) and cause.reason in (
            "WRONG_VERSION_NUMBER",
            "UNSUPPORTED_PROTOCOL",
            "TLSV1_ALERT_PROTOCOL_VERSION",
        ):
            return RefusedError(
                "the server does not speak TLS 1.2 or newer",
                got=str(cause.reason),
                allowed="TLS 1.2 or 1.3",
                remedy="check host and port of the join string",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    return context


def _certificate(host: str, port: int) -> bytes:
    """The certificate (DER) that the server shows; nothing but the handshake is sent."""
    context = _context()
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            certificate = secure.getpeercert(binary_form=True)
    except OSError as error:
        refusal = tls_refusal(error)
        if refusal is not None:
            raise refusal from error
        raise Again(str(error) or type(error).__name__) from error
    assert certificate is not None, "TLS servers always show a certificate"
    return certificate
