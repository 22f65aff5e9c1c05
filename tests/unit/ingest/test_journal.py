"""What earlier ingests have read: believed only while it can be true, and never fatal."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from visionloop.ingest import journal as journal_module
from visionloop.ingest.inspect import Facts
from visionloop.ingest.journal import STAMP, Journal, LastPull, unpack_row
from visionloop.params import Ingest
from visionloop.records import Rejected

FACTS = Facts("ab" * 32, 30, 20, "JPEG", 900, "0f" * 8)
BAD = Rejected("photos:b.jpg", "damaged", "is damaged; expected whole pixels")
LAST = LastPull("asked", "offers", "1:abc", (BAD,), {"rows": "17"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ingest" / "journal.sqlite"


def open_journal(path: Path, store: str = "file:///store", **limits: int) -> Journal:
    return Journal(path, store, Ingest(**limits))


def write(path: Path, *, synced: bool = True) -> None:
    journal = open_journal(path)
    journal.keep([("photos:a.jpg", "s1", FACTS), ("photos:b.jpg", "s2", BAD), ("photos:c.jpg", None, FACTS)])
    journal.flush()
    if synced:
        journal.mark_synced()
    journal.keep_pull("pets", LAST)
    journal.close()


def read(journal: Journal, source: str = "photos") -> dict[str, tuple[str, Facts | Rejected]]:
    return {origin: (row[STAMP], unpack_row(row)) for origin, row in journal.load(source).items()}


def test_what_was_kept_is_known_to_the_next_pull(path: Path) -> None:
    write(path)
    journal = open_journal(path)
    assert read(journal) == {"photos:a.jpg": ("s1", FACTS), "photos:b.jpg": ("s2", BAD)}
    assert journal.load_pull("pets") == LAST
    assert journal.load_pull("cars") is None
    assert not journal.has_news


@pytest.mark.parametrize("source", ["photo", "photos2", "a", ""])
def test_rows_are_of_their_source_alone(path: Path, source: str) -> None:
    write(path)
    assert read(open_journal(path), source) == {}


def test_another_store_knows_nothing_of_it(path: Path) -> None:
    write(path)
    journal = open_journal(path, "s3://bucket/pets")
    assert (read(journal), journal.load_pull("pets"), journal.sample(5)) == ({}, None, [])


@pytest.mark.parametrize("limits", [{"max_pixels": 10_000}, {"max_file_bytes": 2000}])
def test_other_limits_are_other_verdicts(path: Path, limits: dict[str, int]) -> None:
    write(path)
    assert read(open_journal(path, **limits)) == {}


def test_another_inspection_is_another_verdict(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path)
    monkeypatch.setattr(journal_module, "INSPECTION", 0)
    assert read(open_journal(path)) == {}


def test_what_was_never_synced_is_believed_until_the_machine_starts_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, synced=False)
    assert len(read(open_journal(path))) == 2
    monkeypatch.setattr(journal_module, "_read_boot_id", lambda: "another")
    assert read(open_journal(path)) == {}


def test_what_was_synced_is_believed_after_the_machine_starts_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, synced=True)
    monkeypatch.setattr(journal_module, "_read_boot_id", lambda: "another")
    assert len(read(open_journal(path))) == 2


def test_a_later_finding_replaces_an_earlier_one(path: Path) -> None:
    write(path)
    journal = open_journal(path)
    journal.keep([("photos:b.jpg", "s3", FACTS)])
    journal.close()
    assert read(open_journal(path))["photos:b.jpg"] == ("s3", FACTS)


def test_many_rows_are_written_before_the_end(path: Path) -> None:
    journal = open_journal(path)
    journal.keep([(f"photos:{i}.jpg", "s", FACTS) for i in range(1000)])
    assert len(read(open_journal(path))) == 1000, "a kill may come at any time"


def test_forget_leaves_nothing_of_an_image_in_the_file(path: Path) -> None:
    write(path)
    other = open_journal(path, "s3://bucket/pets")
    other.keep([("bucket:a.jpg", "etag", FACTS)])
    other.close()
    journal = open_journal(path)
    journal.forget([FACTS.sha256])
    assert (list(read(journal)), journal.load_pull("pets")) == (["photos:b.jpg"], None)
    journal.close()
    left = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert FACTS.sha256.encode() not in left
    assert b"bucket:a.jpg" not in left


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_made_anew(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    write(path)
    assert len(read(open_journal(path))) == 2


def test_a_page_that_is_damaged_later_costs_only_what_was_known(path: Path) -> None:
    journal = open_journal(path)
    journal.keep([(f"photos:{i}.jpg", "s", FACTS) for i in range(500)])
    journal.close()
    data = bytearray(path.read_bytes())
    data[8192:-4096] = b"\xa5" * (len(data) - 12288)
    path.write_bytes(data)
    journal = open_journal(path)
    known = journal.load("photos")
    journal.close()
    assert len(known) < 500
    write(path)
    assert len(read(open_journal(path))) == 2


def test_a_file_of_another_version_is_made_anew(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.executescript("CREATE TABLE files (x); PRAGMA user_version = 99;")
    write(path)
    assert len(read(open_journal(path))) == 2


def test_a_locked_file_is_done_without(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path)
    monkeypatch.setattr(journal_module, "_WAIT_S", 0.05)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    journal = open_journal(path)
    journal.keep([("photos:z.jpg", "s1", FACTS)])
    journal.flush()
    journal.keep_pull("pets", LAST)
    assert journal.load_pull("pets") in (LAST, None)
    journal.close()
    holder.execute("ROLLBACK")
    holder.close()
    assert set(read(open_journal(path))) == {"photos:a.jpg", "photos:b.jpg"}


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "ingest").write_text("a file")
    journal = open_journal(tmp_path / "ingest" / "journal.sqlite")
    journal.keep([("photos:a.jpg", "s1", FACTS)])
    journal.flush()
    assert read(journal) == {"photos:a.jpg": ("s1", FACTS)}
    journal.close()


def test_a_file_of_the_version_before_is_kept_and_gets_its_new_columns(path: Path) -> None:
    write(path)
    with sqlite3.connect(path) as database:
        database.executescript(
            "ALTER TABLE files DROP COLUMN bits; ALTER TABLE pulls DROP COLUMN remarks; PRAGMA user_version = 2;"
        )
    journal = open_journal(path)
    assert read(journal) == {"photos:a.jpg": ("s1", FACTS), "photos:b.jpg": ("s2", BAD)}
    assert journal.load_pull("pets") == LAST
    journal.keep_pull("pets", replace(LAST, remarks=("gone: 1",)))
    journal.close()
    assert open_journal(path).load_pull("pets") == replace(LAST, remarks=("gone: 1",))
