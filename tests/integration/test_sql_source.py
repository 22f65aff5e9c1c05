"""Queries of SQLite and a real PostgreSQL: paths, URLs, blobs, chunk by chunk, from where the last pull ended."""

import json
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from fakes import make_image
from http_server import Answer, serve
from postgres_server import PASSWORD, Postgres, run_postgres
from source_runs import Run
from visionloop.errors import ImageError
from visionloop.ingest.pull import pull
from visionloop.ingest.sources import SourceContext
from visionloop.params import SqlSource, make_params
from visionloop.settings import load_settings
from visionloop.store import LocalStore
from visionloop.workspace import connect

MAX_BYTES = 1_000_000


class Database(Protocol):
    """A database with one table: photos(id, label, taken, image, path)."""

    blob: str
    now: str

    @property
    def url(self) -> str: ...

    def run(self, *statements: str) -> list[tuple[object, ...]]: ...


@dataclass
class Sqlite:
    path: Path
    blob: str = "zeroblob({})"
    now: str = "'2026-01-01 10:00:00'"

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    def run(self, *statements: str) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        with sqlite3.connect(self.path) as connection:
            for statement in statements:
                rows = connection.execute(statement).fetchall()
        connection.close()
        return rows


@dataclass
class PostgreSQL:
    server: Postgres
    blob: str = "decode(repeat('00', {}), 'hex')"
    now: str = "timestamptz '2026-01-01 10:00:00+00'"

    @property
    def url(self) -> str:
        return self.server.url("reader")

    def run(self, *statements: str) -> list[tuple[object, ...]]:
        return self.server.run(*statements)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with run_postgres() as server:
        server.run(f"CREATE USER reader PASSWORD '{PASSWORD}'", "GRANT pg_read_all_data TO reader")
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    database: Database
    if request.param == "sqlite":
        database, kinds = Sqlite(tmp_path / "photos.db"), ("integer", "text", "blob")
    else:
        database, kinds = PostgreSQL(request.getfixturevalue("postgres")), ("bigint", "timestamptz", "bytea")
    table = "CREATE TABLE photos (id {} PRIMARY KEY, label text, taken {}, image {}, path text)".format(*kinds)
    database.run("DROP TABLE IF EXISTS photos", table)
    return database


def literal(database: Database, data: bytes) -> str:
    return f"'\\x{data.hex()}'" if isinstance(database, PostgreSQL) else f"x'{data.hex()}'"


def insert(database: Database, first: int, last: int) -> None:
    values = ", ".join(
        f"({i}, '{'cat' if i % 2 else 'dog'}', {database.now}, {literal(database, make_image(i))}, 'p/{i}.png')"
        for i in range(first, last)
    )
    database.run(f"INSERT INTO photos VALUES {values}")


class Result(Run):
    """What a query gave, and what was told on the way."""

    def __init__(self, database: Database, home: Path, query: str, pulled: str | None = None, **keys: Any) -> None:
        super().__init__()
        env = keys.pop("env", {"PG_PASSWORD": PASSWORD, "VISIONLOOP_PRIVATE_HOSTS": "127.0.0.1"})
        limits = make_params({"name": "x", "ingest": keys.pop("limits", {})}).ingest
        context = SourceContext(home, home, env, limits, pulled, self.told.append)
        source = SqlSource(kind="sql", url=keys.pop("url", database.url), query=query, name="db", **keys)
        self.take(source, context)

    @property
    def origins(self) -> list[str]:
        return [item.origin for item in self.items]

    @property
    def cursor(self) -> str:
        assert self.error is None
        return self.cursors[0].value


def test_blobs_come_in_the_order_of_the_query(database: Database, tmp_path: Path) -> None:
    insert(database, 0, 9)
    result = Result(
        database,
        tmp_path,
        "SELECT id, label, taken AS time, image FROM photos WHERE '12:30' <> '100%' ORDER BY id DESC -- a; b\n;\n",
    )
    assert result.error is None
    assert result.origins == [f"db:id={i}" for i in range(8, -1, -1)]
    assert [item.labels for item in result.items[:2]] == [("dog",), ("cat",)]
    assert result.items[0].captured_at == "2026-01-01T10:00:00+00:00"
    assert [item.read(MAX_BYTES) for item in result.items] == [make_image(i) for i in range(8, -1, -1)]
    assert len({item.stamp for item in result.items}) == 9
    assert result.cursors == []
    assert result.told == [
        "source db: columns guessed: image = image, label = label, time = time (name them under `columns` to be sure)"
    ]


