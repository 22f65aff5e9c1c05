"""Which queries are one SELECT that only computes, and how far an incremental query has come."""

import json
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloop.errors import SourceError
from visionloop.ingest.database import escape_colons
from visionloop.ingest.sources.sql import Progress, compute_query_digest, read_progress, write_progress
from visionloop.ingest.statement import check_statement
from visionloop.ingest.tables.rows import RowPlan
from visionloop.params import SqlSource

PLAN = RowPlan("url", ("label",), time="taken")


@pytest.mark.parametrize(
    ("dialect", "query", "expected"),
    [
        ("sqlite", "SELECT 1; ;\n", "SELECT 1"),
        ("postgresql", "select 1; -- a;b\n /* c;d */", "select 1"),
        ("postgresql", "WITH a AS (SELECT 1) SELECT * FROM a", None),
        ("postgresql", "(SELECT 1) UNION (SELECT 2)", None),
        ("postgresql", "SELECT 'it''s; DROP', \"update\", a[1], $$;$$ FROM t -- '", None),
        ("sqlite", "SELECT [into], `set` FROM t WHERE glob('*', x) AND replace(y, ';', '')", None),
        ("postgresql", "SELECT inserted_at, last_update, x::int, j->>'a' FROM updates", None),
        ("postgresql", "SELECT E'a\\n', U&'d\\0061' FROM t WHERE x ~ '\\d+'", None),
    ],
)
def test_queries_that_only_read_pass(dialect: str, query: str, expected: str | None) -> None:
    assert check_statement(query, dialect, "source db") == (query if expected is None else expected)


@pytest.mark.parametrize(
    ("dialect", "query", "found"),
    [
        ("sqlite", "", "is empty"),
        ("sqlite", "-- only a comment", "is empty"),
        ("sqlite", "TABLE t", "begins with 'table'"),
        ("sqlite", "SELECT 1 /* open", "comment that is not closed"),
        ("sqlite", 'SELECT "open', "quote that is not closed"),
        ("sqlite", "SELECT (1", "parenthesis that is not closed"),
        ("sqlite", "SELECT [open", "bracket that is not closed"),
        ("sqlite", "SELECT $$a;b$$", "outside of quotes"),
        ("sqlite", "SELECT 1\0", "a NUL"),
        ("mysql", "SELECT 1 /*!50000 INTO OUTFILE '/tmp/x' */", "one that a database may run"),
        ("mariadb", "SELECT 1 /*M! INTO x */", "one that a database may run"),
        ("mysql", "SELECT 1 # '\n; DROP TABLE t", "'#' outside of quotes"),
        ("mysql", "SELECT 5--'\n; DROP TABLE t", "no|none for MySQL"),
        ("mysql", "SELECT 1 INTO OUTFILE '/tmp/x'", "holds INTO"),
        ("mysql", "SELECT load_file('/etc/passwd')", "calls load_file"),
        ("mssql", "SELECT * FROM openrowset(BULK 'x', SINGLE_CLOB)", "calls openrowset"),
        ("mssql", "EXEC xp_cmdshell 'dir'", "begins with 'exec'"),
        ("oracle", "SELECT utl_http(1) FROM dual", "calls utl_http"),
        ("postgresql", "SELECT " + "1," * 60_000 + "1", "longer than 100,000"),
    ],
)
def test_queries_that_do_more_are_refused(dialect: str, query: str, found: str) -> None:
    with pytest.raises(SourceError, match=found) as caught:
        check_statement(query, dialect, "source db")
    assert caught.value.where == "source db query"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=":\\ab '1", max_size=12))
def test_a_colon_stays_a_colon(text: str) -> None:
    assert str(sa.text(escape_colons(text)).compile()) == text


@pytest.mark.parametrize(
    "value",
    [
        7,
        1.5,
        "2026-01-01",
        datetime(2026, 1, 1, 10, 0, 0, 5, UTC),
        datetime(2026, 1, 1),
        date(2026, 1, 1),
        Decimal("1.10"),
    ],
)
def test_a_cursor_comes_back_as_it_was(value: object) -> None:
    text = write_progress(Progress(value, PLAN), "d1", "source db")
    back = read_progress(text, "d1")
    assert back == Progress(value, PLAN)
    assert back is not None
    assert type(back.value) is type(value)
    assert read_progress(text, "d2") is None


@pytest.mark.parametrize("value", [True, float("nan"), b"x", None, [1]])
def test_what_has_no_order_is_no_cursor(value: object) -> None:
    with pytest.raises(SourceError, match="source db cursor: the cursor column holds"):
        write_progress(Progress(value, PLAN), "d1", "source db")


@pytest.mark.parametrize(
    "change",
    [{}, {"kind": "pickle"}, {"value": "x"}, {"plan": {"image": 1, "labels": [], "extra": 2}}, {"plan": None}, []],
)
def test_a_cursor_that_was_changed_by_hand_starts_anew(change: object) -> None:
    state = json.loads(write_progress(Progress(1, PLAN), "d1", "source db"))
    text = json.dumps({**state, **change} if isinstance(change, dict) and change else change)
    assert read_progress(text, "d1") is None
    assert read_progress("{", "d1") is None
    assert read_progress(None, "d1") is None


def test_only_what_changes_rows_changes_the_digest() -> None:
    source = SqlSource(kind="sql", url="sqlite:///a.db", query="SELECT 1", cursor="id")
    same = source.model_copy(update={"url": "sqlite:///b.db", "timeout_s": 5.0, "name": "other"})
    assert compute_query_digest(source) == compute_query_digest(same)
    assert compute_query_digest(source) != compute_query_digest(source.model_copy(update={"query": "SELECT 2"}))
