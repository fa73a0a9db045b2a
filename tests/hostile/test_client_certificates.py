"""A certificate that names a user opens the service only if its authority made it for a client."""

from datetime import UTC, datetime
from typing import Any, Final

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kms.domain.ids import identity_uri
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal, refusal_of
from tests.fixtures.server import DEPLOYMENT, RunningServer
from tests.hostile.certificates import ACCEPTED, REFUSED, issued

LIST: Final = kpb.ListKeysRequest()


def causes(server: RunningServer) -> list[str]:
    return [line["cause"] for line in server.log() if line["event"] == "client refused"]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_certificate_that_was_not_made_for_a_client_lets_nobody_in(server: RunningServer, kind: str) -> None:
    user, made = server.deployment.new_user(), REFUSED[kind]
    offered = issued(server.deployment.authority, identity_uri(DEPLOYMENT, user), made, now=datetime.now(UTC))
    caller = server.caller_with(offered, user)
    before = len(causes(server))
    found = refusal(caller.keys.ListKeys, LIST)
    if found.code is grpc.StatusCode.UNAVAILABLE:
        # The handshake refused it: TLS looks at the usages that a certificate names.
        assert (found.reason, len(causes(server))) == ("", before)
        return
    assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
    assert found.message == "the client certificate does not name a user who may call"
    assert made.cause in causes(server)[-1]
    stub: Any = health_pb2_grpc.HealthStub(caller.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(), timeout=15)
    assert refusal_of(caught.value).reason == "CREDENTIALS_INVALID"


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_certificate_for_a_client_lets_its_user_in(server: RunningServer, kind: str) -> None:
    user = server.deployment.new_user()
    offered = issued(server.deployment.authority, identity_uri(DEPLOYMENT, user), ACCEPTED[kind], now=datetime.now(UTC))
    assert server.caller_with(offered, user).keys.ListKeys(LIST, timeout=15) == kpb.ListKeysResponse()


def test_the_certificates_of_the_development_authority_are_for_one_purpose_each(server: RunningServer) -> None:
    directory = server.deployment.directory
    client = server.deployment.certificate(identity_uri(DEPLOYMENT, server.deployment.new_user())).certificate
    purposes = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}
    for name, pem in {"client": client, "server": (directory / "server.crt").read_bytes()}.items():
        extensions = x509.load_pem_x509_certificate(pem).extensions
        assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purposes[name]]
        assert extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(False, None)
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
