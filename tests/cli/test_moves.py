"""The commands that move a key between states, against a real server."""

import pytest

from tests.cli.running import Kms
from tests.fixtures.server import RunningServer


@pytest.fixture
def as_ada(kms: Kms, server: RunningServer) -> Kms:
    """`kms` as a new user of the running server."""
    config = server.client_config("ada")

    def run(*arguments: object, stdin: bytes = b"") -> object:
        return kms("--config", config, *arguments, stdin=stdin)

    return run  # type: ignore[return-value]  # it ends as `kms` does


def test_a_key_is_made_with_a_limit_and_times_and_both_can_be_lowered(as_ada: Kms) -> None:
    created = as_ada("key", "create", "k", "--type", "ed25519", "--limit", 2, "--expires", "2099-01-01", "--json").json
    assert (created["max_usage_count"], created["expires_at"]) == (2, "2099-01-01T00:00:00Z")
    updated = as_ada(
        "key", "update", "k", "--limit", 1, "--expires", "2098-01-01T12:00:00+0100", "--metadata", "a=b", "--json"
    ).json
    assert (updated["max_usage_count"], updated["expires_at"], updated["metadata"]) == (1, "2098-01-01T11:00:00Z", {"a": "b"})
    assert as_ada("sign", "k", "--message", "m").code == 0
    spent = as_ada("sign", "k", "--message", "m", "--json")
    assert (spent.code, spent.failure["reason"]) == (1, "USAGE_LIMIT_REACHED")


def test_a_key_goes_through_its_states(as_ada: Kms) -> None:
    as_ada("key", "create", "k", "--type", "aes", "--activates", "2099-01-01", "--json")
    states = [
        as_ada("key", *line, "--json").json["state"]
        for line in (
            ("show", "k"),
            ("activate", "k"),
            ("deactivate", "k", "--version", 2),
            ("reactivate", "k"),
            ("compromise", "k", "--reason", "laptop stolen", "--occurred", "2026-01-01"),
            ("revoke", "k", "--reason", "done"),
            ("destroy", "k", "--days", 7),
            ("cancel-destruction", "k"),
        )
    ]
    assert states == [
        *("pre_active", "active", "inactive", "active", "compromised", "revoked", "pending_destruction", "revoked"),
    ]
    stale = as_ada("key", "destroy", "k", "--version", 1, "--json")
    assert (stale.code, stale.failure["reason"]) == (1, "STALE")


def test_a_reason_is_asked_for(as_ada: Kms) -> None:
    as_ada("key", "create", "k", "--type", "aes")
    assert as_ada("key", "revoke", "k").code == 2