def test_a_blob_is_let_go_once_it_was_read(database: Database, tmp_path: Path) -> None:
    insert(database, 0, 2)
    item = Result(database, tmp_path, "SELECT image, label FROM photos ORDER BY id").items[0]
    assert item.origin.startswith("db:blob ")  # without a key, its digest
    assert (item.read(MAX_BYTES), item.read(MAX_BYTES)) == (make_image(0), b"")


def test_paths_lie_in_the_folder_and_nowhere_else(database: Database, tmp_path: Path) -> None:
    insert(database, 0, 4)
    folder = tmp_path / "images"
    (folder / "p").mkdir(parents=True)
    for i in range(3):
        (folder / "p" / f"{i}.png").write_bytes(make_image(i))
    database.run(
        f"UPDATE photos SET path = '{folder}/p/1.png' WHERE id = 1",
        "UPDATE photos SET path = '/etc/passwd' WHERE id = 2",
    )
    query = "SELECT id, path, label FROM photos ORDER BY id"
    result = Result(database, tmp_path, query, images="images")
    assert result.origins == ["db:p/0.png", "db:p/1.png"]
    assert result.items[1].read(MAX_BYTES) == make_image(1)
    assert {r.origin: r.code for r in result.rejected} == {"db:id=2": "unsafe_path", "db:id=3": "row_without_image"}
    assert "its rows hold paths; expected `images`" in str(Result(database, tmp_path, query).error)


def test_urls_are_fetched_from_the_hosts(database: Database, tmp_path: Path) -> None:
    insert(database, 0, 2)
    with serve({"/p/0.png": Answer(make_image(0))}) as site:
        query = f"SELECT id, label, '{site.url}/' || path AS url, 'v1' AS etag FROM photos ORDER BY id"
        result = Result(database, tmp_path, query, hosts=(site.host,))
        assert [(item.origin, item.stamp) for item in result.items] == [
            (f"db:{site.host}/p/{i}.png", "etag v1") for i in range(2)
        ]
        assert result.items[0].read(MAX_BYTES) == make_image(0)
        with pytest.raises(ImageError, match="answered 404"):
            result.items[1].read(MAX_BYTES)
        assert {r.code for r in Result(database, tmp_path, query).rejected} == {"refused_url"}


def test_a_later_pull_asks_from_the_last_value_on(database: Database, tmp_path: Path) -> None:
    insert(database, 0, 5)
    query = "SELECT * FROM photos"
    first = Result(database, tmp_path, query, cursor="id")
    assert len(first.items) == 5
    state = json.loads(first.cursor)
    assert (state["kind"], state["value"]) == ("int", 4)
    insert(database, 5, 8)
    second = Result(database, tmp_path, query, pulled=first.cursor, cursor="id")
    assert second.origins == [f"db:id={i}" for i in range(4, 8)]
    assert second.told == [], "what columns mean is remembered, not guessed from fewer rows"
    third = Result(database, tmp_path, query, pulled=second.cursor, cursor="id")
    assert (third.origins, third.cursor) == (["db:id=7"], second.cursor)
    database.run("DELETE FROM photos")
    empty = Result(database, tmp_path, query, pulled=second.cursor, cursor="id")
    assert (empty.origins, empty.cursor) == ([], second.cursor)
    changed = Result(database, tmp_path, "SELECT * FROM photos WHERE id < 3", pulled=second.cursor, cursor="id")
    assert changed.told[0] == "source db: the query, its columns or its cursor changed: read from the start"


