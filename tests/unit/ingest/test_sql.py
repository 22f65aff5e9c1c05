"""Drivers and sessions of databases, and how far an incremental query has come."""

import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloop.errors import SourceError
from visionloop.ingest.database import Stopwatch, escape_colons, make_database
from visionloop.ingest.sources.sql import CursorState, compute_query_digest, read_progress, write_progress
from visionloop.ingest.tables.rows import RowPlan
from visionloop.params import SqlSource
from visionloop.secrets import Environment

PLAN = RowPlan("url", ("label",), time="taken")


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgres://h/d", "postgresql+psycopg"),
        ("postgresql+psycopg2://h/d", "postgresql+psycopg"),
        ("sqlite+aiosqlite:///a.db", "sqlite+pysqlite"),
        ("mysql+pymysql://h/d", "mysql+pymysql"),
    ],
)
def test_a_guarded_database_has_the_driver_that_takes_one_statement(url: str, driver: str) -> None:
    assert make_database(url, Environment({}, "source db"), Path, 1000).url.drivername == driver


def test_a_database_without_a_read_only_session_is_told() -> None:
    told: list[str] = []
    database = make_database("oracle://h/d", Environment({}, "source db"), Path, 1000)
    connection = sa.create_engine("sqlite://").connect()
    assert database._make_read_only(connection, Stopwatch(1.0), "source db", told.append) is connection
    assert told == ["source db: oracle has no read-only session; connect as a user that may only SELECT"]


@settings(max_examples=100)
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
    text = write_progress(CursorState(value, PLAN), "d1", "source db")
    back = read_progress(text, "d1")
    assert back == CursorState(value, PLAN)
    assert back is not None
    assert type(back.value) is type(value)
    assert read_progress(text, "d2") is None


@pytest.mark.parametrize("value", [True, float("nan"), b"x", None, [1]])
def test_what_has_no_order_is_no_cursor(value: object) -> None:
    with pytest.raises(SourceError, match="source db cursor: the cursor column holds"):
        write_progress(CursorState(value, PLAN), "d1", "source db")


@pytest.mark.parametrize(
    "change",
    [{}, {"kind": "pickle"}, {"value": "x"}, {"plan": {"image": 1, "labels": [], "extra": 2}}, {"plan": None}, []],
)
def test_a_cursor_that_was_changed_by_hand_starts_anew(change: object) -> None:
    state = json.loads(write_progress(CursorState(1, PLAN), "d1", "source db"))
    text = json.dumps({**state, **change} if isinstance(change, dict) and change else change)
    assert read_progress(text, "d1") is None
    assert read_progress("{", "d1") is None
    assert read_progress(None, "d1") is None


def test_only_what_changes_rows_changes_the_digest() -> None:
    source = SqlSource(kind="sql", url="sqlite:///a.db", query="SELECT 1", cursor="id")
    same = source.model_copy(update={"url": "sqlite:///b.db", "timeout_s": 5.0, "name": "other"})
    assert compute_query_digest(source) == compute_query_digest(same)
    assert compute_query_digest(source) != compute_query_digest(source.model_copy(update={"query": "SELECT 2"}))
