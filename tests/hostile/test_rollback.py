"""A superuser puts old rows of keys back, edits, removes and plants rows: the verifier names each, and nothing else.

The service is asked (`kms audit verify`), and an export is verified without it.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from kms.app import verifying
from kms.dev.postgres import EmbeddedPostgres
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.cli.running import Ended, run_kms
from tests.conformance.requests import made
from tests.fixtures.postgres import cloned
from tests.fixtures.server import Caller, RunningServer, deployed

_files: Final = itertools.count(1)
# Keys about which the trail itself has forged entries, which stay.
_forged: Final = set[str]()
_names: Final = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Bench:
    """A service, an auditor's configuration, a superuser's connection, and the verifier key."""

    server: RunningServer
    auditor: Path
    admin: "psycopg.Connection[Any]"
    key: str

    def online(self) -> Ended:
        """What the service says of its trail."""
        return run_kms("--config", self.auditor, "audit", "verify", "--json")

    def offline(self, *, after: int = 0) -> Ended:
        """What an export says that begins with at most *after* rows left out."""
        file = self.server.deployment.directory / f"trail-{next(_files)}.jsonl"
        config = ("--config", self.server.deployment.config_file)
        exported = run_kms(*config, "audit", "export", file, "--after", after)
        assert exported.code == 0, exported
        ended = run_kms("audit", "verify", file, "--key", self.key, "--begins-at", after, "--json")
        file.unlink()
        return ended


@pytest.fixture(scope="module")
def bench(postgres: EmbeddedPostgres, token_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with (
        cloned(postgres) as database,
        deployed(tmp_path_factory.mktemp("rollback"), database, token_template) as deployment,
        deployment.serving() as server,
        psycopg.connect(database.admin_dsn, autocommit=True) as admin,
    ):
        auditor = server.client_config("auditor")
        query = "SELECT authentication.assign_role(id, 'auditor') FROM authentication.users WHERE username LIKE 'auditor-%'"
        admin.execute(query)
        made(server.caller(), "ed25519")
        for _ in range(600):  # before the first checkpoint there is nothing to compare with
            row = admin.execute("SELECT max(tree_size) FROM audit.checkpoints").fetchone()
            if row != (None,):
                break
            threading.Event().wait(0.1)
        key = deployment.run("audit", "key")
        assert key.returncode == 0, key
        yield Bench(server, auditor, admin, key.stdout.strip())


@contextmanager
def edited(bench: Bench, *statements: str, **ids: str) -> Iterator[None]:
    """Run *statements* as a superuser for whom no trigger fires, and put the keys back at the end."""
    admin = bench.admin
    admin.execute("CREATE TEMP TABLE kept AS TABLE cryptography.keys")
    admin.execute("SET session_replication_role = replica")
    try:
        for statement in statements:
            assert admin.execute(statement.encode(), ids or None).rowcount > 0
        yield
    finally:
        admin.execute("DELETE FROM cryptography.keys")
        admin.execute("INSERT INTO cryptography.keys SELECT * FROM kept")
        admin.execute("SET session_replication_role = origin")
        admin.execute("DROP TABLE kept")


def found(ended: Ended, *ids: str) -> set[tuple[str, str, str]]:
    """Which differences were named of these keys: kind, number of the key among them, column."""
    assert ended.json["finding"] is None, ended.json["finding"]
    named = ended.json["keys"]["findings"]
    assert ended.code == (6 if named else 0), ended
    assert ended.json["keys"]["differences"] == len(named)
    assert all(each["message"] for each in named)
    assert {each["key_id"] for each in named} <= {*ids, *_forged}
    return {(each["difference"], str(ids.index(each["key_id"])), each["column"]) for each in named if each["key_id"] in ids}


def a_key(caller: Caller, **fields: Any) -> kpb.Key:  # noqa: ANN401
    request = kpb.CreateKeyRequest(name=f"k{next(_names)}", type=kpb.KEY_TYPE_ED25519, purpose=kpb.KEY_PURPOSE_SIGNING, **fields)
    return caller.keys.CreateKey(request, timeout=60).key


def sign(caller: Caller, key: str, times: int = 1) -> None:
    for _ in range(times):
        caller.crypto.Sign(cpb.SignRequest(key=key, message=b"m"), timeout=60)


@pytest.fixture
def caller(bench: Bench) -> Caller:
    return bench.server.caller()


def differs(*columns: str, key: int = 0) -> set[tuple[str, str, str]]:
    return {("KEY_DIFFERS", str(key), column) for column in columns}


def both(bench: Bench, *ids: str) -> tuple[set[tuple[str, str, str]], set[tuple[str, str, str]]]:
    """What is named online and in an export."""
    return found(bench.online(), *ids), found(bench.offline(), *ids)


def test_an_old_row_that_is_put_back_whole_is_named(bench: Bench, caller: Caller) -> None:
    key = a_key(caller, max_usage_count=100)
    sign(caller, key.id)
    bench.admin.execute("CREATE TEMP TABLE old AS SELECT * FROM cryptography.keys WHERE id = %s", (key.id,))
    sign(caller, key.id, 2)
    caller.keys.UpdateKey(kpb.UpdateKeyRequest(key=key.id, max_usage_count=50))
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=key.id, reason="lost"))
    assert both(bench, key.id) == (set(), set())
    put_back = ("DELETE FROM cryptography.keys WHERE id = %(key)s", "INSERT INTO cryptography.keys SELECT * FROM old")
    expected = differs("version", "usage_counter", "max_usage_count", "key_status", "revoked_at")
    with edited(bench, *put_back, key=key.id):
        assert both(bench, key.id) == (expected, expected)
    bench.admin.execute("DROP TABLE old")


EDITS: Final = {
    "counter lowered": ("usage_counter = usage_counter - 1", ("usage_counter",)),
    "counter raised": ("usage_counter = usage_counter + 1", ("usage_counter",)),
    "limit lifted": ("max_usage_count = NULL", ("max_usage_count",)),
    "limit raised": ("max_usage_count = max_usage_count + 1", ("max_usage_count",)),
    "revived": ("key_status = 'active', revoked_at = NULL", ("key_status", "revoked_at")),
    "another public key": ("public_key = public_key || ' '", ("public_key",)),
    "given to another": ("user_id = (SELECT id FROM authentication.users ORDER BY created_at LIMIT 1)", ("user_id",)),
    "another version": ("version = version + 1", ("version",)),
    "other times": ("expires_at = expires_at + interval '1 microsecond', activated_at = now()", ("expires_at", "activated_at")),
    "other metadata": ("""metadata = '{"a": "2"}'""", ("metadata",)),
}


def test_an_edited_row_is_named_with_its_column(bench: Bench, caller: Caller) -> None:
    ids, expected, statements = list[str](), set[tuple[str, str, str]](), list[str]()
    for number, (change, columns) in enumerate(EDITS.values()):
        key = a_key(caller, max_usage_count=10, expires_at=datetime(2099, 1, 1, tzinfo=UTC), metadata={"a": "1"})
        sign(caller, key.id, 2)
        caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=key.id, reason="lost"), timeout=60)
        ids.append(key.id)
        expected |= differs(*columns, key=number)
        statements.append(f"UPDATE cryptography.keys SET {change} WHERE id = '{key.id}'")
    with edited(bench, *statements):
        assert both(bench, *ids) == (expected, expected)
    assert both(bench, *ids) == (set(), set())


def test_exchanged_names_are_named_of_both_keys(bench: Bench, caller: Caller) -> None:
    first, second = a_key(caller), a_key(caller)
    rename = "UPDATE cryptography.keys SET key_name = %(name)s WHERE id = %(key)s"
    names = {"first": first.id, "second": second.id, "one": first.name, "two": second.name}
    statements = [
        rename.replace("%(name)s", "'between'").replace("%(key)s", "%(first)s"),
        rename.replace("%(name)s", "%(one)s").replace("%(key)s", "%(second)s"),
        rename.replace("%(name)s", "%(two)s").replace("%(key)s", "%(first)s"),
    ]
    expected = differs("key_name") | differs("key_name", key=1)
    with edited(bench, *statements, **names):
        assert both(bench, first.id, second.id) == (expected, expected)


def test_a_removed_and_a_planted_row_are_named(bench: Bench, caller: Caller) -> None:
    key, planted = a_key(caller), "00000000-0000-0000-0000-000000000000"
    sign(caller, key.id)
    with edited(bench, "DELETE FROM cryptography.keys WHERE id = %(key)s", key=key.id):
        expected = {("KEY_MISSING", "0", "")}
        assert both(bench, key.id) == (expected, expected)
    plant = """
        INSERT INTO cryptography.keys
        SELECT (jsonb_populate_record(k, '{"id": "00000000-0000-0000-0000-000000000000", "key_name": "planted"}')).*
        FROM cryptography.keys AS k WHERE k.id = %(key)s
    """
    with edited(bench, plant, key=key.id):
        expected = {("KEY_UNKNOWN", "1", "")}
        assert both(bench, key.id, planted) == (expected, expected)


def test_more_differences_than_are_named_are_counted(bench: Bench, caller: Caller) -> None:
    keys = [a_key(caller).id for _ in range(11)]
    spoil = 'UPDATE cryptography.keys SET usage_counter = 7, metadata = \'{"x": "y"}\' WHERE id = ANY (%(keys)s::uuid[])'
    with edited(bench, spoil, keys="{" + ",".join(keys) + "}"):
        for ended in (bench.online(), bench.offline()):
            assert (ended.code, ended.json["keys"]["differences"] >= 22, len(ended.json["keys"]["findings"])) == (6, True, 20)


def sealed_size(bench: Bench) -> int:
    """How many rows are under a checkpoint, once all that are there now are."""
    order = bench.admin.execute("SELECT max(commit_order) FROM audit.security_events").fetchone()
    assert order is not None
    for _ in range(600):
        row = bench.admin.execute("SELECT min(tree_size) FROM audit.checkpoints WHERE horizon > %s", order).fetchone()
        if row is not None and row[0] is not None:
            return int(row[0])
        threading.Event().wait(0.1)
    raise AssertionError("the trail is not sealed")


def test_entries_that_are_not_here_leave_columns_unchecked_and_that_is_told(bench: Bench, caller: Caller) -> None:
    revoked = a_key(caller, max_usage_count=10)
    a_key(caller)
    sign(caller, revoked.id)
    size = sealed_size(bench)
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=revoked.id, reason="lost"))
    sealed_size(bench)  # an export without any checkpoint would end with NOT_SEALED
    edits = {
        "key_status = 'active', revoked_at = NULL": differs("key_status", "revoked_at"),
        "max_usage_count = NULL": set[tuple[str, str, str]](),
    }
    for change, expected in edits.items():
        with edited(bench, f"UPDATE cryptography.keys SET {change} WHERE id = %(key)s", key=revoked.id):
            ended = bench.offline(after=size)
            assert found(ended, revoked.id) == expected
            what = {each["what"]: each["count"] for each in ended.json["not_checked"]}
            assert what["KEYS_PARTLY_COMPARED"] >= 1
            assert what["KEYS_NOT_COMPARABLE"] >= 1
            assert what["ROWS_BEFORE_THE_BEGINNING"] > 0
            assert {"COLUMNS", "TABLES", "END_OF_THE_TRAIL"} <= what.keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_named_while_eight_clients_sign_and_move_keys(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small pages: much happens between two of them.
    for name, size in (("_ROWS_READ_MAX", 100), ("_KEYS_READ_MAX", 5)):
        monkeypatch.setattr(verifying, name, size)
    shared = bench.server.caller()
    hot = a_key(shared)
    stop = threading.Event()

    def work(caller: Caller) -> int:
        done = 0
        while not stop.is_set():
            key = a_key(caller, max_usage_count=1000)
            for move in moves(caller, key.id):
                move()
                sign(bench.server.again(shared) if done == 0 else shared, hot.id)
                done += 1
        return done

    with ThreadPoolExecutor(8) as pool:
        working = [pool.submit(work, bench.server.caller()) for _ in range(8)]
        try:
            for _ in range(2):
                for ended in (bench.offline(), bench.online()):
                    assert found(ended) == set()
        finally:
            stop.set()
        assert all(each.result() > 0 for each in working)
    assert both(bench, hot.id) == (set(), set())


def moves(caller: Caller, key: str) -> list[Callable[[], object]]:
    return [
        lambda: sign(caller, key, 3),
        lambda: caller.keys.UpdateKey(kpb.UpdateKeyRequest(key=key, max_usage_count=500), timeout=60),
        lambda: caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key=key), timeout=60),
        lambda: caller.keys.ReactivateKey(kpb.ReactivateKeyRequest(key=key), timeout=60),
        lambda: sign(caller, key, 2),
        lambda: caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=key, reason="done"), timeout=60),
    ]


def test_what_no_call_does_is_named_though_the_trail_tells_of_it(bench: Bench, caller: Caller) -> None:
    # With the triggers, so that the trail has an entry, and row and trail agree.
    key = a_key(caller, max_usage_count=10)
    _forged.add(key.id)
    edit = bench.server.deployment.edit_keys
    edit("UPDATE cryptography.keys SET max_usage_count = 20 WHERE id = %s", key.id)
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=key.id, reason="lost"))
    edit("UPDATE cryptography.keys SET key_status = 'active', revoked_at = NULL WHERE id = %s", key.id)
    expected = {("KEY_MOVE_FORBIDDEN", "0", "max_usage_count"), ("KEY_MOVE_FORBIDDEN", "0", "key_status")}
    assert both(bench, key.id) == (expected, expected)