def test_ties_and_rows_without_a_value_are_offered_again(database: Database, tmp_path: Path) -> None:
    insert(database, 0, 3)
    query = "SELECT id, label, taken, image FROM photos"
    first = Result(database, tmp_path, query, cursor="taken")
    insert(database, 3, 4)  # at the same time as the others
    database.run("UPDATE photos SET taken = NULL WHERE id = 0")
    second = Result(database, tmp_path, query, pulled=first.cursor, cursor="taken")
    assert sorted(second.origins) == [f"db:id={i}" for i in range(4)]
    assert json.loads(second.cursor) == json.loads(first.cursor)
    assert json.loads(second.cursor)["kind"] == ("str" if isinstance(database, Sqlite) else "datetime")


def test_pulls_go_into_the_dataset(database: Database, tmp_path: Path) -> None:
    home = tmp_path / "ws"
    home.mkdir()
    (home / "params.yaml").write_text("name: pets\n")
    source = {"kind": "sql", "url": database.url, "query": "SELECT * FROM photos", "name": "db", "cursor": "id"}
    params = make_params({"name": "pets", "ingest": {"sources": [source]}})
    settings, store = load_settings({}, home), LocalStore(tmp_path / "store")
    insert(database, 0, 6)
    added = []
    for number in (6, 9, 9):
        report = pull(
            connect(settings, params, store=store),
            sources=params.ingest.sources,
            now="2026-01-01T00:00:00+00:00",
            env={"PG_PASSWORD": PASSWORD},
        )
        added.append((report.version.version, report.num_added, report.version.num_images))
        if number == 6:
            insert(database, 6, 9)
    assert added == [(1, 6, 6), (2, 3, 9), (2, 0, 9)]


def test_the_row_cap(database: Database, tmp_path: Path) -> None:
    insert(database, 0, 6)
    query = "SELECT * FROM photos"
    capped = Result(database, tmp_path, query, max_rows=5)
    assert "gives more than 5 rows; expected at most 5. Narrow it, raise max_rows, or name a `cursor`." in str(
        capped.error
    )
    assert len(Result(database, tmp_path, query, max_rows=6).items) == 6
    first = Result(database, tmp_path, query, max_rows=4, cursor="id")
    assert (len(first.items), first.told[-1]) == (
        4,
        "source db: took 4 rows (max_rows); the next pull goes on from there",
    )
    rest = Result(database, tmp_path, query, pulled=first.cursor, max_rows=4, cursor="id")
    assert rest.origins == ["db:id=3", "db:id=4", "db:id=5"]
    stuck = Result(database, tmp_path, query, pulled=None, max_rows=4, cursor="taken").cursor
    assert "more than 4 rows" in str(Result(database, tmp_path, query, pulled=stuck, max_rows=4, cursor="taken").error)


def test_a_value_that_is_too_large_is_left_in_the_database(database: Database, tmp_path: Path) -> None:
    insert(database, 0, 3)
    database.run(f"UPDATE photos SET image = {database.blob.format(3000)} WHERE id = 1")
    result = Result(database, tmp_path, "SELECT * FROM photos ORDER BY id", limits={"max_file_bytes": 2048})
    assert result.origins == ["db:id=0", "db:id=2"]
    assert [(r.origin, r.code) for r in result.rejected] == [("db:id=1", "too_large")]


