"""The log of what servers answered: parts by day, read as they lie, merged, expired, and joined with feedback."""

import tracemalloc
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counting_store import CountingStore
from visionloop.data import day_table
from visionloop.data.day_table import DayReader
from visionloop.data.prediction_log import (
    FEEDBACK,
    PREDICTIONS,
    Tidied,
    join_feedback,
    make_kept_key,
    make_request_id,
    read_feedback,
    read_predictions,
    read_request_time,
    round_embedding,
    tidy,
)
from visionloop.errors import StoreError
from visionloop.store import LocalStore

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)


def make_row(number: int, time: datetime = NOON, **more: Any) -> dict[str, Any]:
    return {"request_id": f"r{number}", "time": time, "image_sha256": f"{number:064x}", "classes": ["a", "b"], **more}


def put(store: LocalStore, part: str, rows: list[dict[str, Any]], table: Any = PREDICTIONS) -> None:
    store.put(table.make_key("pets", rows[0]["time"].date(), part), table.encode(rows))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_rows_come_back_with_their_types(store: LocalStore) -> None:
    embedding = np.array([0.5, -1.25], np.float32)
    put(store, "1", [make_row(1, probs=[0.75, 0.25], embedding=embedding, abstained=False, num_bytes=7)])
    table = read_predictions(store, "pets").table
    assert table.schema.names == list(PREDICTIONS.columns)
    row = table.to_pylist()[0]
    assert (row["time"], row["probs"], row["embedding"]) == (NOON, [0.75, 0.25], [0.5, -1.25])
    assert (row["abstained"], row["num_bytes"], row["labels"], row["width"]) == (False, 7, None, None)


def test_lists_of_numbers_may_be_missing_empty_and_of_any_length(store: LocalStore) -> None:
    lists = [[0.5, 1.5], None, [], np.array([2.5], np.float32), None, (3.5, -1.0, 2.0)]
    put(store, "1", [make_row(number, embedding=one) for number, one in enumerate(lists)])
    put(store, "2", [make_row(9)])
    table = read_predictions(store, "pets", columns=["embedding"]).table
    assert table["embedding"].to_pylist() == [[0.5, 1.5], None, [], [2.5], None, [3.5, -1.0, 2.0], None]


def test_a_window_has_its_start_and_not_its_end(store: LocalStore) -> None:
    times = [NOON - timedelta(days=1), NOON, NOON + timedelta(hours=1), NOON + timedelta(days=1)]
    for number, time in enumerate(times):
        put(store, f"{number}", [make_row(number, time)])
    rows = read_predictions(store, "pets", NOON, NOON + timedelta(hours=1), ["request_id"]).table
    assert rows.to_pydict() == {"request_id": ["r1"]}
    assert len(read_predictions(store, "pets", NOON).table) == 3
    assert len(read_predictions(store, "pets", until=NOON).table) == 1
    midnight = datetime(2026, 11, 28, tzinfo=UTC)
    assert list(DayReader(PREDICTIONS, store, "pets").list_parts(midnight.date(), midnight.date())) == [
        date(2026, 11, 28)
    ]


def test_nothing_at_all_is_an_empty_table_of_the_schema(store: LocalStore) -> None:
    assert read_predictions(store, "pets").table.schema == PREDICTIONS.make_schema()
    assert len(read_feedback(store, "pets").table) == 0


def test_a_damaged_part_is_named_and_spoils_no_other(store: LocalStore) -> None:
    put(store, "1", [make_row(1)])
    key = PREDICTIONS.make_key("pets", NOON.date(), "2")
    for broken in (b"", b"PAR1", PREDICTIONS.encode([make_row(2)])[:-20]):
        store.put(key, broken)
        rows = read_predictions(store, "pets")
        assert (rows.table["request_id"].to_pylist(), rows.damaged) == (["r1"], (key,))


@pytest.mark.parametrize("times", [["today", "x"], [1.5, 2.5]])
def test_in_a_window_too_a_part_with_other_times_is_damaged_and_spoils_none(
    store: LocalStore, times: list[object]
) -> None:
    put(store, "1", [make_row(1)])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"request_id": ["r2", "r3"], "time": times}), sink)
    key = PREDICTIONS.make_key("pets", NOON.date(), "2")
    store.put(key, sink.getvalue().to_pybytes())
    rows = read_predictions(store, "pets", NOON - timedelta(days=1))
    assert (rows.table["request_id"].to_pylist(), rows.damaged) == (["r1"], (key,))


