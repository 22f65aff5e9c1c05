"""The SQLite file of a workspace's MLflow: what may be wrong with it, and its places after the workspace was moved."""

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from visionloop.errors import FULL

if TYPE_CHECKING:
    import sqlite3

BROKEN_FILE = ("SQLITE_FULL", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CORRUPT", "SQLITE_NOTADB")
OURS = "/.visionloop/mlflow/artifacts"
# Where MLflow keeps addresses of artifacts.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def open_database(path: Path, artifact_root: str) -> None:
    """Make the file ready for MLflow, which would try a damaged one again for a minute. Raises sqlite3.Error."""
    import sqlite3

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback of what is raised, and told
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA schema_version")
        follow_workspace(database, path, artifact_root)


def follow_workspace(database: "sqlite3.Connection", path: Path, artifact_root: str) -> None:
    """Let the artifacts of a workspace that was moved or copied lie below itself, not where it was.

    Only in a file that lies in the workspace, and only for addresses of the form that workspaces have.
    """
    root = Path(unquote(urlsplit(artifact_root).path))
    if root.parent != path.parent or not artifact_root.endswith(OURS):
        return
    with database:
        for table, column in PLACES:
            if column not in {row[1] for row in database.execute(f"PRAGMA table_info({table})")}:
                continue
            old = database.execute(
                f"SELECT DISTINCT substr({column}, 1, instr({column}, ?) + ?) FROM {table} WHERE {column} LIKE ?",
                (f"{OURS}/", len(OURS) - 1, f"file://%{OURS}/%"),
            ).fetchall()
            for (prefix,) in old:
                if prefix != artifact_root:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (artifact_root, len(prefix) + 1, len(prefix), prefix),
                    )


def find_broken_file(error: BaseException, database: str) -> tuple[str, str] | None:
    """Return the path and the reason, if an error of MLflow comes from a file or a full disk of this machine."""
    import sqlite3

    cause: BaseException | None = error
    while cause is not None:
        origin = getattr(cause, "orig", cause)  # SQLAlchemy wraps the error of its driver
        if isinstance(origin, sqlite3.Error) and getattr(origin, "sqlite_errorname", "").startswith(BROKEN_FILE):
            return database, str(origin)
        if isinstance(origin, OSError) and (origin.filename or origin.errno in FULL):
            path = origin.filename2 if origin.errno in FULL else origin.filename  # a copy names what it read first
            return str(path or origin.filename or database), str(origin.strerror)
        cause = cause.__cause__
    return None
