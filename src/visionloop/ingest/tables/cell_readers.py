"""Readers of what a cell may hold instead of a file's path: a URL, or the bytes themselves."""

from collections.abc import Callable, Sequence

from visionloop.errors import ImageError
from visionloop.ingest.sources.item import Reading
from visionloop.ingest.tables.row_items import Found

URL_STARTS = ("http://", "https://")


def is_url(text: str) -> bool:
    """Say whether a cell is a URL that an image may be fetched from."""
    return text.lower().startswith(URL_STARTS)


def make_url_finder(hosts: Sequence[str], reading: Reading) -> Callable[[str], Found]:
    """Return what makes the reader of a URL, once its host was checked. Raises SourceError when a host is none."""
    from visionloop.ingest.web.download import make_fetcher

    fetcher = make_fetcher(reading, hosts)

    def find(url: str) -> Found:
        fetcher.check(url)
        return Found(fetcher.describe(url), fetcher.make_reader(url))

    return find


def give_bytes(data: bytes, max_bytes: int) -> bytes:
    """Return the bytes of a cell. Raises ImageError."""
    if len(data) > max_bytes:
        raise ImageError("cell", f"holds {len(data):,} bytes", f"at most {max_bytes:,}", reason_code="too_large")
    return data
