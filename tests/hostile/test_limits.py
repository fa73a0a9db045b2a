"""A limit outlives the workers that keep it, whatever the database says that it has charged."""

from uuid import UUID

import psycopg

from kms.store.journal_knowledge import JournalKnowledge
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import made
from tests.conformance.test_outages import soon
from tests.fixtures.server import Caller, Deployment
from tests.hostile.test_records import SAYS_OK


def sign(caller: Caller, key: str) -> object:
    return caller.crypto.Sign(cpb.SignRequest(key=key, message=b"m"), timeout=15)


def refused(caller: Caller, key: str) -> str:
    return refusal(caller.crypto.Sign, cpb.SignRequest(key=key, message=b"m")).reason


def test_the_next_worker_gives_nothing_beyond_the_limit_where_the_database_charged_nothing(deployment: Deployment) -> None:
    deployment.set_server(journal="journal")
    journal = JournalKnowledge(deployment.directory / "journal")
    with deployment.serving() as server:
        owner = server.caller()
        ids = {name: made(owner, "secp256k1", name=name).id for name in ("honest", "told", "last")}
        for name in ids:
            owner.keys.UpdateKey(kpb.UpdateKeyRequest(key=name, max_usage_count=3))
        sign(owner, "honest")
        with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
            row = connection.execute("SELECT pg_get_functiondef('cryptography.settle'::regproc)").fetchone()
            assert row is not None
            connection.execute(SAYS_OK.encode())
        for _ in range(3):
            sign(owner, "told")
        assert refused(owner, "told") == "RECORD_INVALID"
        soon(lambda: journal.uses(UUID(ids["told"])) >= 3)
        # What it did not tell yet, it tells at its end.
        sign(owner, "last")
    with deployment.serving() as server:
        owner = server.caller(owner.user_id)
        assert refused(owner, "told") == "RECORD_INVALID"
        assert refused(owner, "last") == "RECORD_INVALID"
        with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
            connection.execute(row[0])
        # A key of which each use was charged has all of them, over all workers, and not one more.
        for _ in range(2):
            sign(owner, "honest")
        assert refused(owner, "honest") == "USAGE_LIMIT_REACHED"
