"""Seen from outside: what Prometheus reads agrees with the calls that were made."""

import json
import re
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from kms.v1 import crypto_pb2 as cpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import create, made
from tests.conformance.test_outages import soon
from tests.fixtures.server import Caller, Deployment, RunningServer

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def value(samples: Samples, name: str, /, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


class Since:
    """What was added to the samples of a server since a moment."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._before = server.metrics()
        self._after: Samples = {}

    def read(self) -> None:
        self._after = self._server.metrics()

    def added(self, name: str, **labels: str) -> float:
        return value(self._after, name, **labels) - value(self._before, name, **labels)


def test_every_call_is_counted_by_its_method_and_code(caller: Caller, server: RunningServer) -> None:
    made(caller, "ed25519")
    since = Since(server)
    for _ in range(7):
        caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m"))
    for _ in range(3):
        assert refusal(caller.crypto.Sign, cpb.SignRequest(key="other", message=b"m")).reason == "KEY_NOT_FOUND"
    caller.crypto.Verify(cpb.VerifyRequest(key="k", message=b"m", signature=bytes(64)))
    with suppress(grpc.RpcError):
        caller.keys.CreateKey(create("rsa", name="late", size_bits=4096), timeout=0.05)
    since.read()
    sign = {"method": "CryptoService/Sign"}
    assert since.added("kms_calls_total", **sign, code="OK") == 7
    assert since.added("kms_calls_total", **sign, code="NOT_FOUND") == 3
    assert since.added("kms_call_seconds_count", **sign) == 10
    assert since.added("kms_calls_total", method="CryptoService/Verify", code="OK") == 1
    create_key, deadline, late = {"method": "KeyService/CreateKey"}, time.monotonic() + 5, 0.0
    while not late and time.monotonic() < deadline:  # the client has given up before the server knows
        since.read()
        late = sum(since.added("kms_calls_total", **create_key, code=code) for code in ("DEADLINE_EXCEEDED", "CANCELLED"))
    assert late == 1


def test_uses_commits_and_operations_of_the_token_are_counted(caller: Caller, server: RunningServer) -> None:
    made(caller, "aes")
    since = Since(server)
    sealed = [caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"p")).ciphertext for _ in range(5)]
    caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=sealed[0]))
    items = [cpb.EncryptRequest(key="k", plaintext=b"p")] * 20
    caller.crypto.BatchEncrypt(cpb.BatchEncryptRequest(items=items))
    since.read()
    assert since.added("kms_ledger_entries_total") == 26
    assert since.added("kms_ledger_charges_total") == 25
    assert since.added("kms_ledger_batch_entries_sum") == 26
    commits = since.added("kms_ledger_commit_seconds_count")
    assert 7 <= commits == since.added("kms_ledger_batch_entries_count") < 26
    assert since.added("kms_hsm_seconds_count", operation="encrypt") == 25
    assert since.added("kms_hsm_seconds_count", operation="decrypt") == 1
    found = [since.added("kms_cache_lookups_total", cache="users", outcome=outcome) for outcome in ("hit", "miss")]
    assert sum(found) >= 7
    assert found[1] <= since.added("kms_store_seconds_count", operation="users.find") <= 2
    assert since.added("kms_store_seconds_count", operation="ledger.settle") == 26
    hits, misses = (since.added("kms_cache_lookups_total", cache="handles", outcome=outcome) for outcome in ("hit", "miss"))
    signed = since.added("kms_hsm_seconds_count", operation="sign")  # by the sealer; one may be under way when it is read
    assert abs(hits + misses - 26 - signed) <= 1
    assert 1 <= misses <= 4


def test_what_is_there_now_is_told(caller: Caller, server: RunningServer) -> None:
    made(caller, "ed25519")
    caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m"))
    samples = server.metrics()
    assert value(samples, "kms_ready") == 1
    assert value(samples, "kms_hsm_available") == 1
    assert value(samples, "kms_hsm_sessions") >= 3
    assert value(samples, "kms_hsm_handles") >= 1
    assert value(samples, "kms_ledger_waiting") == 0
    assert value(samples, "process_resident_memory_bytes") > 1e6


def test_each_job_says_when_it_last_succeeded_and_how_often_it_failed(caller: Caller, server: RunningServer) -> None:
    made(caller, "ed25519")
    samples = server.metrics()
    names = {dict(labels)["name"] for name, labels in samples if name == "kms_job_failures_total"}
    upkeep = {
        "partitions",
        "destruction",
        "repeats",
        "condition",
        "disk",
        "database",
        "residents",
        "checkpoints",
        "rotations",
        "rotation policies",
        "master_keys",
        "rewrapping",
        "certificates",
        "crls",
        "ocsp",
        "acme",
        "trust",
    }
    assert names == {*upkeep, "health", "connections", "pulse"}
    assert {dict(labels)["name"] for name, labels in samples if name == "kms_job_success_age_seconds"} == names
    assert sum(number for (name, _), number in samples.items() if name == "kms_job_failures_total") == 0
    assert value(samples, "kms_job_success_age_seconds", name="database") < 30


def test_the_documented_metrics_are_those_that_are_exposed(caller: Caller, server: RunningServer) -> None:
    made(caller, "ed25519")
    caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m"))
    soon(lambda: "kms_trail_checkpoint_age_seconds" in server.seen("/metrics")[1])  # not before there is a checkpoint
    told = re.findall(r"^# TYPE (kms_\w+) (\w+)", server.seen("/metrics")[1], re.MULTILINE)
    exposed = {name for name, _ in told if not name.endswith("_created")}
    operations = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    table = operations.partition("| metric | labels | meaning |")[2].partition("\n\n")[0]
    # One is there with a disk that is watched, one with several workers.
    assert set(re.findall(r"`(kms_\w+)`", table)) - {"kms_disk_free_ratio", "kms_workers"} == exposed


def test_no_name_message_or_user_is_in_the_metrics(caller: Caller, server: RunningServer) -> None:
    made(caller, "ed25519", name="very-private-name")
    caller.crypto.Sign(cpb.SignRequest(key="very-private-name", message=b"very private message"))
    text = server.seen("/metrics")[1]
    for hidden in ("very", "private", str(caller.user_id)):
        assert hidden not in text


def test_the_paths_answer_and_others_do_not(server: RunningServer) -> None:
    assert server.seen("/livez") == (200, "alive\n")
    assert server.seen("/readyz")[0] == 200
    assert server.seen("/readyz")[1].startswith("ready\n")
    assert server.seen("/")[0] == 404


def test_readiness_follows_the_token_and_liveness_does_not(deployment: Deployment) -> None:
    with deployment.serving() as server:
        assert server.seen("/readyz")[0] == 200
        objects = next(path for path in deployment.token.directory.rglob("token.object")).parent
        objects.rename(deployment.directory / "away")
        deadline = time.monotonic() + 20
        while server.seen("/readyz")[0] == 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        status, text = server.seen("/readyz")
        assert status == 503
        assert text.startswith("token: ")
        assert server.seen("/livez")[0] == 200
        assert value(server.metrics(), "kms_ready") == 0
        done = deployment.run("--config", str(server.client_config("operator")), "status", "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout)["faults"] == {"token": "the HSM does not answer"}
        (deployment.directory / "away").rename(objects)


def test_without_the_section_nothing_listens(deployment: Deployment) -> None:
    text = deployment.config_file.read_text().replace('[metrics]\nlisten = "127.0.0.1:0"\n', "")
    deployment.config_file.write_text(text)
    with deployment.serving() as server:
        assert not [line for line in server.log() if line["event"] == "seen from outside"]


@pytest.mark.parametrize("address", ["192.0.2.1:9464", "127.0.0.1:99999"])
def test_an_address_where_it_cannot_listen_is_told(deployment: Deployment, address: str) -> None:
    text = deployment.config_file.read_text().replace('[metrics]\nlisten = "127.0.0.1:0"', f'[metrics]\nlisten = "{address}"')
    deployment.config_file.write_text(text)
    done = deployment.run("serve")
    assert done.returncode != 0
    assert "metrics.listen" in done.stderr
    assert "Traceback" not in done.stderr
