"""AdminService: how the service is, for everybody in short and for auditors in detail, and what its HSM can do."""

import json
from datetime import UTC, datetime, timedelta

from kms import __version__
from kms.v1 import admin_pb2 as pb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.requests import KEY_TYPES, create, made
from tests.fixtures.server import DEPLOYMENT, Caller, RunningServer


def test_every_user_learns_whether_the_service_is_ready_and_no_detail(caller: Caller) -> None:
    status = caller.admin.GetStatus(pb.GetStatusRequest())
    assert (status.version, status.deployment_id, status.mode) == (__version__, DEPLOYMENT, "development")
    assert status.ready
    assert not status.faults
    assert abs(status.server_time.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(seconds=10)
    assert not status.HasField("detail")


def test_an_auditor_sees_what_the_process_has_done(caller: Caller, server: RunningServer) -> None:
    auditor = server.auditor()
    before = auditor.admin.GetStatus(pb.GetStatusRequest()).detail
    made(caller, "ed25519")
    for _ in range(4):
        caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m"))
    after = auditor.admin.GetStatus(pb.GetStatusRequest()).detail
    assert after.token_label == server.deployment.token.label
    assert after.ledger_charges - before.ledger_charges == 4
    assert 1 <= after.ledger_batches - before.ledger_batches <= 4
    assert after.hsm_handles >= 1
    assert after.hsm_sessions >= 3
    assert 0 < after.handle_hit_ratio < 1
    assert not after.HasField("disk_free_ratio")


def test_the_capabilities_are_those_that_keys_are_made_with(caller: Caller) -> None:
    found = caller.admin.GetHsmCapabilities(pb.GetHsmCapabilitiesRequest())
    by_pair = {(key.type, key.purpose): key for key in found.keys}
    assert set(by_pair) == set(KEY_TYPES.values())
    for kind, pair in KEY_TYPES.items():
        key = caller.keys.CreateKey(create(kind, name=kind)).key
        assert key.custody == next(one for one in reversed(by_pair[pair].custodies) if one != kpb.CUSTODY_RESIDENT)
    assert list(by_pair[KEY_TYPES["secp256k1"]].mechanisms) == ["CKM_ECDSA"]
    assert list(by_pair[KEY_TYPES["rsa"]].mechanisms) == ["CKM_RSA_PKCS", "CKM_RSA_PKCS_PSS"]
    assert list(by_pair[KEY_TYPES["aes"]].mechanisms) == ["CKM_AES_GCM"]
    assert found.sealed_allowed


def test_the_command_prints_it_and_ends_well_when_ready(server: RunningServer) -> None:
    config = str(server.client_config("operator"))
    done = server.deployment.run("--config", config, "status", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ready"] is True
    assert told["version"] == __version__
    assert "detail" not in told
    done = server.deployment.run("--config", config, "status")
    assert done.stdout.splitlines()[0].split() == ["ready", "yes"]
