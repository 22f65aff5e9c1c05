"""What earlier ingests of this workspace have read: a cache, so that a file is read again only when it has changed.

.visionloop/ingest/journal.sqlite, by store and origin. Only a cache: without it, or when it is damaged or locked,
everything is read again, with the same version as the result.

A row is used while the stamp of the file and the rules of the check are the same. A row also says that the object is in
the store, and a power failure could undo that until the store's `sync`: a row that no sync has covered is used only
until the machine is restarted.
"""

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from visionloop.ingest.inspect import INSPECTION, Facts
from visionloop.ingest.item import Item
from visionloop.params import Ingest
from visionloop.records import Rejected
from visionloop.settings import Settings

Result = TypeVar("Result")

_SCHEMA = 3
_FLUSH_ROWS = 250
FLUSH_LINES = 1000
_FLUSH_S = 0.5
MOST_AHEAD = 1024  # rows of the journal that are read ahead
_WAIT_S = 5.0
_TABLES = f"""
CREATE TABLE files (store TEXT, origin TEXT, stamp TEXT, rules TEXT, session INTEGER, sha256 TEXT, width INTEGER,
    height INTEGER, format TEXT, num_bytes INTEGER, phash TEXT, converted TEXT, bits INTEGER, code TEXT, reason TEXT,
    PRIMARY KEY (store, origin)) WITHOUT ROWID;
CREATE TABLE sessions (id INTEGER PRIMARY KEY AUTOINCREMENT, boot TEXT, synced INTEGER);
CREATE TABLE pulls (store TEXT, name TEXT, asked TEXT, offers TEXT, version TEXT, rejected TEXT, cursors TEXT,
    remarks TEXT, PRIMARY KEY (store, name)) WITHOUT ROWID;
PRAGMA user_version = {_SCHEMA};
"""
# What the tables of the version before lack.
_FROM_2 = """
ALTER TABLE files ADD COLUMN bits INTEGER;
ALTER TABLE pulls ADD COLUMN remarks TEXT;
PRAGMA user_version = 3;
"""


# origin, stamp, code and reason (None: it can be used), then the fields of `Facts`. A plain tuple: there are millions.
Row = tuple[Any, ...]
STAMP, SHA256 = 1, 4


def unpack_row(row: Row) -> Facts | Rejected:
    """Return what a row says of its file."""
    origin, _, code, reason = row[:SHA256]
    return Rejected(origin, code, reason) if code else Facts(*row[SHA256:])


@dataclass(frozen=True)
class LastPull:
    """Of the last pull of a dataset: its settings, what it was offered ("": not known), and the resulting version."""

    asked: str
    offers: str
    version: str
    rejected: tuple[Rejected, ...]
    cursors: dict[str, str]
    remarks: tuple[str, ...] = ()


def make_journal_path(settings: Settings) -> Path:
    """Return where the journal of a workspace lies."""
    return settings.hidden_dir / "ingest" / "journal.sqlite"


