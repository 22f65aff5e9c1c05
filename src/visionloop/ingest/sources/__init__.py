"""Sources of images, one file per kind. A source yields items and decides nothing: no side, no decoding.

Add one: a file here with a function `read_x(source, context)` that yields `Item`, `Rejected` (what could not be used,
with the reason), what it passed over (`PassedOver`) and, if it is incremental, `Cursor`; its section in
`params/ingest.py`; a line below.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from visionloop.ingest.item import Cursor, Item, PassedOver, SourceContext, make_file_reader
from visionloop.params import Source
from visionloop.records import Rejected

__all__ = ["Cursor", "Item", "PassedOver", "SourceContext", "make_file_reader", "read_source"]

# Imported when they are needed: a folder of photos needs no database and no video library.
READERS = {
    "folder": "folder:read_folder",
    "table": "table:read_table",
    "archive": "archive:read_archive",
    "python": "python:read_python",
    "bucket": "bucket:read_bucket",
    "digits": "folder:read_digits",
    "http": "http:read_http",
    "sql": "sql:read_sql",
    "video": "video:read_video",
    "review": "review:read_review",
    "feedback": "review:read_feedback",
}


def read_source(source: Source, context: SourceContext) -> Iterator[Item | Rejected | Cursor | PassedOver]:
    """Yield what a declared source offers, in its order. Raises SourceError when it cannot be read as a whole."""
    module, function = READERS[source.kind].split(":")
    reader: Callable[[Any, SourceContext], Iterator[Item | Rejected | Cursor | PassedOver]]
    reader = getattr(import_module(f"{__name__}.{module}"), function)
    return reader(source, context)
