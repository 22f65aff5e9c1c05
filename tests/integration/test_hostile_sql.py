"""Hostile queries: the session refuses each, also when it is that of a superuser.

Nothing is written, no file is read or made, no connection is opened: contents, files and a tripwire are compared.
"""

import hashlib
import re
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from postgres_server import PASSWORD, Postgres, run_postgres
from visionloop.errors import SourceError
from visionloop.ingest.sources import Item, SourceContext, read_source
from visionloop.params import SqlSource

# FILE is a path that must not come to be; TRIP the port of a listener on loopback that nobody may reach.
COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
TO_XML = "query_to_xml('DELETE FROM photos', true, true, '')"
SQLITE = {
    "INSERT INTO photos VALUES (9, 'x', x'00')": "syntax error",
    "UPDATE photos SET label = 'x'": "syntax error",
    "REPLACE INTO photos VALUES (1, 'x', x'00')": "syntax error",
    "WITH gone AS (SELECT 1) DELETE FROM photos": "syntax error",
    "/* SELECT */ DROP TABLE photos": "syntax error",
    "CREATE TABLE stolen AS SELECT * FROM photos": "syntax error",
    "SELECT 1 AS image; DELETE FROM photos": "syntax error",
    "SELECT 1) AS q; DELETE FROM photos; SELECT * FROM (SELECT 1": "only execute one statement",
    "SELECT ';' AS image; -- '\nDELETE FROM photos": "syntax error",
    "SELECT 1 /* /* */ AS image; DELETE FROM photos -- */": "syntax error",
    "SELECT [a;b] AS image, 'x; DELETE FROM photos": "unrecognized token",
    "ATTACH DATABASE 'FILE' AS other": "syntax error",
    "VACUUM INTO 'FILE'": "syntax error",
    "PRAGMA writable_schema = ON": "syntax error",
    "BEGIN IMMEDIATE": "no such table: BEGIN",
    "EXPLAIN SELECT 1": "syntax error",
    "SELECT load_extension('FILE') AS image": "would do more than read",
    "SELECT \"writefile\"('FILE', 'x') AS image": "no such function: writefile",
    "SELECT readfile ('/etc/passwd') AS image": "no such function: readfile",
    "SELECT fts3_tokenizer('simple', x'4141414141414141') AS image": "would do more than read",
    "SELECT * FROM pragma_database_list": "more than read|no such table|authorized",
    "SELECT 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab' REGEXP '(a+)+$' AS image": "more than read",
    "SELECT zeroblob(1000000000) AS image, 'x' AS label": "too large",
    f"{COUNT} SELECT max(i) AS image FROM n": "takes too long",
    f"{COUNT} SELECT i AS id, 'x' AS label, x'00' AS image FROM n": "more than 50 rows",
}
POSTGRESQL = {
    "INSERT INTO photos VALUES (9, 'x', '')": "syntax error",
    "TRUNCATE photos": "syntax error",
    "WITH gone AS (DELETE FROM photos RETURNING *) SELECT * FROM gone": "data-modifying statement must be at the top",
    "WITH more AS (INSERT INTO photos VALUES (9, 'x', '') RETURNING *) SELECT * FROM more": "must be at the top level",
    "SELECT * INTO stolen FROM photos": "INTO is not allowed here",
    "SELECT * FROM photos FOR UPDATE": "would do more than read",
    "SELECT * FROM photos FOR SHARE": "more than read",
    "SELECT 1 AS image; DROP TABLE photos": "syntax error",
    "SELECT $a$ $b$ $a$ AS image; DROP TABLE photos; SELECT $b$ $b$": "syntax error",
    "SELECT '\\'; DROP TABLE photos; --' AS image": "syntax error",
    "SELECT E'\\'; DROP TABLE photos; --' AS image": "its rows hold paths",  # one text, with the quote inside
    "SELECT 1) q; COMMIT; DROP TABLE photos; --": "syntax error",
    "COPY photos TO PROGRAM 'touch FILE'": "syntax error",
    "COPY (SELECT 1) TO 'FILE'": "syntax error",
    "DO $$ BEGIN DELETE FROM photos; END $$": "syntax error",
    "CALL noise()": "syntax error",
    "SELECT noise() AS image": "more than read",
    "SELECT nextval('counter') AS image": "permission denied for sequence",
    "SELECT \"setval\"('counter', 99) AS image": "permission denied for sequence",
    "SELECT pg_read_file('/etc/passwd') AS image": "permission denied for function",
    "SELECT pg_catalog . pg_ls_dir('/') AS image": "permission denied for function",
    "SELECT U&\"pg\\005fread_file\"('/etc/passwd') AS image": "permission denied for function",
    "SELECT lo_export(lo_from_bytea(0, 'x'), 'FILE') AS image": "permission denied for function",
    "SELECT lo_import('/etc/passwd') AS image": "permission denied for function",
    "SELECT * FROM dblink('host=127.0.0.1 port=TRIP', 'SELECT 1') AS t(image text)": "provide a password|not exist",
    "SELECT dblink_connect('host=127.0.0.1 port=TRIP') AS image": "must provide a password|does not exist",
    "SELECT set_config('transaction_read_only', 'off', true) AS image": "must be set before any query",
    f"WITH a AS (SELECT set_config('role', 'none', true)) SELECT {TO_XML} AS image FROM a": "DELETE is not allowed",
    f"SELECT {TO_XML} AS image": "DELETE is not allowed",
    "SELECT pg_terminate_backend(pg_backend_pid()) AS image": "must be a superuser",
    "SELECT pg_sleep(30) AS image": "takes too long",
    "SELECT count(*) AS image FROM generate_series(1, 100000000000)": "takes too long",
    "SELECT repeat('x', 1000000000) AS image, 'x' AS label": "takes too long|too large|says",
    f"{COUNT} SELECT i AS id, 'x' AS label, '\\x00'::bytea AS image FROM n": "more than 50 rows",
    "SELECT pg_advisory_lock(1), pg_sleep(30) AS image": "takes too long",
}