def test_a_part_of_an_older_version_has_nulls_for_new_columns(store: LocalStore) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"request_id": ["r1"], "time": [NOON], "gone": [1]}), sink)
    store.put(PREDICTIONS.make_key("pets", NOON.date(), "1"), sink.getvalue().to_pybytes())
    row = read_predictions(store, "pets").table.to_pylist()[0]
    assert (row["request_id"], row["time"], row["confidence"], row["model_engine"]) == ("r1", NOON, None, None)


def test_the_newest_feedback_on_an_answer_counts(store: LocalStore) -> None:
    put(store, "1", [make_row(1), make_row(2)])
    later = NOON + timedelta(seconds=1)
    put(
        store, "b", [{"feedback_id": "b", "request_id": "r1", "time": later, "labels": ["dog"], "who": "eve"}], FEEDBACK
    )
    put(store, "a", [{"feedback_id": "a", "request_id": "r1", "time": NOON, "labels": ["cat"]}], FEEDBACK)
    put(store, "c", [{"feedback_id": "c", "request_id": "r9", "time": NOON, "labels": ["cat"]}], FEEDBACK)
    feedback = read_feedback(store, "pets").table
    assert feedback["feedback_id"].to_pylist() == ["a", "c", "b"]
    joined = join_feedback(read_predictions(store, "pets").table, feedback)
    assert joined["request_id"].to_pylist() == ["r1", "r2"]
    assert joined["feedback_labels"].to_pylist() == [["dog"], None]
    assert joined["feedback_time"].to_pylist() == [later, None]
    assert joined["feedback_who"].to_pylist() == ["eve", None]


def test_a_request_id_tells_its_time() -> None:
    now = NOON.timestamp()
    ids = {make_request_id(now) for _ in range(1000)}
    assert len(ids) == 1000
    assert {read_request_time(one) for one in ids} == {NOON}
    one = min(ids)
    assert read_request_time(f"{one}.12") == NOON
    ends = (".", ".x", "\n", ".123456", ".\u0661")  # the last is a digit, in Arabic
    for bad in ("", "x", one[:-1], one.upper().replace("0", "A"), "../" + one, *(one + end for end in ends)):
        assert read_request_time(bad) is None, bad


def test_an_embedding_is_rounded_to_eleven_bits_and_takes_half_the_space() -> None:
    values = np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32)
    rounded = round_embedding(values)
    assert rounded.dtype == np.float32
    assert np.abs(rounded / values - 1).max() <= 2**-11
    special = np.array([np.inf, -np.inf, np.nan, 0.0, 3.4028235e38], np.float32)
    np.testing.assert_array_equal(round_embedding(special), special)
    whole, half = (
        len(PREDICTIONS.encode([make_row(i, embedding=row) for i, row in enumerate(rows)]))
        for rows in (values, rounded)
    )
    assert half < 0.6 * whole


def list_keys(store: LocalStore, kind: str = "predictions") -> list[str]:
    return [key.rpartition("/")[2] for key in store.list(f"{kind}/pets/")]


def read_ids(store: LocalStore) -> list[str]:
    return sorted(read_predictions(store, "pets", columns=["request_id"]).table["request_id"].to_pylist())


def test_the_parts_of_finished_days_are_merged_and_nothing_else_changes(store: LocalStore) -> None:
    for number in range(5):
        put(store, f"{number}", [make_row(number), make_row(number + 10)])
    put(store, "today", [make_row(20, NOON + timedelta(days=1))])
    before = read_predictions(store, "pets").table
    assert tidy(store, "pets", now=NOON + timedelta(days=1), keep_days=None) == Tidied(0, 5)
    assert list_keys(store) == ["merged-000001.parquet", "today.parquet"]
    assert read_predictions(store, "pets").table.equals(before)
    assert tidy(store, "pets", now=NOON + timedelta(days=1), keep_days=None) == Tidied(0, 0)
    put(store, "5", [make_row(5)])
    put(store, "6", [make_row(6)])
    tidy(store, "pets", now=NOON + timedelta(days=1), keep_days=None)
    assert list_keys(store) == ["merged-000001.parquet", "merged-000002.parquet", "today.parquet"]
    assert read_ids(store) == sorted([*before["request_id"].to_pylist(), "r5", "r6"])


