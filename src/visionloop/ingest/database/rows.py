"""Run a query and give its rows chunk by chunk: a limit for values, an order by the cursor, memory that stays small."""

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from visionloop.errors import SourceError, shorten
from visionloop.ingest.database.connect import Stopwatch, translate_errors

FIRST_CHUNK = 4
CHUNK_BYTES = 32 << 20
SIZE = "visionloop_num_bytes"
SIZED_TYPES = frozenset({17, 25, 1042, 1043})  # of PostgreSQL: bytea, text, char, varchar
WRAPPED = frozenset({"sqlite", "postgresql"})  # what has a size that can be asked for without reading the value


@dataclass(frozen=True)
class Query:
    """A checked query, and how much of it is wanted: rows from `start` of the column `cursor` on, if there is one."""

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
    """Return SQL in which SQLAlchemy finds no parameter: a colon is a colon."""
    return text.replace(":", "\\:")
