"""What a restore must not undo is in a file outside the database before it is answered."""

from kms.store.journal import Event, read_journal
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import made
from tests.conformance.test_outages import soon
from tests.fixtures.server import Deployment


def test_what_is_for_good_is_journaled_before_it_is_answered_or_at_the_next_start(
    deployment: Deployment,
) -> None:
    text = deployment.config_file.read_text().replace("call_seconds_max = 20", 'call_seconds_max = 20\njournal = "journal"')
    deployment.config_file.write_text(text)
    journal = deployment.directory / "journal"

    def told() -> list[tuple[Event, str]]:
        entries = [entry for entry in read_journal(journal)[1:] if entry.event not in (Event.FOLLOWED, Event.EPOCH_SEEN)]
        return [(entry.event, str(entry.subject)) for entry in entries]

    with deployment.serving() as server:
        caller = server.caller()
        revoked, compromised, due = (made(caller, "aes", name=name) for name in ("a", "b", "c"))
        caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="a", reason="left"))
        assert told() == [(Event.KEY_REVOKED, revoked.id)]
        caller.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key="b", reason="stolen"))
        assert told()[1:] == [(Event.KEY_COMPROMISED, compromised.id)]
        caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="c"))
        assert told()[2:] == [(Event.KEY_CHANGED, due.id)]
        caller.keys.ScheduleKeyDestruction(kpb.ScheduleKeyDestructionRequest(key="c", pending_days=7))
        assert told()[3:] == [(Event.KEY_CHANGED, due.id)]
    deployment.edit_keys("UPDATE cryptography.keys SET destruction_scheduled_at = now() WHERE id = %s", due.id)
    with deployment.serving() as server:
        soon(lambda: (Event.KEY_DESTROYED, due.id) in told())
        caller = server.caller(caller.user_id)
        unwritten = made(caller, "aes", name="d")
        journal.rename(journal.with_name("kept"))
        journal.mkdir()
        found = refusal(caller.keys.RevokeKey, kpb.RevokeKeyRequest(key="d", reason="r"))
        # What cannot be read cannot be asked: nothing was done, and no key is used.
        assert found.reason == "STORE_UNAVAILABLE"
        assert refusal(caller.crypto.Encrypt, cpb.EncryptRequest(key="d", plaintext=b"p")).reason == "STORE_UNAVAILABLE"
    journal.rmdir()
    journal.with_name("kept").rename(journal)
    with deployment.serving() as server:
        caller = server.caller(caller.user_id)
        assert caller.keys.GetKey(kpb.GetKeyRequest(key="d")).key.state == kpb.KEY_STATE_ACTIVE
        caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="d", reason="r"))
        assert (Event.KEY_REVOKED, unwritten.id) in told()
