"""A prefix of an S3 bucket: class folders, names by a pattern, or a table below it. What the listing says counts.

Exactly the listed version of an image is read (version id, else ETag); with the same ETag it is not read again.
"""

import io
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from visionloop.errors import ImageError, SettingsError, SourceError, StoreError, VisionLoopError, shorten
from visionloop.ingest.item import Item, PassedOver, SourceContext
from visionloop.ingest.paths.listing import ImageFolder, ListedFile, choose_images, is_image_name
from visionloop.ingest.sources.folder import Files, read_by_place
from visionloop.ingest.tables.join import read_shelf_table
from visionloop.ingest.tables.label_table import LabelTable
from visionloop.ingest.tables.rows import guess_table_kind
from visionloop.params import BucketSource
from visionloop.records import Rejected
from visionloop.store import Bucket, open_bucket

MAX_TABLE_BYTES = 256 << 20


def read_bucket(source: BucketSource, context: SourceContext) -> Iterator[Item | Rejected | PassedOver]:
    """Yield the images below a prefix in the order of their keys; hidden names and other objects are passed over.

    Raises:
        SourceError: the bucket cannot be listed, its table cannot be read, or no image in it has a label.
    """
    where = f"source {source.name} {source.path}"
    try:
        shelf = BucketShelf(open_bucket(source.path, source.endpoint_url), where)
    except (StoreError, SettingsError) as exc:
        raise _as_source_error(exc, where) from exc
    if source.table is not None:
        yield from _read_by_table(source, source.table, context, shelf)
        return
    images, passed = choose_images(shelf.files.values())
    files = Files(source.name, where, images, passed, shelf.make_reader)
    yield from read_by_place(files, context, pattern=source.pattern, unlabelled=source.unlabelled)


def _read_by_table(
    source: BucketSource, name: str, context: SourceContext, shelf: "BucketShelf"
) -> Iterator[Item | Rejected | PassedOver]:
    if name not in shelf.files:
        tables = [key for key in shelf.files if guess_table_kind(key)]
        there = f"one of {shorten(tables)}" if tables else "a CSV, Parquet, JSON or JSON lines object below the prefix"
        raise SourceError(shelf.where, f"there is no {name}", there, "Correct `table` in params.yaml.")
    folder = name.rpartition("/")[0]
    has_images = any(key.startswith(f"{folder}/") and is_image_name(key.rsplit("/", 1)[-1]) for key in shelf.files)
    yield from read_shelf_table(
        LabelTable(
            source=source.name,
            where=f"{shelf.where} {name}",
            shelf=shelf,
            name=name,
            columns=source.columns,
            tell=context.tell,
            several=context.several,
            encoding=source.encoding,
            command=f"visionloop ingest {source.path} --table {shlex.quote(name)}",
            images=(shelf, folder) if folder and has_images else None,
        )
    )


class BucketShelf:
    """The objects of a listing as a shelf; hidden ones are left out. `files` are by their key below the prefix."""

    def __init__(self, bucket: Bucket, where: str) -> None:
        self.where = where
        self._bucket = bucket
        self._entries = {entry.key: entry for entry in bucket.scan() if not _is_hidden(entry.key)}
        self.files = {key: ListedFile(key, key, f"{one.num_bytes}-{one.etag}") for key, one in self._entries.items()}
        self._tables: dict[str, bytes] = {}

    def list_folders(self) -> list[str]:
        return sorted({key.partition("/")[0] for key in self.files if "/" in key})

    def index(self, folder: str) -> ImageFolder:
        prefix = f"{folder}/" if folder else ""
        inside = {key[len(prefix) :]: found for key, found in self.files.items() if key.startswith(prefix)}
        index = _BucketFolder(Path())
        index.files = {key: found._replace(relative=key) for key, found in inside.items()}
        index.url = f"{self._bucket.url}/{prefix}"
        return index

    def list_images(self, folder: str) -> tuple[list[ListedFile], PassedOver]:
        return choose_images(self.index(folder).files.values())

    def make_reader(self, found: ListedFile) -> Callable[[int], bytes]:
        return partial(self._bucket.read, self._entries[found.path])

    def open_table(self, name: str) -> BinaryIO | Path:
        """Return the table, fetched once. Raises SourceError."""
        if name not in self._tables:
            try:
                self._tables[name] = self._bucket.read(self._entries[name], MAX_TABLE_BYTES)
            except (ImageError, StoreError) as exc:
                raise _as_source_error(exc, f"{self.where} {name}") from exc
        return io.BytesIO(self._tables[name])


class _BucketFolder(ImageFolder):
    """Objects below one folder; a row may also name one by its whole address, `s3://bucket/prefix/KEY`."""

    url = ""

    def look_up(self, reference: str, read_side: Callable[[], str | None] | None = None) -> ListedFile | None:
        return super().look_up(reference.strip().removeprefix(self.url), read_side)


def _is_hidden(key: str) -> bool:
    """Say whether a key is passed over: of a hidden file or folder, or the mark of an empty folder."""
    return key.endswith("/") or key.startswith(".") or "/." in key


def _as_source_error(exc: VisionLoopError, where: str) -> SourceError:
    error = SourceError(where, exc.found, exc.expected, exc.todo)
    error.transient = exc.transient
    return error
