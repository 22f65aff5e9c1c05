"""An HTTP API: a listing in JSON or CSV, page by page, then the images that it names.

The images are fetched when they are read, by many threads; `web/download.py` has the limits and the checks.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any
from urllib.parse import quote, unquote_plus, urljoin

from visionloop.errors import ImageError, SourceError, shorten
from visionloop.ingest.item import Cursor, Item, SourceContext
from visionloop.ingest.tables.cells import get_cell
from visionloop.ingest.tables.rows import (
    BAD_ROW,
    SAMPLE_ROWS,
    Reading,
    Row,
    RowImage,
    RowPlan,
    TableKind,
    find_stamp_column,
    guess_table_kind,
    make_item,
    plan_columns,
    read_rows,
    read_stamp,
)
from visionloop.params import HttpSource
from visionloop.records import Rejected
from visionloop.secrets import Environment, mask
from visionloop.web.addresses import parse_url
from visionloop.web.download import Fetched, Fetcher, make_fetcher

MAX_PAGE_BYTES = 64 << 20
MAX_CURSOR_CHARS = 4096
_LINK = re.compile(r"<([^<>]*)>((?:\s*;\s*[\w*-]+\s*=\s*(?:\"[^\"]*\"|[^\s;,\"]+))*)")
_REL = re.compile(r"(?i);\s*rel\s*=\s*(?:\"([^\"]*)\"|([^\s;,\"]+))")
BATCH_ROWS = 32
NUM_ASKING = 8
# Committed with the first version; later pulls ask servers for ETags, to fetch only what changed.
PULLED_BEFORE = "pulled"


@dataclass(frozen=True)
class Page:
    """One page: its number from 1, the URL asked for, the URL that answered, its rows, the whole answer if JSON."""

    number: int
    asked: str
    url: str
    rows: list[Row]
    answer: Any
    link: str

    def digest(self) -> str:
        """Digest of the rows: a listing that gives the same page again would never end."""
        return hashlib.sha256(repr(self.rows).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Listing:
    """A listing of the source that begins at `url`. `where` and `tell` are for messages."""

    source: HttpSource
    url: str
    fetcher: Fetcher
    where: str
    tell: Callable[[str], None]

    def walk(self) -> Iterator[Page]:
        """Yield the pages, each fetched when it is asked for.

        Raises:
            SourceError: a page cannot be fetched or is no table, pages repeat without end, or there are too many.
        """
        seen: dict[str, int] = {}
        asked: set[str] = set()
        counted = self.source.page
        url = set_query(self.url, counted, str(find_number(self.url, counted))) if counted else self.url
        for number in range(1, self.source.max_pages + 1):
            asked.add(url)
            page = self._load(url, number)
            if page is None or self._repeats(page, seen):
                return
            yield page
            following = self._find_next(page)
            if following is None:
                return
            if following in asked:
                raise SourceError(self._place(page), "leads back to a page before", "an end", "Check the listing.")
            url = following
        raise SourceError(self.where, f"has more than {self.source.max_pages:,} pages", "an end", "Raise max_pages.")

    def _place(self, page: Page) -> str:
        return f"{self.where} page {page.number}"

    def _load(self, url: str, number: int) -> Page | None:
        """Return a page; None when a counted page lies beyond the end."""
        where = f"{self.where} page {number}"
        may_be_the_end = self.source.page is not None and number > 1
        try:
            fetched = self.fetcher.fetch(url, MAX_PAGE_BYTES)
        except ImageError as exc:
            if may_be_the_end and exc.found.startswith("answered 404"):
                return None
            raise SourceError(where, f"{exc.where} {exc.found}", exc.expected, exc.todo) from exc
        if fetched.data.lstrip()[:1] == b"<":
            todo = "Check the URL, and the credentials in `headers`."
            raise SourceError(where, "is a page for people (HTML) or XML", "a listing in JSON or CSV", todo)
        kind = guess_kind(fetched)
        answer = _load_json(fetched.data, where) if kind == "json" else None
        if kind == "json":
            rows = self._find_rows(answer, number, where)
        elif fetched.data.strip():
            rows = list(read_rows(io.BytesIO(fetched.data), kind, where, self.tell))
        else:
            rows = []
        if may_be_the_end and not rows:
            return None
        return Page(number, url, fetched.url, rows, answer, find_link(fetched.headers.get("link", "")))

    def _repeats(self, page: Page, seen: dict[str, int]) -> bool:
        """True at the end of a listing that gives its last page for every higher number. Raises SourceError."""
        before = seen.setdefault(page.digest(), page.number)
        if before == page.number or not page.rows:
            return False
        if self.source.page and before == page.number - 1 > 1:
            self.tell(f"{self._place(page)} repeats page {before}: taken as the end")
            return True
        todo = "Check `next`, `page` or `cursor`; leave it out if the listing has one page only."
        raise SourceError(self._place(page), f"has the same rows as page {before}", "pages that differ", todo)

    def _find_rows(self, answer: Any, number: int, where: str) -> list[Row]:
        """Return the rows of a JSON answer: under the key `items`, or of the one list that is there."""
        items, keys, value = self.source.items, "no keys", answer
        if isinstance(answer, dict):
            keys = shorten([str(key)[:60] for key in answer])
            lists = {key: part for key, part in answer.items() if isinstance(part, list)}
            if items is not None:
                value = get_cell(answer, items)
            elif len(lists) == 1:
                key, value = lists.popitem()
                if number == 1:
                    self.tell(f"{where}: rows taken from {key[:80]!r} (name it in `items` to be sure)")
            else:
                found = f"is an object with {len(lists)} lists ({keys})"
                raise SourceError(where, found, "a list of objects", "Name the key of the list in `items`.")
        elif items is not None:
            value = None
        if value is None and items and number > 1:
            return []
        if not isinstance(value, list):
            found = f"has no list under {items!r}; there is {keys}" if items else f"holds a {type(value).__name__}"
            raise SourceError(where, found, "a list of objects", "Check `items` and `url`.")
        return [row if isinstance(row, dict) else {BAD_ROW: f"row {i} is no object"} for i, row in enumerate(value, 1)]

    def _find_next(self, page: Page) -> str | None:
        """Return the URL of the next page, or None at the end. Raises SourceError when it is no URL."""
        source = self.source
        if source.page:
            number = find_number(page.asked, source.page) + 1
            return set_query(page.asked, source.page, str(number)) if page.rows else None
        if source.cursor:
            key, parameter = source.cursor
            value = self._find_value(page, key)
            return None if value is None else set_query(page.asked, parameter, value)
        link = self._find_value(page, source.next) if source.next else page.link
        if not link:
            return None
        try:
            # urljoin silently drops line ends and tabs, so a link with them is refused first.
            return parse_url(urljoin(page.url, link) if link.isprintable() else link).url
        except ImageError as exc:
            raise SourceError(self._place(page), f"leads to no URL: {exc.found}", exc.expected, "Check it.") from exc

    def _find_value(self, page: Page, key: str) -> str | None:
        """Return the text under a key of the answer; None at the end."""
        value = get_cell(page.answer, key) if isinstance(page.answer, dict) else None
        if value is None and page.number == 1:
            self.tell(f"{self._place(page)} has no {key!r}: taken as the only page")
        if value is None or value is False or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > MAX_CURSOR_CHARS:
            found = f"has no short text under {key!r}"
            raise SourceError(self._place(page), found, "a link or a cursor", "Check `next` or `cursor`.")
        return str(value)


def guess_kind(fetched: Fetched) -> TableKind:
    """Return what an answer is, by its Content-Type, else by the URL, else by how it begins."""
    content_type = fetched.headers.get("content-type", "").lower()
    if re.search(r"ndjson|jsonl|json-?lines", content_type):
        return "jsonl"
    if "json" in content_type:
        return "json"
    if "csv" in content_type or "tab-separated" in content_type:
        return "csv"
    kind = guess_table_kind(fetched.url.partition("?")[0])
    if kind is None or kind == "parquet":
        return "json" if fetched.data.lstrip()[:1] in {b"[", b"{"} else "csv"
    return kind


def find_link(header: str) -> str:
    """Return the target of `Link: <URL>; rel="next"` (RFC 8288), or ""."""
    for match in _LINK.finditer(header):
        relation = _REL.search(match[2])
        if relation and "next" in (relation[1] or relation[2]).lower().split():
            return match[1]
    return ""


def find_number(url: str, parameter: str) -> int:
    """Return the number of the page that a URL asks for; 1 when it names none."""
    for part in url.partition("?")[2].split("&"):
        name, _, value = part.partition("=")
        if unquote_plus(name) == parameter and value.isascii() and value.isdigit() and len(value) < 10:
            return int(value)
    return 1


def set_query(url: str, parameter: str, value: str) -> str:
    """Return the URL with one parameter of its query set; the others stay as they are."""
    path, _, query = url.partition("?")
    kept = [part for part in query.split("&") if part and unquote_plus(part.partition("=")[0]) != parameter]
    pair = f"{quote(parameter, safe='')}={quote(value, safe='')}"
    return f"{path}?{'&'.join([*kept, pair])}"


def _load_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as exc:
        reason = "nested too deep" if isinstance(exc, RecursionError) else str(exc)[:120]
        raise SourceError(where, f"is not JSON ({reason})", "a listing in JSON or CSV", "Check the URL.") from exc


def read_http(source: HttpSource, context: SourceContext) -> Iterator[Item | Rejected | Cursor]:
    """Yield the images of a listing in its order.

    Raises:
        SourceError: a variable is missing, a page cannot be fetched, or it is unclear which column is which.
    """
    where = f"source {source.name}"
    environment = Environment(context.env, where)
    url = environment.expand_url(source.url)
    headers = {name: environment.expand(value) for name, value in source.headers.items()}
    secrets = tuple(environment.secrets)
    tell = _make_masked_tell(context.tell, secrets)
    try:
        try:
            address = parse_url(url)
        except ImageError as exc:
            raise SourceError(f"{where} url", exc.found, exc.expected, exc.todo) from exc
        fetcher = make_fetcher(
            context.env,
            [address.netloc, *source.hosts],
            headers=headers,
            headers_host=address.url,
            requests_per_s=source.requests_per_s,
            timeout_s=source.timeout_s,
            secrets=secrets,
        )
        pages = Listing(source, address.url, fetcher, where, tell).walk()
        yield from _read_pages(
            source, pages, fetcher, where, tell, several=context.several, asks_for_stamps=context.cursor is not None
        )
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
    several: bool,
    asks_for_stamps: bool,
) -> Iterator[Item | Rejected]:
    first = next((page for page in pages if page.rows), None)
    sample = first.rows[:SAMPLE_ROWS] if first else []
    plan = plan_columns(source.columns, sample, where, tell, Reading(several, own=[find_stamp_column(sample)]))
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


def _find_image(reference: str | bytes, page_url: str, fetcher: Fetcher, stamp: str | None) -> RowImage:
    url = _join(page_url, reference)
    fetcher.check(url)
    return RowImage(fetcher.describe(url), fetcher.make_reader(url), stamp)


def _join(page_url: str, reference: str | bytes) -> str:
    """Return the URL of an image; a relative one starts at its page. Raises ImageError."""
    if isinstance(reference, bytes):
        raise ImageError("row", "holds bytes", "a URL", reason_code="refused_url")
    # urljoin silently drops line ends and tabs; a link with them is passed on as it is, and refused later.
    return reference if not reference.isprintable() or "\\" in reference else urljoin(page_url, reference)


def _ask_for_stamps(rows: Sequence[Row], plan: RowPlan, page_url: str, fetcher: Fetcher) -> list[str | None]:
    """Return the ETag of each row's image. The fetcher's pace holds for these requests too."""

    def ask(row: Row) -> str | None:
        try:
            reference = plan.read_image(row)
            return fetcher.fetch_stamp(_join(page_url, reference)) if reference else None
        except ImageError:
            return None  # `make_item` reports what is wrong with this row

    with ThreadPoolExecutor(NUM_ASKING) as pool:
        return list(pool.map(ask, rows))


def _make_masked_tell(tell: Callable[[str], None], secrets: Sequence[str]) -> Callable[[str], None]:
    return lambda line: tell(mask(line, secrets))
