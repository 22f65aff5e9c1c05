"""Databases: a connection that can only read, and the rows of a query in chunks.

The text of a query is not judged here. The session is what stops it: it cannot write, has a time limit, and takes one
statement at a time. What a session still allows (a superuser may read the server's files) only the rights of its user
can take away.
"""

import re
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, make_url

from visionloop.errors import SourceError, shorten
from visionloop.secrets import Environment

CONNECT_S = 10
OPERATIONS_BETWEEN_CHECKS = 10_000
# The two databases whose sessions are guarded here have one driver each: others send several statements at once.
DRIVERS = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg", "sqlite": "sqlite+pysqlite"}
DRIVER_OPTIONS: dict[str, dict[str, Any]] = {
    "psycopg": {"connect_timeout": CONNECT_S, "application_name": "visionloop"},
    "mysqldb": {"multi_statements": False},
}
# regexp is written in Python and cannot be interrupted. The others read and write files, where they exist.
FORBIDDEN_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "regexp"})
READ_ALL = "pg_read_all_data"
FIRST_CHUNK = 4
CHUNK_BYTES = 32 << 20
SIZE = "visionloop_num_bytes"
SIZED_TYPES = frozenset({17, 25, 1042, 1043})  # of PostgreSQL: bytea, text, char, varchar
WRAPPED = frozenset({"sqlite", "postgresql"})  # these tell the size of a value without sending it