@pytest.mark.parametrize("purges", [0, 1, 2])
def test_a_merge_that_is_killed_leaves_nothing_that_is_read_twice(
    store: LocalStore, purges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        put(store, f"{number}", [make_row(number)])
    left = purges

    def die(key: str) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        store.delete(key)

    with monkeypatch.context() as patch:
        patch.setattr(store, "purge", die)
        with pytest.raises(KeyboardInterrupt):
            tidy(store, "pets", now=NOON + timedelta(days=1), keep_days=None)
    assert len(list_keys(store)) == 4 - purges
    assert read_ids(store) == ["r0", "r1", "r2"]
    tidy(store, "pets", now=NOON + timedelta(days=1), keep_days=None)
    assert (list_keys(store), read_ids(store)) == (["merged-000001.parquet"], ["r0", "r1", "r2"])


def test_of_two_that_merge_at_once_one_wins(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        put(store, f"{number}", [make_row(number)])
    create = store.create

    def lose(key: str, data: bytes) -> bool:
        monkeypatch.undo()
        tidy(store, "pets", now=NOON + timedelta(days=1), keep_days=None)
        put(store, "late", [make_row(3)])
        return create(key, data + b" ")

    monkeypatch.setattr(store, "create", lose)
    tidy(store, "pets", now=NOON + timedelta(days=1), keep_days=None)
    assert read_ids(store) == ["r0", "r1", "r2", "r3"]
    assert list_keys(store) == ["late.parquet", "merged-000001.parquet"]


def test_a_damaged_part_is_not_merged_away(store: LocalStore) -> None:
    for number in range(2):
        put(store, f"{number}", [make_row(number)])
    store.put(PREDICTIONS.make_key("pets", NOON.date(), "9"), b"broken")
    tidy(store, "pets", now=NOON + timedelta(days=1), keep_days=None)
    assert list_keys(store) == ["9.parquet", "merged-000001.parquet"]
    assert read_ids(store) == ["r0", "r1"]


def test_what_is_older_than_the_days_kept_goes(store: LocalStore) -> None:
    for age in range(4):
        put(store, f"{age}", [make_row(age, NOON - timedelta(days=age))])
        put(store, f"{age}", [{"request_id": "r", "time": NOON - timedelta(days=age)}], FEEDBACK)
        store.put(make_kept_key("pets", (NOON - timedelta(days=age)).date(), "0" * 64), b"image")
    store.put(PREDICTIONS.make_key("other", date(2020, 1, 1), "1"), b"of another name")
    assert tidy(store, "pets", now=NOON, keep_days=2) == Tidied(3, 0)
    assert read_ids(store) == ["r0", "r1", "r2"]
    assert (len(list_keys(store, "feedback")), len(list_keys(store, "kept"))) == (3, 3)
    assert len(list(store.list("predictions/other/"))) == 1


def test_rows_of_forgotten_images_go_from_raw_and_merged_parts(store: LocalStore) -> None:
    for number in range(3):
        put(store, f"{number}", [make_row(number), make_row(number + 10)])
    tidy(store, "pets", now=NOON + timedelta(days=1), keep_days=None)
    put(store, "3", [make_row(3)])
    put(store, "4", [make_row(1), make_row(4)])
    reader = DayReader(PREDICTIONS, store, "pets")
    sha256s = frozenset({f"{1:064x}", f"{3:064x}"})
    parts = reader.find_parts(sha256s)
    assert [key.rpartition("/")[2] for key in parts] == ["3.parquet", "4.parquet", "merged-000001.parquet"]
    reader.remove_rows(parts, sha256s)
    assert read_ids(store) == ["r0", "r10", "r11", "r12", "r2", "r4"]
    assert reader.find_parts(sha256s) == []
    assert not any(f"{1:064x}".encode() in store.get(key) for key in store.list("predictions/"))


def test_what_is_forgotten_while_a_merge_reads_does_not_come_back(store: LocalStore) -> None:
    for number in range(3):
        put(store, f"{number}", [make_row(number)])
    asked = iter([frozenset(), frozenset({f"{1:064x}"})])
    DayReader(PREDICTIONS, store, "pets").merge(NOON.date() + timedelta(days=1), lambda: next(asked))
    assert read_ids(store) == ["r0", "r2"]
    assert not any(f"{1:064x}".encode() in store.get(key) for key in store.list("predictions/"))


@pytest.fixture
def long_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CountingStore:
    """30 days with a row every half hour, each day merged into one part of 12 groups of 4 rows, with embeddings."""
    monkeypatch.setattr(day_table, "GROUP_ROWS", 4)
    store = CountingStore(tmp_path / "store")
    rng = np.random.default_rng(0)
    for day in range(30):
        start = datetime(2026, 10, 30, tzinfo=UTC) + timedelta(days=day)
        rows = [
            make_row(48 * day + number, start + timedelta(minutes=30 * number), embedding=rng.random(2000, np.float32))
            for number in range(48)
        ]
        put(store, "1", rows[:24])
        put(store, "2", rows[24:])
    tidy(store, "pets", now=datetime(2027, 1, 1, tzinfo=UTC), keep_days=None)
    assert len(list_keys(store)) == 30
    store.forget_counts()
    return store


def test_of_a_long_log_a_window_reads_the_parts_of_its_days(long_log: CountingStore) -> None:
    since = datetime(2026, 10, 31, 12, tzinfo=UTC)
    rows = read_predictions(long_log, "pets", since, since + timedelta(days=1), ["request_id"])
    assert rows.table["request_id"].to_pylist() == [f"r{number}" for number in range(72, 120)]
    assert (long_log.reads, long_log.keys) == ({"predictions": 2}, {"predictions": 3})


def test_of_a_part_a_window_reads_the_columns_and_the_groups_of_rows_that_it_asks_for(long_log: CountingStore) -> None:
    since = datetime(2026, 10, 31, 12, tzinfo=UTC)
    size = len(long_log.get(next(iter(long_log.list("predictions/pets/date=2026-10-31/")))))
    read = []
    for hours, columns in ((24, None), (2, None), (24, ["request_id"]), (2, ["request_id"])):
        long_log.forget_counts()
        table = read_predictions(long_log, "pets", since, since + timedelta(hours=hours), columns).table
        assert table["request_id"].to_pylist() == [f"r{number}" for number in range(72, 72 + 2 * hours)]
        read.append(long_log.num_bytes)
    assert size / 1.5 < read[0] < 1.5 * size, "half of each of two days"
    assert read[1] < 0.4 * size
    assert read[2] < 0.4 * size
    assert read[3] < 0.3 * size


def test_to_forget_reads_one_column_and_to_tidy_only_what_parts_say_of_themselves(long_log: CountingStore) -> None:
    whole = sum(path.stat().st_size for path in (long_log.root / "predictions").rglob("*.parquet"))
    sha256s = frozenset({f"{100:064x}"})
    (part,) = DayReader(PREDICTIONS, long_log, "pets").find_parts(sha256s)
    assert (part, long_log.reads) == (
        "predictions/pets/date=2026-11-01/merged-000001.parquet", {"predictions": 30},
    )  # fmt: skip
    assert long_log.num_bytes < 0.3 * whole
    long_log.forget_counts()
    assert tidy(long_log, "pets", now=datetime(2027, 1, 1, tzinfo=UTC), keep_days=50) == Tidied(13, 0)
    assert long_log.reads == {}


def test_a_log_that_is_four_times_as_long_takes_no_more_memory(long_log: CountingStore) -> None:
    """A window of a day: of two days of the log, and of all 30."""
    since = datetime(2026, 11, 27, tzinfo=UTC)

    def measure() -> int:
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        table = read_predictions(long_log, "pets", since, since + timedelta(days=1), ["request_id"]).table
        try:
            return tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before + 0 * len(table)
        finally:
            tracemalloc.stop()

    measure()
    whole = measure()
    for key in [key for key in long_log.list("predictions/pets/") if "date=2026-11-2" not in key]:
        long_log.delete(key)
    assert whole < 1.3 * measure()


def test_a_store_that_goes_away_while_a_part_is_read_is_no_damaged_part(store: LocalStore) -> None:
    put(store, "1", [make_row(1)])

    class Away:
        def __init__(self, file: Any) -> None:
            self.file = file

        def read(self, size: int = -1) -> bytes:
            raise StoreError("store", "is away", "it to be there")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Away":
            return self

        def __exit__(self, *told: object) -> None:
            self.file.close()

    class AwayStore(LocalStore):
        def open(self, key: str) -> Any:
            return Away(super().open(key))

    with pytest.raises(StoreError, match="is away"):
        read_predictions(AwayStore(store.root), "pets")
