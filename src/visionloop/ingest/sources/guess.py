"""Guess which source a text of the command line means: `visionloop ingest PATH`."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from visionloop.errors import ParamsError, SourceError
from visionloop.ingest.paths.listing import VIDEO_SUFFIXES, list_paths
from visionloop.ingest.paths.names import is_image_name, is_passed, is_system_folder
from visionloop.ingest.sources.reading import (
    EXPORT_LIST,
    OTHER_ARCHIVES,
    explain_shards,
    find_split_tables,
    is_read_by_table,
    is_shard,
)
from visionloop.ingest.tables.choose import ALL_TABLES, list_tables
from visionloop.ingest.tables.files import FOREIGN_TABLES
from visionloop.ingest.tables.label_table import FolderShelf, LabelTable
from visionloop.ingest.tables.rows import Row, guess_table_kind
from visionloop.params import Columns, Source, make_params

FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
HTTP = ("http", "https")
CAMERAS = ("rtsp", "rtsps")
STREAM_SUFFIXES = (".m3u8", ".mpd", ".mjpg", ".mjpeg")
DATABASES = ("sqlite", "postgresql", "postgres", "mysql", "mariadb", "oracle", "mssql", "duckdb", "snowflake")
KINDS = "a folder, a table, a .zip, a video, a URL (s3, http, https, rtsp) or module:function"


def guess_source(
    text: str,
    name: str | None = None,
    *,
    by_pattern: bool = False,
    table: str | None = None,
    encoding: str | None = None,
) -> Source:
    """Return the source that a path, a URL or `module:function` means. `name`: of the source; default: its last word.

    `by_pattern`: a folder is read by its paths, whatever tables lie in it. `table`: it is read by this table in it.
    `encoding`: that of tables in it.

    Raises:
        SourceError: nothing is there, no kind fits, or the source needs more settings than a path.
    """
    if "://" in text:
        return _guess_url(text, name)
    path = Path(text).expanduser()
    if FUNCTION.match(text) and not path.exists():
        return _make("python", "function", text, name, text.partition(":")[0].rpartition(".")[2])
    path = path.resolve()
    if path.is_dir() and table:
        return _make("table", "path", str(path if table == ALL_TABLES else path / table), name, path.name)
    if path.is_dir():
        kind, place = _guess_folder(path, encoding, by_pattern=by_pattern)
        return _make(kind, "path", str(place), name, path.name)
    if path.is_char_device():
        return _make("video", "path", str(path), name, path.name)
    if not path.is_file():
        found = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise SourceError(f"source {path}", found, KINDS, "Check the path.")
    suffix = path.suffix.lower()
    if suffix in FOREIGN_TABLES:
        raise SourceError(f"source {path}", f"is {FOREIGN_TABLES[suffix][0]}", KINDS, FOREIGN_TABLES[suffix][1])
    kind = "table" if guess_table_kind(path.name) else "archive" if suffix == ".zip" else "video"
    if kind == "video" and suffix not in VIDEO_SUFFIXES:
        todo = "Unpack it, or make a zip of it." if suffix in OTHER_ARCHIVES else "Give another path."
        if is_shard(path.name):
            is_export = (path.parent / EXPORT_LIST).is_file()
            todo = explain_shards([path.name], str(path.parent), is_export=is_export)
        raise SourceError(f"source {path}", f"is a file that ends in {suffix or path.name[-20:]!r}", KINDS, todo)
    return _make(kind, "path", str(path), name, path.stem)


def _guess_url(text: str, name: str | None) -> Source:
    scheme = text.partition("://")[0].lower()
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
    except ValueError as exc:
        raise SourceError(f"source {scheme}://", f"is no URL ({exc})", KINDS, "Check it.") from exc
    word = parts.path.rstrip("/").rsplit("/", 1)[-1].partition(".")[0] or host
    suffix = os.path.splitext(parts.path)[1].lower()
    if scheme in CAMERAS or (scheme in HTTP and suffix in (*VIDEO_SUFFIXES, *STREAM_SUFFIXES)):
        return _make("video", "path", text, name, word)
    if scheme in HTTP:
        return _make("http", "url", text, name, word)
    if scheme == "s3":
        return _make("bucket", "path", text, name, word)
    if scheme.partition("+")[0] in DATABASES:
        todo = "Write {kind: sql, url: ..., query: ...} under ingest.sources in params.yaml."
        raise SourceError(f"source {scheme}://", "is a database", "its URL and a query", todo)
    raise SourceError(f"source {scheme[:30]}://{host[:80]}", "has an unknown scheme", KINDS, "Check it.")


def _guess_folder(path: Path, encoding: str | None, *, by_pattern: bool) -> tuple[str, Path]:
    """Return the kind of source that fits what a folder holds, and the folder or the table that is meant.

    Raises:
        SourceError: class folders and a table say different things.
    """
    paths, num_videos = _list_paths(path)
    if by_pattern:
        return ("video" if num_videos and not paths else "folder"), path
    top, files = path, _list_names(path)
    is_bare = not files or not (paths or list_tables(files))  # a clone from Hugging Face has a README.md above `data/`
    if is_bare and len(folders := _list_folders(path)) == 1 and list_tables(_list_names(path / folders[0])):
        top, files = path / folders[0], _list_names(path / folders[0])
    below = len(top.relative_to(path).as_posix()) + 1 if top != path else 0

    def read(name: str) -> Iterator[Row]:
        look = LabelTable("", f"source {top}", FolderShelf(top), name, Columns(), lambda line: None, command="")
        return replace(look, encoding=encoding).rows()

    if EXPORT_LIST in files or find_split_tables(paths, lambda inside: _list_names(path / inside)):
        return "folder", path
    if is_read_by_table([one[below:] for one in paths], files, read, f"source {top}", str(top)):
        return "table", top
    return ("video" if num_videos and not paths else "folder"), path


def _list_paths(path: Path) -> tuple[list[str], int]:
    """Return the paths of images below a folder, and how many videos there are."""
    paths = list_paths(path, f"source {path}")
    num_videos = sum(os.path.splitext(one)[1].lower() in VIDEO_SUFFIXES for one in paths)
    return [one for one in paths if is_image_name(one.rpartition("/")[2])], num_videos


def _list_names(path: Path) -> list[str]:
    """Return the names of the files in a folder; none when there is no such folder."""
    try:
        return sorted(child.name for child in os.scandir(path) if child.is_file() and not is_passed(child.name))
    except OSError:
        return []


def _list_folders(path: Path) -> list[str]:
    return [child.name for child in os.scandir(path) if child.is_dir() and not is_system_folder(child.name)]


def _make(kind: str, key: str, value: str, name: str | None, word: str) -> Source:
    """Return the source, checked like one of params.yaml. Raises SourceError."""
    named = name or re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:63].strip("-") or kind
    try:
        params = make_params({"name": "x", "ingest": {"sources": [{"kind": kind, key: value, "name": named}]}})
    except ParamsError as exc:
        of_name = exc.where.endswith("name")
        expected = "s3://BUCKET/PREFIX" if kind == "bucket" and not of_name else exc.expected
        raise SourceError("--name" if of_name else "source", exc.found, expected, "Give another one.") from exc
    return params.ingest.sources[0]
