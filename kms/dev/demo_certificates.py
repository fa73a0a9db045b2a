"""The part of the demonstration about certificates: an authority in the token, a server, a revocation, judged by openssl."""

import json
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection, create_server
from threading import Thread
from typing import Final

from kms.dev.demo_report import Report
from kms.dev.second_opinion import has_openssl, openssl
from kms.dev.stack import Stack

_HOST: Final = "shop.example"
_SECONDS: Final = 20.0


def certify(stack: Stack, report: Report) -> None:
    """Make an authority, certify a server, connect to it, revoke its certificate, and ask whether it is revoked."""
    report.heading("Certificates (kms ca, kms cert): an authority whose key never leaves the token, judged by openssl")
    if not has_openssl():
        report.line("  left out: there is no openssl program of version 3")
        return
    here, url = stack.files.directory / "certificates", f"http://{stack.publishes_on}"
    here.mkdir()
    certificate_id = _issue(stack, here, url)
    is_verified = openssl("verify", "-x509_strict", "-CAfile", "root.pem", "shop.pem", directory=here).returncode == 0
    report.check(is_verified, f"{_HOST}  has a certificate of the authority: verified")
    report.check(_is_served(here), f"{_HOST}  serves TLS with it: a client that trusts the authority accepts it")
    report.check(_status(here, url) == "good", f"{_HOST}  OCSP says: good")
    stack.kms("cert", "revoke", certificate_id, "--reason", "key-compromise", config=here / "issuer/client.toml")
    report.check(not _is_verified_by_crl(here, url), f"{_HOST}  revoked: it is on the CRL, and verified no more")
    report.check(_status(here, url) == "revoked", f"{_HOST}  OCSP says: revoked")


def _issue(stack: Stack, here: Path, url: str) -> str:
    """Make the authority, and a certificate for the key of the server. Return the id of the certificate.

    Whoever manages an authority does not issue from it, so there are two users.
    """
    for name, role in (("manager", "key-manager"), ("issuer", "certificate-issuer")):
        made = stack.kms("user", "add-service", f"demo-{name}", "--role", role, "--out", str(here / name), "--json")
        user_id = json.loads(made)["id"]
    manager, issuer = (here / name / "client.toml" for name in ("manager", "issuer"))
    stack.kms("ca", "create", "demo", "--subject", "CN=Demonstration Root", "--base-url", url, config=manager)
    stack.kms("ca", "export", "demo", "--out", str(here / "root.pem"), config=manager)
    stack.kms("ca", "allow", "demo", user_id, "server", config=manager)
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "shop.key")
    openssl("req", "-new", *key, "-subj", "/", "-out", "shop.csr", directory=here)
    wish = ("--profile", "server", "--csr", str(here / "shop.csr"), "--name", f"dns:{_HOST}")
    issued = json.loads(stack.kms("cert", "issue", "demo", *wish, "--json", config=issuer))
    (here / "shop.pem").write_text(issued["certificate_pem"])
    return str(issued["id"])


def _is_served(here: Path) -> bool:
    """Whether a client that trusts the authority alone connects to a server that has the certificate."""
    context = ssl.create_default_context(cafile=here / "root.pem")
    with _tls_server(here) as port, create_connection(("127.0.0.1", port), timeout=_SECONDS) as connection:
        try:
            with context.wrap_socket(connection, server_hostname=_HOST) as wrapped:
                return wrapped.version() is not None
        except ssl.SSLError:
            return False


@contextmanager
def _tls_server(here: Path) -> Iterator[int]:
    """Take one connection, with the certificate and its key; yield the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(here / "shop.pem", here / "shop.key")
    with create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_SECONDS)

        def serve() -> None:
            try:
                with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                    connection.recv(1)
            except OSError:
                pass  # the client says what went wrong

        thread = Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            thread.join()


def _is_verified_by_crl(here: Path, url: str) -> bool:
    """Whether openssl verifies the certificate with the CRL that is published."""
    with urllib.request.urlopen(f"{url}/crl/demo/1.crl", timeout=_SECONDS) as answer:  # noqa: S310  # our own server
        (here / "demo.crl").write_bytes(answer.read())
    openssl("crl", "-inform", "DER", "-in", "demo.crl", "-out", "demo.crl.pem", directory=here)
    options = ("-crl_check", "-CAfile", "root.pem", "-CRLfile", "demo.crl.pem")
    return openssl("verify", *options, "shop.pem", directory=here).returncode == 0


def _status(here: Path, url: str) -> str:
    """Return what the OCSP responder says of the certificate: good, revoked or unknown."""
    question = ("-issuer", "root.pem", "-cert", "shop.pem", "-url", f"{url}/ocsp/demo/1", "-CAfile", "root.pem")
    answered = openssl("ocsp", *question, directory=here)
    first = answered.stdout.decode().partition("\n")[0]
    return first.removeprefix("shop.pem: ") if b"Response verify OK" in answered.stderr else "not verified"
