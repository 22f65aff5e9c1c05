"""Hostile queries: each is refused, by our reading of the statement and, without that, by the database itself.

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
from visionloop.ingest.sources import Item, Reading, read_source
from visionloop.params import SqlSource

# FILE is a path that must not come to be; TRIP the port of a listener on loopback that nobody may reach.
COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
TO_XML = "query_to_xml('DELETE FROM photos', true, true, '')"
SQLITE = {
    "INSERT INTO photos VALUES (9, 'x', x'00')": "begins with 'insert'",
    "UPDATE photos SET label = 'x'": "begins with 'update'",
    "REPLACE INTO photos VALUES (1, 'x', x'00')": "begins with 'replace'",
    "WITH gone AS (SELECT 1) DELETE FROM photos": "holds DELETE",
    "/* SELECT */ DROP TABLE photos": "begins with 'drop'",
    "CREATE TABLE stolen AS SELECT * FROM photos": "begins with 'create'",
    "SELECT 1 AS image; DELETE FROM photos": "more than one statement",
    "SELECT 1) AS q; DELETE FROM photos; SELECT * FROM (SELECT 1": "closes a parenthesis",
    "SELECT ';' AS image; -- '\nDELETE FROM photos": "more than one statement",
    "SELECT 1 /* /* */ AS image; DELETE FROM photos -- */": "comment inside a comment",
    "SELECT [a;b] AS image, 'x; DELETE FROM photos": "quote that is not closed",
    "ATTACH DATABASE 'FILE' AS other": "begins with 'attach'",
    "VACUUM INTO 'FILE'": "begins with 'vacuum'",
    "PRAGMA writable_schema = ON": "begins with 'pragma'",
    "BEGIN IMMEDIATE": "begins with 'begin'",
    "EXPLAIN SELECT 1": "begins with 'explain'",
    "SELECT load_extension('FILE') AS image": "calls load_extension",
    "SELECT \"writefile\"('FILE', 'x') AS image": "calls writefile",
    "SELECT readfile ('/etc/passwd') AS image": "calls readfile",
    "SELECT fts3_tokenizer('simple', x'4141414141414141') AS image": "calls fts3_tokenizer",
    "SELECT * FROM pragma_database_list": "more than read|no such table|authorized",
    "SELECT 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab' REGEXP '(a+)+$' AS image": "more than read",
    "SELECT zeroblob(1000000000) AS image, 'x' AS label": "too large",
    f"{COUNT} SELECT max(i) AS image FROM n": "takes too long",
    f"{COUNT} SELECT i AS id, 'x' AS label, x'00' AS image FROM n": "more than 50 rows",
}
POSTGRESQL = {
    "INSERT INTO photos VALUES (9, 'x', '')": "begins with 'insert'",
    "TRUNCATE photos": "begins with 'truncate'",
    "WITH gone AS (DELETE FROM photos RETURNING *) SELECT * FROM gone": "holds DELETE",
    "WITH more AS (INSERT INTO photos VALUES (9, 'x', '') RETURNING *) SELECT * FROM more": "holds INSERT",
    "SELECT * INTO stolen FROM photos": "holds INTO",
    "SELECT * FROM photos FOR UPDATE": "holds UPDATE",
    "SELECT * FROM photos FOR SHARE": "more than read",
    "SELECT 1 AS image; DROP TABLE photos": "more than one statement",
    "SELECT $a$ $b$ $a$ AS image; DROP TABLE photos; SELECT $b$ $b$": "more than one statement",
    "SELECT '\\'; DROP TABLE photos; --' AS image": "backslash",
    "SELECT E'\\'; DROP TABLE photos; --' AS image": "backslash",
    "SELECT 1) q; COMMIT; DROP TABLE photos; --": "closes a parenthesis",
    "COPY photos TO PROGRAM 'touch FILE'": "begins with 'copy'",
    "COPY (SELECT 1) TO 'FILE'": "begins with 'copy'",
    "DO $$ BEGIN DELETE FROM photos; END $$": "begins with 'do'",
    "CALL noise()": "begins with 'call'",
    "SELECT noise() AS image": "more than read",
    "SELECT nextval('counter') AS image": "calls nextval",
    "SELECT \"setval\"('counter', 99) AS image": "begins with|calls setval|more than read",
    "SELECT pg_read_file('/etc/passwd') AS image": "calls pg_read_file",
    "SELECT pg_catalog . pg_ls_dir('/') AS image": "calls pg_ls_dir",
    "SELECT U&\"pg\\005fread_file\"('/etc/passwd') AS image": "backslash",
    "SELECT lo_export(lo_from_bytea(0, 'x'), 'FILE') AS image": "calls lo_export",
    "SELECT lo_import('/etc/passwd') AS image": "calls lo_import",
    "SELECT * FROM dblink('host=127.0.0.1 port=TRIP', 'SELECT 1') AS t(image text)": "calls dblink",
    "SELECT dblink_connect('host=127.0.0.1 port=TRIP') AS image": "calls dblink_connect",
    "SELECT set_config('transaction_read_only', 'off', true) AS image": "calls set_config",
    f"WITH a AS (SELECT set_config('role', 'none', true)) SELECT {TO_XML} AS image FROM a": "calls set_config",
    f"SELECT {TO_XML} AS image": "calls query_to_xml",
    "SELECT pg_terminate_backend(pg_backend_pid()) AS image": "calls pg_terminate_backend",
    "SELECT pg_sleep(30) AS image": "calls pg_sleep",
    "SELECT count(*) AS image FROM generate_series(1, 100000000000)": "takes too long",
    "SELECT repeat('x', 1000000000) AS image, 'x' AS label": "takes too long|too large|says",
    f"{COUNT} SELECT i AS id, 'x' AS label, '\\x00'::bytea AS image FROM n": "more than 50 rows",
}
# Without our reading of the statement these would run; they read, wait or lock, and change nothing.
HARMLESS = {"EXPLAIN SELECT 1", "SELECT set_config('transaction_read_only', 'off', true) AS image"}


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


def attack(url: str, query: str, home: Path) -> str:
    """Run a query as hard as a user could, and return what was said; a row that came through is said too."""
    told: list[str] = []
    reading = Reading(home, home, {"PG_PASSWORD": PASSWORD}, tell=told.append)
    source = SqlSource(kind="sql", url=url, query=query, name="db", timeout_s=0.4, max_rows=50)
    try:
        for one in read_source(source, reading):
            if isinstance(one, Item) and not one.origin.startswith("db:id="):
                return f"gave {one}"
    except SourceError as exc:
        assert PASSWORD not in str(exc)
        return str(exc)
    return "gave no error"


def find_wrong(url: str, queries: dict[str, str], trap: Trap, home: Path) -> list[tuple[str, str]]:
    said = {query: attack(url, trap.fill(query), home) for query in queries}
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


def test_fifty_hostile_statements_are_refused_by_sqlite(sqlite_file: Path, tmp_path: Path, trap: Trap) -> None:
    assert len(SQLITE) + len(POSTGRESQL) >= 50
    before = hashlib.sha256(sqlite_file.read_bytes()).hexdigest()
    assert find_wrong(f"sqlite:///{sqlite_file}", SQLITE, trap, tmp_path) == []
    assert hashlib.sha256(sqlite_file.read_bytes()).hexdigest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.db"]


def test_fifty_hostile_statements_are_refused_by_postgresql(postgres: Postgres, tmp_path: Path, trap: Trap) -> None:
    before = take_picture(postgres)
    trap.file = postgres.folder / "stolen"
    assert find_wrong(postgres.url(), POSTGRESQL, trap, tmp_path) == []
    assert take_picture(postgres) == before
    assert (trap.tripped, trap.file.exists()) == (0, False)


def test_sqlite_refuses_them_itself(
    sqlite_file: Path, tmp_path: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visionloop.ingest.sources.sql.check_statement", lambda query, dialect, where: query)
    before = hashlib.sha256(sqlite_file.read_bytes()).hexdigest()
    refused = dict.fromkeys(set(SQLITE) - HARMLESS, "^source db")
    assert find_wrong(f"sqlite:///{sqlite_file}", refused, trap, tmp_path) == []
    assert hashlib.sha256(sqlite_file.read_bytes()).hexdigest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.db"]


def test_postgresql_refuses_them_itself_even_a_superuser(
    postgres: Postgres, tmp_path: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visionloop.ingest.sources.sql.check_statement", lambda query, dialect, where: query)
    before = take_picture(postgres)
    trap.file = postgres.folder / "stolen"
    refused = dict.fromkeys(set(POSTGRESQL) - HARMLESS, "^source db")
    assert find_wrong(postgres.url(), refused, trap, tmp_path) == []
    assert take_picture(postgres) == before
    assert (trap.tripped, trap.file.exists()) == (0, False)
