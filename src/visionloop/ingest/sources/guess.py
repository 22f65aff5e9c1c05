"""Guess which source a text of the command line means: `visionloop ingest PATH`."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from visionloop.errors import ParamsError, SourceError
from visionloop.ingest.paths.listing import VIDEO_SUFFIXES, find_side, is_image_name
from visionloop.ingest.tables.files import FOREIGN_TABLES, guess_table_kind
from visionloop.ingest.tables.join import is_read_by_table
from visionloop.params import Source, make_params

FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
HTTP = ("http", "https")
CAMERAS = ("rtsp", "rtsps")
STREAM_SUFFIXES = (".m3u8", ".mpd", ".mjpg", ".mjpeg")
DATABASES = ("sqlite", "postgresql", "postgres", "mysql", "mariadb", "oracle", "mssql", "duckdb", "snowflake")
OTHER_ARCHIVES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
KINDS = "a folder, a table, a .zip, a video, a URL (s3, http, https, rtsp) or module:function"
LOOKED_AT = 2000  # files of a folder, to see what it holds


def guess_source(text: str, name: str | None = None) -> Source:
    """Return the source that a path, a URL or `module:function` means. `name`: of the source; default: its last word.

    Raises:
        SourceError: nothing is there, no kind fits, or the source needs more settings than a path.
    """
    if "://" in text:
        return _guess_url(text, name)
    path = Path(text).expanduser()
    if FUNCTION.match(text) and not path.exists():
        return _make("python", "function", text, name, text.partition(":")[0].rpartition(".")[2])
    path = path.resolve()
    if path.is_dir():
        return _make(_guess_folder(path), "path", str(path), name, path.name)
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


def _guess_folder(path: Path) -> str:
    """Return the kind of source that fits what a folder holds; of a very large one only a part is looked at."""
    files: list[str] = []
    class_folders: set[str] = set()
    images = videos = seen = 0
    for root, folders, names in os.walk(path):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        parts = Path(root).relative_to(path).parts
        files = files if parts else names
        images_here = sum(map(is_image_name, names))
        if images_here and parts:
            class_folders.add(parts[1] if len(parts) > 1 and find_side(parts[0]) else parts[0])
        images += images_here
        videos += sum(os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES for name in names)
        seen += len(names)
        if seen > LOOKED_AT:
            break
    if is_read_by_table(files, sorted(class_folders)):
        return "table"
    return "video" if videos and not images else "folder"


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