class Journal:
    """The journal of one workspace, for one store. Used by one thread; never raises for what is wrong with its file."""

    def __init__(self, path: Path, store_url: str, limits: Ingest) -> None:
        self._path = path
        self._store = store_url
        self._rules = f"{INSPECTION}/{limits.max_pixels}/{limits.max_file_bytes}/{limits.convert}"
        self._boot = _read_boot_id()
        self._waiting: list[tuple[object, ...]] = []
        self._flushed_at = time.monotonic()
        self._session: int | None = None
        self._database = _open_file(path) or _open_memory()

    @property
    def folder(self) -> Path:
        """Where the file lies, and what a pull cannot hold in memory."""
        return self._path.parent

    def load(self, source: str, first: str = "", most: int = -1) -> dict[str, Row]:
        """Return the usable rows of a source, by origin, from `first` on; of at most so many rows (-1: of all)."""
        nothing: dict[str, Row] = {}
        first = first or f"{source}:"
        return self._do(lambda database: dict(self._select(database, first, f"{source};", most)), nothing)

    def sample(self, number: int) -> list[str]:
        """Return the sha256 of some images that the journal knows to be in this store; empty when it knows none."""
        query = "SELECT sha256 FROM files WHERE store = ? AND sha256 NOT NULL ORDER BY random() LIMIT ?"
        nothing: list[str] = []
        return self._do(lambda database: [row[0] for row in database.execute(query, (self._store, number))], nothing)

    def keep(self, found: Iterable[tuple[str, str | None, Facts | Rejected]]) -> None:
        """Add what was found out about files (origin, stamp, finding), whose objects are stored. No stamp: not kept."""
        for origin, stamp, one in found:
            if stamp is None:
                continue
            head = (self._store, origin, stamp, self._rules)
            if isinstance(one, Facts):
                facts = (one.sha256, one.width, one.height, one.format, one.num_bytes, one.phash, one.converted)
                self._waiting.append((*head, *facts, one.bits, None, None))
            else:
                self._waiting.append((*head, *(None,) * 8, one.code, one.reason))
        if len(self._waiting) >= _FLUSH_ROWS or time.monotonic() - self._flushed_at > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        waiting, self._waiting = self._waiting, []
        self._flushed_at = time.monotonic()
        if waiting:
            self._do(lambda database: self._insert(database, waiting), None)

    def mark_synced(self) -> None:
        """Note that the store has synced: the rows of this session stay usable after a restart."""
        if self._session is not None:
            self._do(lambda database: _mark_synced(database, self._session), None)

    @property
    def has_news(self) -> bool:
        """Say whether this session has written rows that no sync has covered."""
        return self._session is not None

    def forget(self, sha256s: Iterable[str]) -> None:
        """Drop every row of some images, in all stores, and the records of this store's last pulls."""
        self._do(lambda database: _delete(database, self._store, list(sha256s)), None)

    def load_pull(self, name: str) -> LastPull | None:
        """Return the last pull of a dataset that ended well."""
        return self._do(lambda database: _select_pull(database, self._store, name), None)

    def keep_pull(self, name: str, pull: LastPull) -> None:
        """Replace the last pull of a dataset."""
        rejected = json.dumps([one.to_json() for one in pull.rejected])
        others = json.dumps(pull.cursors), json.dumps(pull.remarks)
        row = (self._store, name, pull.asked, pull.offers, pull.version, rejected, *others)
        self._do(lambda database: _replace_pull(database, row), None)

    def close(self) -> None:
        """Write what waits, and close the file."""
        self.flush()
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    def _do(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """Run some work on the database; if its file fails, go on without it."""
        try:
            with self._database as database:
                return work(database)
        except (sqlite3.Error, ValueError, TypeError) as exc:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            if not isinstance(exc, sqlite3.OperationalError):  # for now only: locked, or no space left
                _remove(self._path)
            self._database = _open_memory()
            self._session = None
            return otherwise

    def _select(self, database: sqlite3.Connection, first: str, end: str, most: int) -> Iterator[tuple[str, Row]]:
        rows = database.execute(
            "SELECT origin, stamp, code, reason, sha256, width, height, format, num_bytes, phash, converted,"
            " coalesce(bits, 0) FROM"
            " (SELECT * FROM files WHERE store = ? AND origin >= ? AND origin < ? ORDER BY origin LIMIT ?)"
            " WHERE rules = ? AND session IN (SELECT id FROM sessions WHERE synced OR boot = ?)",
            (self._store, first, end, most, self._rules, self._boot),
        )
        return ((row[0], row) for row in rows)

    def _insert(self, database: sqlite3.Connection, rows: Sequence[tuple[object, ...]]) -> None:
        if self._session is None:
            added = database.execute("INSERT INTO sessions (boot, synced) VALUES (?, 0)", (self._boot,))
            self._session = added.lastrowid
        database.executemany(
            "INSERT OR REPLACE INTO files (store, origin, stamp, rules, sha256, width, height, format, num_bytes,"
            f" phash, converted, bits, code, reason, session) VALUES ({'?, ' * 14} {self._session})",
            rows,
        )


class Ahead:
    """What the journal knows of the files of one source, who are asked for one by one.

    While they come in the order of their origins, more and more rows are read ahead; else one at a time.
    """

    def __init__(self, journal: Journal, source: str) -> None:
        self._journal, self._source = journal, source
        self._rows: dict[str, Row] = {}
        self._num_read, self._num_used, self._size = 0, 0, 1

    def find(self, origin: str) -> Row | None:
        """Return the usable row of a file."""
        row = self._rows.pop(origin, None)  # a file that is offered again is looked up again: it may have been read
        if row is None and self._rows and origin < next(reversed(self._rows)):
            return self._journal.load(self._source, origin, 1).get(origin)
        if row is None:
            is_in_order = self._num_read and 2 * self._num_used >= self._num_read
            self._size = min(2 * self._size, MOST_AHEAD) if is_in_order else 1
            self._rows = self._journal.load(self._source, origin, self._size)
            self._num_read, self._num_used = len(self._rows), 0
            row = self._rows.pop(origin, None)
        self._num_used += row is not None
        return row


def _open_file(path: Path) -> sqlite3.Connection | None:
    """Open the journal; a damaged one, or one of another version, is replaced. None when that fails."""
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(path, timeout=_WAIT_S)
        except (sqlite3.Error, OSError):
            return None
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            ((schema,),) = database.execute("PRAGMA user_version").fetchall()
            if schema == 0:
                _make_tables(database)
            elif schema == 2:
                _execute_together(database, _FROM_2)
            elif schema != _SCHEMA:
                raise sqlite3.DatabaseError("another version")
            return database
        except sqlite3.OperationalError:
            database.close()
            return None
        except sqlite3.Error:
            database.close()
            _remove(path)
    return None


def _make_tables(database: sqlite3.Connection) -> None:
    """Make the tables, unless another process has made them."""
    _execute_together(database, _TABLES)


def _execute_together(database: sqlite3.Connection, script: str) -> None:
    with contextlib.suppress(sqlite3.OperationalError):
        database.executescript(f"BEGIN IMMEDIATE; {script} COMMIT;")
    if database.in_transaction:
        database.rollback()


def _open_memory() -> sqlite3.Connection:
    """Open a journal that is gone with the process."""
    database = sqlite3.connect(":memory:")
    _make_tables(database)
    return database


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(OSError):
            path.with_name(path.name + suffix).unlink()


def _mark_synced(database: sqlite3.Connection, session: int | None) -> None:
    database.execute("UPDATE sessions SET synced = 1 WHERE id = ?", (session,))


def _delete(database: sqlite3.Connection, store: str, sha256s: Sequence[str]) -> None:
    database.execute("PRAGMA secure_delete = ON")
    database.executemany("DELETE FROM files WHERE sha256 = ?", [(sha256,) for sha256 in sha256s])
    database.execute("DELETE FROM pulls WHERE store = ?", (store,))


def _select_pull(database: sqlite3.Connection, store: str, name: str) -> LastPull | None:
    query = "SELECT asked, offers, version, rejected, cursors, remarks FROM pulls WHERE store = ? AND name = ?"
    row = database.execute(query, (store, name)).fetchone()
    if row is None:
        return None
    rejected = tuple(Rejected.from_json(one) for one in json.loads(row[3]))
    return LastPull(row[0], row[1], row[2], rejected, json.loads(row[4]), tuple(json.loads(row[5] or "[]")))


def _replace_pull(database: sqlite3.Connection, row: tuple[object, ...]) -> None:
    database.execute("INSERT OR REPLACE INTO pulls VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def _read_boot_id() -> str:
    """Return a text that is different after each start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(psutil.boot_time())


class Offers:
    """A digest over all that the sources offer."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._lines: list[str] = []
        self._abouts: dict[tuple[object, ...], str] = {}
        self._have_stamps = True

    def add(self, item: Item) -> None:
        """Add an item; the order counts."""
        stamp = item.stamp
        if stamp is None:
            self._have_stamps = False
            return
        about = item.labels, item.side, item.test_is_given, item.group, item.captured_at
        text = self._abouts.get(about)
        if text is None:
            text = self._abouts[about] = repr(about)
        self._lines.append(f"{item.origin}\0{stamp}\0{text}")
        if len(self._lines) >= FLUSH_LINES:
            self._flush()

    def close(
        self, rejected: Sequence[Rejected], cursors: Mapping[str, str], more_rows: Mapping[str, int]
    ) -> str | None:
        """Return the digest; None when an item has no stamp."""
        self._lines += [f"{one.origin}\0{one.code}\0{one.reason}" for one in rejected]
        self._lines.append(repr([sorted(cursors.items()), sorted(more_rows.items())]))
        self._flush()
        return self._digest.hexdigest() if self._have_stamps else None

    def _flush(self) -> None:
        self._digest.update("\n".join((*self._lines, "")).encode("utf-8", "surrogatepass"))
        self._lines = []
        self._abouts = {} if len(self._abouts) > FLUSH_LINES else self._abouts