def test_rows_are_streamed_in_chunks_that_fit_in_memory(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.engine import CursorResult

    asked: list[int] = []
    fetchmany = CursorResult.fetchmany

    def record(self: Any, size: int | None = None) -> Any:
        asked.append(size or 0)
        return fetchmany(self, size)

    monkeypatch.setattr(CursorResult, "fetchmany", record)
    insert(database, 0, 40)
    assert len(Result(database, tmp_path, "SELECT * FROM photos", chunk_rows=20).items) == 40
    assert asked == [4, 16, 20, 20]
    asked.clear()
    monkeypatch.setattr("visionloop.ingest.database.CHUNK_BYTES", 3000)
    assert len(Result(database, tmp_path, "SELECT * FROM photos", chunk_rows=20).items) == 40
    assert max(asked) == 4


@pytest.mark.parametrize(
    ("query", "keys", "message"),
    [
        ("SELECT nope FROM photos", {}, "the database says: .*nope"),
        ("SELECT 1," + "1," * 60_000 + "1", {}, "query: is too long or holds a NUL; expected at most 100,000 c"),
        ("SELECT 1\0", {}, "holds a NUL"),
        (" ; ", {}, "the database says: .*syntax"),
        ("SELECT * FROM photos WHERE", {}, "the database says: .*(syntax|incomplete)"),
        ("SELECT id, id FROM photos", {}, "has two columns named id"),
        ("SELECT * FROM photos", {"cursor": "nope"}, "no column 'nope' in the query; expected one of id, image, label"),
        ("SELECT * FROM photos WHERE id < 0", {}, "has no row"),
        ("SELECT * FROM photos", {"columns": {"label": "kind"}}, "no column 'kind'"),
        ("SELECT * FROM photos", {"url": "postgresql://reader:${NO_SUCH}@127.0.0.1/x"}, "NO_SUCH is not set"),
        ("SELECT * FROM photos", {"url": "nosuch://host/x"}, "of a kind that SQLAlchemy does not know"),
        ("SELECT * FROM photos", {"url": "mysql://host/x"}, "the driver MySQLdb is not installed"),
        ("SELECT * FROM photos", {"url": "no url"}, "is no URL of a database"),
        ("SELECT * FROM photos", {"url": "sqlite:///none.db"}, "none.db: is no file"),
        ("SELECT * FROM photos", {"url": "sqlite://"}, "names no plain file"),
        ("SELECT * FROM photos", {"url": "postgresql://reader@127.0.0.1:1/x"}, "Connection refused"),
    ],
)
def test_what_cannot_be_queried(
    database: Database, tmp_path: Path, query: str, keys: dict[str, Any], message: str
) -> None:
    insert(database, 0, 2)
    assert re.search(message, str(Result(database, tmp_path, query, **keys).error)), message


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "photos.db").write_bytes(b"not a database" * 100)
    result = Result(Sqlite(tmp_path / "photos.db"), tmp_path, "SELECT * FROM photos")
    assert "file is not a database" in str(result.error)


def test_passwords_are_never_shown(postgres: Postgres, tmp_path: Path) -> None:
    database = PostgreSQL(postgres)
    for url, env in [
        (postgres.url("reader"), {"PG_PASSWORD": "wr0ng/pass"}),
        (postgres.url("reader", "wr0ng%2Fpass"), {}),
        ("${URL}", {"URL": postgres.url("reader", "wr0ng%2Fpass")}),
        (
            f"postgresql://127.0.0.1:{postgres.port}/postgres?user=reader&password=${{PG_PASSWORD}}",
            {"PG_PASSWORD": "wr0ng"},
        ),
    ]:
        error = Result(database, tmp_path, "SELECT 1 AS image", url=url, env=env).error
        assert error is not None
        assert "password authentication failed" in str(error)
        assert f"postgresql 127.0.0.1:{postgres.port}/postgres" in str(error) or url == "${URL}"
        assert "wr0ng" not in f"{error}{error.__cause__}"
        assert error.__suppress_context__


def test_what_comes_from_the_environment_is_masked(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.url("reader").replace("/postgres", "/${DATABASE}")
    env = {"PG_PASSWORD": PASSWORD, "DATABASE": "hidden_name"}
    error = Result(PostgreSQL(postgres), tmp_path, "SELECT 1 AS image", url=url, env=env).error
    assert 'database "***" does not exist' in str(error)
    assert "hidden_name" not in str(error)


def test_a_superuser_steps_down(postgres: Postgres, tmp_path: Path) -> None:
    database = PostgreSQL(postgres)
    database.run("DROP TABLE IF EXISTS photos", "CREATE TABLE photos (id int, label text, image bytea)")
    query = "SELECT current_user AS label, session_user AS key, '\\x00'::bytea AS image"
    result = Result(database, tmp_path, query, url=postgres.url())
    assert [(item.origin, item.labels) for item in result.items] == [("db:key=postgres", ("pg_read_all_data",))]
    assert "connected as a superuser, reads as pg_read_all_data" in result.told[0]
