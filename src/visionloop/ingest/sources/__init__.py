"""Sources of images, one file per kind. A source yields items and decides nothing: no split, no decoding.

Add one: a file here with a function that returns an iterable of `Item`, its section in `params.py`, a line below.
"""

from collections.abc import Iterator
from pathlib import Path

from visionloop.ingest.sources.digits import read_digits
from visionloop.ingest.sources.folder import read_folder
from visionloop.ingest.sources.item import Item
from visionloop.params import DigitsSource, Source

__all__ = ["Item", "read_source"]


def read_source(source: Source, *, home: Path, hidden_dir: Path) -> Iterator[Item]:
    """Yield the items of a declared source; relative paths are relative to the workspace. Raises SourceError."""
    if isinstance(source, DigitsSource):
        yield from read_digits(source.name, hidden_dir / "sources" / "digits")
    else:
        yield from read_folder(source.name, (home / Path(source.path).expanduser()).resolve())
