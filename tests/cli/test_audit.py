"""`kms audit` and the role that it needs, against a real server."""

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.running import Kms
from tests.conformance.requests import made
from tests.fixtures.server import Caller, RunningServer


def an_auditor(kms: Kms, server: RunningServer, directory: Path) -> Path:
    """The configuration of an auditor whom the command made."""
    out = directory / "inspector"
    name = f"inspector-{directory.name}".replace("_", "-")
    made = kms(
        *("--config", server.deployment.config_file, "user", "add-service", name, "--role", "auditor"),
        *("--out", out, "--server", server.address, "--json"),
    )
    assert made.code == 0, made
    return out / "client.toml"


def test_an_auditor_made_by_the_command_searches_the_trail(
    kms: Kms, server: RunningServer, caller: Caller, tmp_path: Path
) -> None:
    key = made(caller, "ed25519")
    auditor = an_auditor(kms, server, tmp_path)
    found = kms("--config", auditor, "audit", "search", "--resource", key.id, "--since", "2025-01-01", "--json").json["events"]
    assert [(event["event_type"], event["severity"], event["outcome"]) for event in found] == [("key.created", "low", "success")]
    assert found[0]["user_id"] == str(caller.user_id)
    line = kms("--config", auditor, "audit", "search", "--resource", key.id).out.decode()
    assert line.split("\t")[1:6] == ["low", "key.created", "created", "success", str(caller.user_id)]
    assert kms("--config", auditor, "audit", "search", "--severity", "critical", "--user", key.id, "--json").json == {
        "events": []
    }
    bad = kms("--config", auditor, "audit", "search", "--user", "Ada", "--json")
    assert (bad.code, bad.failure["metadata"]) == (1, {"field": "user_id"})


def test_a_tail_prints_each_event_as_a_line_of_json(kms: Kms, server: RunningServer, caller: Caller, tmp_path: Path) -> None:
    auditor = an_auditor(kms, server, tmp_path)
    command = [sys.executable, "-m", "kms", "--config", str(auditor), "audit", "tail", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        begun = json.loads(process.stdout.readline())
        assert (begun["event_type"], begun["action"]) == ("audit.read", "tail")
        key = made(caller, "ed25519")
        event = json.loads(process.stdout.readline())
        process.terminate()
    assert (event["event_type"], event["resource_id"]) == ("key.created", key.id)
    assert event["cursor"]


def test_a_role_that_there_is_not_is_refused_with_those_that_there_are_and_makes_no_user(
    kms: Kms, server: RunningServer, tmp_path: Path
) -> None:
    command = ("--config", server.deployment.config_file, "user", "add-service", "nobody-yet", "--out", tmp_path / "n")
    refused = kms(*command, "--role", "king", "--json")
    assert (refused.code, refused.failure["reason"], refused.failure["metadata"]) == (1, "MALFORMED", {"field": "role"})
    assert "auditor" in refused.failure["message"]
    assert not (tmp_path / "n").exists()
    assert kms(*command, "--server", server.address, "--json").code == 0


def test_a_user_without_the_role_is_not_permitted(kms: Kms, server: RunningServer) -> None:
    config = server.client_config("ada")
    for arguments in (("search",), ("tail",)):
        refused = kms("--config", config, "audit", *arguments, "--json")
        assert (refused.code, refused.failure["metadata"]) == (4, {"permission": "audit:read"})


def test_the_service_verifies_its_trail_for_an_auditor(kms: Kms, server: RunningServer, tmp_path: Path) -> None:
    auditor = an_auditor(kms, server, tmp_path)
    for _ in range(100):
        ended = kms("--config", auditor, "audit", "verify", "--json")
        if ended.code in (0, 6):  # before the first checkpoint there is nothing to compare with
            break
        time.sleep(0.1)
    # Of the keys of this server others spoil some, which ends with 6.
    assert (ended.json["finding"], ended.json["verified_size"] > 0) == (None, True)
    assert ended.json["keys"]["compared"] > 0
    assert {"COLUMNS", "TABLES", "END_OF_THE_TRAIL"} <= {each["what"] for each in ended.json["not_checked"]}
    assert "\nnot checked: tables of which" in kms("--config", auditor, "audit", "verify").out.decode()
    assert kms("--config", auditor, "audit", "verify", "--key", "k").code == 2