class Stopwatch:
    """Counts the time that the database works, not the time that we spend between its answers."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._spent_s, self._since = limit_s, 0.0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._spent_s += time.monotonic() - self._since
            self._since = 0.0

    @property
    def left_s(self) -> float:
        return self._limit_s - self._spent_s - (time.monotonic() - self._since if self._since else 0.0)


@dataclass(frozen=True)
class Database:
    """Where a query goes. `place` names it without user, password and options."""

    url: URL
    home: Callable[[str], Path]
    max_value_bytes: int

    @property
    def dialect(self) -> str:
        return self.url.get_backend_name()

    @property
    def place(self) -> str:
        if self.dialect == "sqlite":
            return f"sqlite {self.url.database or ''}"
        port = f":{self.url.port}" if self.url.port else ""
        return f"{self.dialect} {self.url.host or 'localhost'}{port}/{self.url.database or ''}"

    @contextmanager
    def open(self, stopwatch: Stopwatch, where: str, tell: Callable[[str], None]) -> Iterator[Connection]:
        """Open a session that can only read; at the end it is rolled back and closed.

        Raises:
            SourceError: the driver is missing, or the database cannot be reached.
        """
        with translate_errors(f"{where} {self.place}", stopwatch):
            engine = self._make_engine(where)
        try:
            with translate_errors(f"{where} {self.place}", stopwatch):
                connection = engine.connect()
            try:
                with translate_errors(f"{where} {self.place}", stopwatch):
                    connection = self._make_read_only(connection, stopwatch, f"{where} {self.place}", tell)
                yield connection
            finally:
                connection.close()  # and rolled back by that
        finally:
            engine.dispose()

    def _make_engine(self, where: str) -> sa.Engine:
        if self.dialect == "sqlite":
            path = self._find_file(where)
            return sa.create_engine("sqlite+pysqlite://", creator=lambda: _open_file(path), poolclass=sa.NullPool)
        options = DRIVER_OPTIONS.get(self.url.get_driver_name(), {})
        return sa.create_engine(self.url, poolclass=sa.NullPool, hide_parameters=True, connect_args=options)

    def _find_file(self, where: str) -> Path:
        """Return the file of an SQLite URL. Raises SourceError."""
        name = self.url.database or ""
        if not name or name == ":memory:" or name.startswith("file:") or self.url.query:
            raise SourceError(f"{where} url", "names no plain file", "sqlite:///PATH", "Edit params.yaml.")
        path = self.home(name)
        if not path.is_file():
            raise SourceError(f"{where} {path}", "is no file", "an SQLite database", "Check the path.")
        return path

    def _make_read_only(
        self, connection: Connection, stopwatch: Stopwatch, where: str, tell: Callable[[str], None]
    ) -> Connection:
        if self.dialect == "sqlite":
            dbapi: Any = connection.connection.dbapi_connection
            _guard_sqlite(dbapi, stopwatch, self.max_value_bytes)
        elif self.dialect == "postgresql":
            connection = connection.execution_options(postgresql_readonly=True, isolation_level="REPEATABLE READ")
            _guard_postgresql(connection, stopwatch, where, tell)
        elif self.dialect in {"mysql", "mariadb"}:
            connection.exec_driver_sql("SET SESSION TRANSACTION READ ONLY")
            connection.rollback()
        else:
            tell(f"{where}: {self.dialect} has no read-only session; connect as a user that may only SELECT")
        return connection


def make_database(text: str, environment: Environment, home: Callable[[str], Path], max_value_bytes: int) -> Database:
    """Parse the URL of a database; `${NAME}` may stand for the whole or for its parts. Raises SourceError."""
    whole = environment.expand(text) if text.startswith("${") and text.find("}") == len(text) - 1 else text
    try:
        url = make_url(whole)
        name = url.drivername
        url = url.set(drivername=DRIVERS.get(name.split("+")[0], name))
        if whole is text:
            parts = {key: getattr(url, key) for key in ("username", "password", "host", "database")}
            expanded: dict[str, Any] = {key: environment.expand(value) for key, value in parts.items() if value}
            expanded["query"] = {key: _expand_option(value, environment) for key, value in url.query.items()}
            url = url.set(**expanded)
    except (sa.exc.ArgumentError, ValueError) as exc:
        if isinstance(exc, SourceError):
            raise
        expected = "DIALECT://USER:${PASSWORD}@HOST/DATABASE"
        raise SourceError(f"{environment.where} url", "is no URL of a database", expected, "Edit it.") from None
    if url.password:
        environment.secrets.add(str(url.password))
    return Database(url, home, max_value_bytes)


def _expand_option(value: str | tuple[str, ...], environment: Environment) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return environment.expand(value)
    return tuple(environment.expand(one) for one in value)


def _open_file(path: Path) -> sqlite3.Connection:
    # Batches may be asked for by different threads, one after the other.
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro", uri=True, check_same_thread=False, timeout=CONNECT_S
    )
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


def _guard_sqlite(connection: sqlite3.Connection, stopwatch: Stopwatch, max_value_bytes: int) -> None:
    """Let the connection run nothing but SELECT. A schema with functions of its own is not trusted."""
    for pragma in ("query_only = ON", "trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4 * max_value_bytes)
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_FUNCTION:
            return sqlite3.SQLITE_DENY if (second or "").lower() in FORBIDDEN_FUNCTIONS else sqlite3.SQLITE_OK
        return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    connection.set_progress_handler(lambda: int(stopwatch.left_s <= 0), OPERATIONS_BETWEEN_CHECKS)


def _guard_postgresql(connection: Connection, stopwatch: Stopwatch, where: str, tell: Callable[[str], None]) -> None:
    """Begin a READ ONLY transaction with limits; a superuser, whom nothing else would stop, steps down."""
    limit_ms = max(1, round(stopwatch.left_s * 1000))
    for setting in (
        f"statement_timeout = {limit_ms}",
        f"lock_timeout = {limit_ms}",
        "idle_in_transaction_session_timeout = 0",
        "standard_conforming_strings = on",
    ):
        connection.exec_driver_sql(f"SET LOCAL {setting}")
    if connection.exec_driver_sql("SHOW transaction_read_only").scalar() != "on":
        raise SourceError(where, "gives no read-only transaction", "one", "Connect without a pooler that rewrites it.")
    query = f"SELECT rolsuper, to_regrole('{READ_ALL}') IS NOT NULL FROM pg_roles WHERE rolname = current_user"
    is_superuser, has_role = connection.exec_driver_sql(query).one()
    if is_superuser and has_role:
        connection.exec_driver_sql(f"SET LOCAL ROLE {READ_ALL}")
        tell(f"{where}: connected as a superuser, reads as {READ_ALL}; better make a user that may only SELECT")
    elif is_superuser:
        tell(f"{where}: connected as a superuser; make a user that may only SELECT")


@contextmanager
def translate_errors(where: str, stopwatch: Stopwatch) -> Iterator[None]:
    """Turn what a database or its driver raises into a SourceError of one line, and count the time."""
    try:
        with stopwatch.running():
            yield
    except sa.exc.NoSuchModuleError as exc:
        raise SourceError(where, "is of a kind that SQLAlchemy does not know", "a known dialect", "Edit it.") from exc
    except ModuleNotFoundError as exc:
        todo = "Install it, or name another in the URL: mysql+pymysql://..."
        raise SourceError(where, f"the driver {exc.name} is not installed", "the database's driver", todo) from exc
    except sa.exc.SQLAlchemyError as exc:
        origin = getattr(exc, "orig", None) or exc
        raise _translate(where, origin, stopwatch) from exc
    except (sqlite3.Error, UnicodeError, OverflowError) as exc:
        raise _translate(where, exc, stopwatch) from exc


def _translate(where: str, exc: BaseException, stopwatch: Stopwatch) -> SourceError:
    message = " ".join(str(exc).split())[:300] or type(exc).__name__
    if stopwatch.left_s <= 0 or getattr(exc, "sqlstate", None) == "57014" or message == "interrupted":
        return SourceError(
            where, "the query takes too long", "an end within timeout_s", "Narrow it, or raise timeout_s."
        )
    if getattr(exc, "sqlstate", None) == "25006" or "not authorized" in message or "readonly" in message:
        return SourceError(
            where, f"the query would do more than read ({message})", "a query that only reads", "Edit it."
        )
    if "too big" in message:
        return SourceError(where, f"a value is too large ({message})", "smaller values", "Raise ingest.max_file_bytes.")
    return SourceError(where, f"the database says: {message}", "rows", "Check `url` and `query`.")


@dataclass(frozen=True)
class SqlQuery:
    """A query. With `cursor`, only rows whose value in that column is at least `start`, in the order of that column."""

    text: str
    dialect: str
    where: str
    max_value_bytes: int
    chunk_rows: int
    cursor: str | None = None
    start: object = None

    def read(self, connection: Connection, stopwatch: Stopwatch) -> Generator[tuple[dict[str, Any], bool], None, None]:
        """Yield each row, and whether a value of it was too large and left out. Raises SourceError."""
        statement, values = self._make_statement(connection, stopwatch)
        options = {"stream_results": True, "max_row_buffer": self.chunk_rows}
        with translate_errors(self.where, stopwatch):
            result = connection.execute(statement, values, execution_options=options)
            columns = [name for name in result.keys() if name != SIZE]  # noqa: SIM118  (it is no mapping)
        try:
            num_rows = min(FIRST_CHUNK, self.chunk_rows)
            while True:
                with translate_errors(self.where, stopwatch):
                    chunk = result.fetchmany(num_rows)
                if not chunk:
                    return
                if stopwatch.left_s <= 0:
                    found = "the query takes too long"
                    raise SourceError(self.where, found, "an end within timeout_s", "Narrow it, or raise timeout_s.")
                largest = 1
                for values_of_row in chunk:
                    row = dict(zip(columns, values_of_row, strict=False))
                    size = int(values_of_row[-1] or 0) if self.dialect in WRAPPED else _count_bytes(row)
                    largest = max(largest, min(size, self.max_value_bytes))
                    yield row, size > self.max_value_bytes
                num_rows = max(1, min(self.chunk_rows, 4 * num_rows, CHUNK_BYTES // largest))
        finally:
            result.close()

    def _make_statement(self, connection: Connection, stopwatch: Stopwatch) -> tuple[sa.TextClause, dict[str, object]]:
        if self.dialect not in WRAPPED and self.cursor is None:
            return sa.text(escape_colons(self.text)), {}
        inner = f"(\n{escape_colons(self.text)}\n) AS q"
        quote = connection.dialect.identifier_preparer.quote_identifier
        shown, values = "q.*", dict[str, object]()
        if self.dialect in WRAPPED:
            columns = self._list_columns(connection, stopwatch, inner)
            shown = _limit_values(self.dialect, {escape_colons(quote(name)): kind for name, kind in columns.items()})
            values["max_value_bytes"] = self.max_value_bytes
        statement = f"SELECT {shown} FROM {inner}"
        if self.cursor is not None:
            column = f"q.{escape_colons(quote(self.cursor))}"
            if self.start is not None:
                statement += f" WHERE {column} >= :start OR {column} IS NULL"
                values["start"] = self.start
            statement += f" ORDER BY {column}"
        return sa.text(statement), values

    def _list_columns(self, connection: Connection, stopwatch: Stopwatch, inner: str) -> Mapping[str, Any]:
        """Return the columns of the query and their types, without running it. Raises SourceError."""
        # A bound value makes PostgreSQL parse one statement and no more, whatever the text holds.
        with translate_errors(self.where, stopwatch):
            result = connection.execute(sa.text(f"SELECT * FROM {inner} LIMIT :nothing"), {"nothing": 0})
            described = [(str(part[0]), part[1]) for part in result.cursor.description] if result.cursor else []
            result.close()
        # SQLite calls the second of two columns `id` by the name `id:1`.
        names = [re.sub(r":\d+$", "", name) if self.dialect == "sqlite" else name for name, _ in described]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found = f"has two columns named {shorten(twice)}"
            raise SourceError(f"{self.where} query", found, "a name for each", "Name them apart with AS.")
        if self.cursor is not None and self.cursor not in names:
            found, expected = f"no column {self.cursor!r} in the query", f"one of {shorten(names)}"
            raise SourceError(f"{self.where} cursor", found, expected, "Edit it, or select that column.")
        return dict(described)


def _limit_values(dialect: str, columns: Mapping[str, Any]) -> str:
    """Return what is selected: each column, NULL where it is too large, and the size of the largest."""
    sizes = {name: f"coalesce({_size(dialect, f'q.{name}', kind)}, 0)" for name, kind in columns.items()}
    shown = [
        f"CASE WHEN {size} > :max_value_bytes THEN NULL ELSE q.{name} END AS {name}" for name, size in sizes.items()
    ]
    largest = "max" if dialect == "sqlite" else "greatest"
    return ", ".join([*shown, f"{largest}(0, {', '.join(sizes.values())}) AS {SIZE}"])


def _size(dialect: str, column: str, kind: Any) -> str:
    if dialect == "sqlite":
        return f"length({column})"
    return f"octet_length({column})" if kind in SIZED_TYPES else f"pg_column_size({column})"


def _count_bytes(row: Mapping[str, Any]) -> int:
    return max((len(value) for value in row.values() if isinstance(value, str | bytes | memoryview)), default=0)


def escape_colons(text: str) -> str:
    """Escape colons, so that SQLAlchemy takes none of them for the start of a parameter."""
    return text.replace(":", "\\:")
