"""A service whose database somebody else owns."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from kms.dev.postgres import EmbeddedPostgres
from tests.fixtures.postgres import cloned
from tests.fixtures.server import RunningServer, deployed

Superuser = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def attacked(
    postgres: EmbeddedPostgres, token_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server of this module's own, with a journal."""
    directory = tmp_path_factory.mktemp("attacked")
    with cloned(postgres) as database, deployed(directory, database, token_template) as deployment:
        config = deployment.config_file.read_text()
        deployment.config_file.write_text(config.replace("[server]\n", '[server]\njournal = "journal"\n'))
        with deployment.serving() as running:
            yield running


@pytest.fixture
def superuser(attacked: RunningServer) -> Superuser:
    """Run statements as the superuser, without triggers, rules or foreign keys, and return the rows of the last."""

    def run(*statements: str, parameters: tuple[object, ...] = ()) -> list[dict[str, Any]]:
        with psycopg.connect(attacked.deployment.database.admin_dsn, row_factory=dict_row) as connection:
            connection.execute("SET session_replication_role = replica")
            found: list[dict[str, Any]] = []
            for statement in statements:
                cursor = connection.execute(statement.encode(), parameters or None)
                found = cursor.fetchall() if cursor.description else []
        return found

    return run
