"""An error in a pipeline leaves psycopg believing in a prepared statement that the server does not have. It does not heal.

    python psycopg_pipeline_prepared.py "host=… dbname=…"

The program needs psycopg 3 and any PostgreSQL 14 or later. It creates nothing and changes nothing. It ends with code 1 where
the fault is there and with code 0 where it is not. README.md beside this file explains what happens.
"""

import sys
from contextlib import suppress

import psycopg

QUERY = "SELECT 1"
FAILING = "SELECT 1/0"
LATER = 10


def fails_afterwards(connection: psycopg.Connection[tuple[object, ...]]) -> list[str]:
    """Return the errors of calls that have nothing to do with the error in the pipeline."""
    # One more execution and psycopg prepares the query. Until then it only counts.
    for _ in range(connection.prepare_threshold or 0):
        connection.execute(QUERY)
    # The server skips everything after the error until the end of the pipeline, so it never parses QUERY.
    with suppress(psycopg.errors.DivisionByZero), connection.pipeline():
        connection.execute(FAILING)
        connection.execute(QUERY)
    errors = []
    for _ in range(LATER):
        try:
            connection.execute(QUERY)
        except psycopg.Error as error:
            errors.append(str(error))
    return errors


def main() -> int:
    """Run both ways of preparing and say what came of it."""
    print(f"psycopg {psycopg.__version__}, {psycopg.pq.__impl__} implementation, libpq {psycopg.pq.version()}")
    found = {}
    for threshold in (5, 0):
        with psycopg.connect(sys.argv[1] if len(sys.argv) > 1 else "", autocommit=True) as connection:
            connection.prepare_threshold = threshold
            found[threshold] = fails_afterwards(connection)
        told = f": {found[threshold][0]}" if found[threshold] else ""
        print(f"prepare_threshold = {threshold}: {len(found[threshold])} of {LATER} later calls fail{told}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
