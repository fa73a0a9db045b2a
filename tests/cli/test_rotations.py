"""`kms key rotate` and `kms rotation …`, against a real server."""

import pytest

from tests.cli.running import Ended, Kms
from tests.fixtures.server import RunningServer


@pytest.fixture
def as_ada(kms: Kms, server: RunningServer) -> Kms:
    """`kms` as a new user of the running server."""
    config = server.client_config("ada")

    def run(*arguments: object, stdin: bytes = b"") -> Ended:
        return kms("--config", config, *arguments, stdin=stdin)

    return run


def test_a_key_is_rotated_and_its_log_is_shown(as_ada: Kms) -> None:
    created = as_ada("key", "create", "k", "--type", "aes", "--json").json
    rotated = as_ada("key", "rotate", "k", "--reason", "a year old", "--json").json
    assert (rotated["status"], rotated["old_key_id"], rotated["reason"]) == ("completed", created["id"], "a year old")
    assert "error_message" not in rotated
    shown = as_ada("key", "show", "k", "--json").json
    assert (shown["id"], shown["predecessor_id"]) == (rotated["new_key_id"], created["id"])
    predecessor = as_ada("key", "show", "k@1", "--json").json
    assert (predecessor["id"], predecessor["successor_id"], predecessor["state"]) == (created["id"], shown["id"], "inactive")
    assert "superseded_at" in predecessor
    lineage = as_ada("key", "list", "--lineage", "k@1", "--json").json["keys"]
    assert [key["id"] for key in lineage] == [shown["id"], predecessor["id"]]
    assert as_ada("rotation", "show", rotated["id"], "--json").json == rotated
    assert as_ada("rotation", "list", "--json").json == {"rotations": [rotated]}
    again = as_ada("key", "rotate", "k", "--reason", "again")
    assert again.code == 0
    assert b"status                  completed" in again.out
    listed = as_ada("rotation", "list", "--key", "k", "--status", "completed").out.decode().splitlines()
    assert [line.split("\t")[1] for line in listed] == ["completed"]
    assert len(as_ada("rotation", "list", "--limit", 1, "--json").json["rotations"]) == 1


def test_a_rotation_is_watched_to_its_end(as_ada: Kms) -> None:
    as_ada("key", "create", "k", "--type", "aes")
    rotated = as_ada("key", "rotate", "k", "--reason", "a year old", "--json").json
    watched = as_ada("rotation", "watch", rotated["id"])
    assert (watched.code, watched.out.decode()) == (0, f"completed\t1\t{rotated['new_key_id']}\t\n")
    assert as_ada("rotation", "watch", rotated["id"], "--json").json == rotated
    missing = as_ada("rotation", "watch", "00000000-0000-4000-8000-000000000000", "--json")
    assert (missing.code, missing.failure["reason"]) == (3, "ROTATION_NOT_FOUND")


def test_a_rotation_that_is_refused_says_why(as_ada: Kms) -> None:
    as_ada("key", "create", "k", "--type", "aes")
    as_ada("key", "compromise", "k", "--reason", "laptop stolen")
    refused = as_ada("key", "rotate", "k", "--reason", "stolen", "--json")
    assert (refused.code, refused.failure["reason"]) == (1, "KEY_COMPROMISED")
    assert as_ada("key", "rotate", "k", "--reason", "stolen", "--allow-compromised").code == 0
    missing = as_ada("rotation", "show", "00000000-0000-4000-8000-000000000000", "--json")
    assert (missing.code, missing.failure["reason"]) == (3, "ROTATION_NOT_FOUND")
    assert as_ada("key", "rotate", "k").code == 2, "a reason is asked for"


def test_a_rotation_with_an_id_is_repeated(as_ada: Kms) -> None:
    as_ada("key", "create", "k", "--type", "ed25519")
    command = ("key", "rotate", "k", "--reason", "yearly", "--request-id", "order-1", "--json")
    assert as_ada(*command).json == as_ada(*command).json
    assert len(as_ada("rotation", "list", "--json").json["rotations"]) == 1


def test_a_policy_is_set_shown_paused_and_cleared(as_ada: Kms) -> None:
    as_ada("key", "create", "k", "--type", "aes", "--limit", 100)
    assert b"none" in as_ada("key", "rotation", "k").out
    assert as_ada("rotation", "pause", "k").code == 1
    set_now = as_ada("key", "rotation", "k", "--every", "90d", "--at-usage", "80%", "--on-compromise", "--json").json
    assert (set_now["every_seconds"], set_now["at_usage_percent"], set_now["on_compromise"]) == (90 * 86_400, 80, True)
    assert (set_now["version"], set_now["paused"], "next_rotation_at" in set_now) == (1, False, True)
    assert as_ada("key", "rotation", "k", "--json").json == set_now
    assert as_ada("key", "show", "k", "--json").json["next_rotation_at"] == set_now["next_rotation_at"]
    paused = as_ada("rotation", "pause", "k", "--json").json
    assert (paused["paused"], paused["version"], "next_rotation_at" in paused) == (True, 2, False)
    assert as_ada("rotation", "resume", "k", "--json").json == {**set_now, "version": 3}
    refused = as_ada("key", "rotation", "k", "--every", "23h", "--json")
    assert (refused.code, refused.failure["metadata"]["field"]) == (1, "every")
    for wrong in ("90", "d", "90w", "-1d"):
        assert as_ada("key", "rotation", "k", "--every", wrong).code == 2
    assert as_ada("key", "rotation", "k", "--at-usage", "many").code == 2
    assert as_ada("key", "rotation", "k", "--clear", "--every", "90d").code == 2
    assert set(as_ada("key", "rotation", "k", "--clear", "--json").json) == {"key_id"}


def test_the_uses_of_predecessors_are_shown(as_ada: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kms.cli.rotations._USAGE_PAGE", 1)
    as_ada("key", "create", "k", "--type", "aes")
    old = as_ada("encrypt", "k", stdin=b"secret").out
    for _ in range(2):
        as_ada("key", "rotate", "k", "--reason", "yearly")
    for _ in range(3):
        as_ada("decrypt", stdin=old)
    used, unused = as_ada("rotation", "usage", "k", "--json").json["predecessors"]
    assert (used["name"], used["superseded_at"], unused["name"], unused["uses"]) == ("k@1", used["counted_since"], "k@2", [])
    [use] = used["uses"]
    assert (use["action"], use["count"], use["last_peer"]) == ("decrypt", 3, "127.0.0.1")
    rows = [line.split("\t") for line in as_ada("rotation", "usage", "k@2").out.decode().splitlines()]
    assert [[row[0], row[3], row[5]] for row in rows] == [["k@1", "decrypt", "3"], ["k@2", "", "0"]]
    later = as_ada("rotation", "usage", "k", "--since", "2100-01-01", "--json").json["predecessors"]
    assert [each["uses"] for each in later] == [[], []]
