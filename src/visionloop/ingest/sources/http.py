"""An HTTP API: a listing in JSON or CSV, page by page, then the images that it names.

The images are fetched when they are read, by many threads; how safely and how fast is in `ingest/web/download.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from urllib.parse import urljoin

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.environment import Environment
from visionloop.ingest.sources.item import Cursor, Item, Reading
from visionloop.ingest.tables.row_items import Found, find_stamp_column, make_item, read_stamp
from visionloop.ingest.tables.rows import SAMPLE_ROWS, Row, RowPlan, plan_columns
from visionloop.ingest.web.addresses import mask, parse_url
from visionloop.ingest.web.download import Fetcher, make_fetcher
from visionloop.ingest.web.pages import Listing, Page
from visionloop.params import HttpSource
from visionloop.records import Rejected

BATCH_ROWS = 32
NUM_ASKING = 8
# Committed with the first version; from then on servers are asked for ETags, since what did not change is not fetched.
PULLED_BEFORE = "pulled"


def read_http(source: HttpSource, reading: Reading) -> Iterator[Item | Rejected | Cursor]:
    """Yield the images of a listing in its order.

    Raises:
        SourceError: a variable is missing, a page cannot be had after retries, or its columns cannot be told apart.
    """
    where = f"source {source.name}"
    environment = Environment(reading.env, where)
    url = environment.expand_url(source.url)
    headers = {name: environment.expand(value) for name, value in source.headers.items()}
    secrets = tuple(environment.secrets)
    tell = _make_masked_tell(reading.tell, secrets)
    try:
        try:
            address = parse_url(url)
        except ImageError as exc:
            raise SourceError(f"{where} url", exc.found, exc.expected, exc.todo) from exc
        fetcher = make_fetcher(
            reading,
            [address.netloc, *source.hosts],
            headers=headers,
            headers_host=address.url,
            requests_per_s=source.requests_per_s,
            timeout_s=source.timeout_s,
            secrets=secrets,
        )
        pages = Listing(source, address.url, fetcher, where, tell).walk()
        yield from _read_pages(source, pages, fetcher, where, tell, asks_for_stamps=reading.cursor is not None)
    except SourceError as exc:
        raise SourceError(*(mask(part, secrets) for part in (exc.where, exc.found, exc.expected, exc.todo))) from None
    yield Cursor(source.name, PULLED_BEFORE)


def _read_pages(
    source: HttpSource,
    pages: Iterator[Page],
    fetcher: Fetcher,
    where: str,
    tell: Callable[[str], None],
    *,
    asks_for_stamps: bool,
) -> Iterator[Item | Rejected]:
    first = next((page for page in pages if page.rows), None)
    sample = first.rows[:SAMPLE_ROWS] if first else []
    plan = plan_columns(source.columns, sample, where, tell)
    stamp_column = find_stamp_column(sample)
    if stamp_column:
        tell(f"{where}: an image counts as unchanged while its {stamp_column} does")
    for page in chain([first] if first else [], pages):
        for start in range(0, len(page.rows), BATCH_ROWS):
            batch = page.rows[start : start + BATCH_ROWS]
            stamps: Sequence[str | None] = [read_stamp(row, stamp_column) if stamp_column else None for row in batch]
            if asks_for_stamps and not stamp_column:
                stamps = _ask_for_stamps(batch, plan, page.url, fetcher)
            for i, (row, stamp) in enumerate(zip(batch, stamps, strict=True), start=start + 1):
                find = partial(_find_image, page_url=page.url, fetcher=fetcher, stamp=stamp)
                yield make_item(row, plan, source.name, f"page {page.number} row {i}", find)


def _find_image(reference: str | bytes, page_url: str, fetcher: Fetcher, stamp: str | None) -> Found:
    url = _join(page_url, reference)
    fetcher.check(url)
    return Found(fetcher.describe(url), fetcher.make_reader(url), stamp)


def _join(page_url: str, reference: str | bytes) -> str:
    """Return the URL of an image; a relative one starts at its page. Raises ImageError."""
    if isinstance(reference, bytes):
        raise ImageError("row", "holds bytes", "a URL", reason_code="refused_url")
    # urljoin drops tabs and line ends: what it would mend goes on unmended, to be refused.
    return reference if not reference.isprintable() or "\\" in reference else urljoin(page_url, reference)


def _ask_for_stamps(rows: Sequence[Row], plan: RowPlan, page_url: str, fetcher: Fetcher) -> list[str | None]:
    """Return the ETag of each row's image. The fetcher's pace holds for these requests too."""

    def ask(row: Row) -> str | None:
        try:
            reference = plan.read_image(row)
            return fetcher.fetch_stamp(_join(page_url, reference)) if reference else None
        except ImageError:
            return None  # make_item will say what is wrong with this row

    with ThreadPoolExecutor(NUM_ASKING) as pool:
        return list(pool.map(ask, rows))


def _make_masked_tell(tell: Callable[[str], None], secrets: Sequence[str]) -> Callable[[str], None]:
    return lambda line: tell(mask(line, secrets))