class Trap:
    """A listener that nobody may reach, and a file that must not come to be."""

    def __init__(self, listener: socket.socket, file: Path) -> None:
        self.port, self.file, self.tripped = listener.getsockname()[1], file, 0
        self._listener = listener
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            try:
                self._listener.accept()[0].close()
            except OSError:
                return
            self.tripped += 1

    def fill(self, text: str) -> str:
        return text.replace("TRIP", str(self.port)).replace("FILE", str(self.file))


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Trap(listener, tmp_path / "stolen")
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with run_postgres() as server:
        server.run(
            "CREATE TABLE photos (id int PRIMARY KEY, label text, image bytea)",
            "INSERT INTO photos VALUES (1, 'cat', '\\x00'), (2, 'dog', '\\x01')",
            "CREATE SEQUENCE counter",
            "CREATE FUNCTION noise() RETURNS int LANGUAGE plpgsql SECURITY DEFINER AS"
            " $$ BEGIN INSERT INTO photos VALUES (9, 'x', ''); RETURN 1; END $$",
        )
        if server.run("SELECT count(*) FROM pg_available_extensions WHERE name = 'dblink'") == [(1,)]:
            server.run("CREATE EXTENSION dblink")
        yield server


def attack(url: str, query: str, home: Path, timeout_s: float = 20.0) -> str:
    """Run a query as hard as a user could, and return what was said; a row that came through is said too."""
    told: list[str] = []
    context = SourceContext(home, home, {"PG_PASSWORD": PASSWORD}, tell=told.append)
    source = SqlSource(kind="sql", url=url, query=query, name="db", timeout_s=timeout_s, max_rows=50)
    try:
        for one in read_source(source, context):
            if isinstance(one, Item) and not one.origin.startswith("db:id="):
                return f"gave {one}"
    except SourceError as exc:
        assert PASSWORD not in str(exc)
        return str(exc)
    return "gave no error"


def find_wrong(url: str, queries: dict[str, str], trap: Trap, home: Path) -> list[tuple[str, str]]:
    # Only those that shall end by the limit have a short one: a busy machine is slow with the others too.
    limits = {query: 0.4 if "takes too long" in expected else 20.0 for query, expected in queries.items()}
    said = {query: attack(url, trap.fill(query), home, limits[query]) for query in queries}
    return [(query, text) for query, text in said.items() if not re.search(queries[query], text)]


def take_picture(server: Postgres) -> list[object]:
    """Return what a query could have changed."""
    names = sorted(path.name for path in server.folder.iterdir())
    tables = server.run("SELECT relname, relkind FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1")
    objects = server.run("SELECT count(*) FROM pg_largeobject_metadata")
    counter = server.run("SELECT last_value, is_called FROM counter")
    return [names, tables, objects, counter, server.run("SELECT * FROM photos ORDER BY id")]


@pytest.fixture
def sqlite_file(tmp_path: Path) -> Path:
    path = tmp_path / "photos.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE photos (id INTEGER PRIMARY KEY, label TEXT, image BLOB)")
        connection.execute("INSERT INTO photos VALUES (1, 'cat', x'00'), (2, 'dog', x'01')")
    connection.close()
    return path


def test_hostile_statements_are_refused_by_sqlite(sqlite_file: Path, tmp_path: Path, trap: Trap) -> None:
    assert len(SQLITE) + len(POSTGRESQL) >= 50
    before = hashlib.sha256(sqlite_file.read_bytes()).hexdigest()
    assert find_wrong(f"sqlite:///{sqlite_file}", SQLITE, trap, tmp_path) == []
    assert hashlib.sha256(sqlite_file.read_bytes()).hexdigest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.db"]


def test_hostile_statements_of_a_superuser_are_refused_by_postgresql(
    postgres: Postgres, tmp_path: Path, trap: Trap
) -> None:
    before = take_picture(postgres)
    trap.file = postgres.folder / "stolen"
    assert find_wrong(postgres.url(), POSTGRESQL, trap, tmp_path) == []
    assert take_picture(postgres) == before
    assert (trap.tripped, trap.file.exists()) == (0, False)
