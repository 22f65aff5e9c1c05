"""Fetch pages and images over HTTP from hosts that the user named, and from nowhere else.

Every hop of a redirect is checked like the first URL, and so is the address of each connection (`connect.py`).
Size is counted after decompression. Proxies, cookies and passwords of the environment are not used: a proxy would
connect in our place, and nothing could be checked. There are few retries, and a host that keeps failing is given up.
They are here and not in the flow, because one failed page of 10,000 should not start all of them again.
"""

import io
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, NoReturn
from urllib.parse import urljoin

from visionloop.errors import ImageError, SourceError, describe_install
from visionloop.secrets import mask
from visionloop.web.addresses import Address, HostRule, HostRules, describe_url, parse_hosts, parse_url
from visionloop.web.body import Body, Pace, TryAgain, find_validator, goes_on, make_unreadable, parse_retry_after

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import httpcore

    from visionloop.web.connect import Deadline

MAX_REDIRECTS = 5
MAX_PASSED = 10_000
TRIES = 4
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 60.0
MIN_BYTES_PER_S = 100_000  # an answer at least so fast may take longer than `timeout_s`
PRIVATE_HOSTS = "VISIONLOOP_PRIVATE_HOSTS"
IDENTITY = {"Accept-Encoding": "identity"}
REDIRECTS = frozenset({301, 302, 303, 307, 308})
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_REASON = 120
_RAW = re.compile(r"bytearray\(b(.*)\)$")


@dataclass(frozen=True)
class Fetched:
    """An answer: its body, decompressed, the URL that it came from in the end, and its headers in lower case."""

    data: bytes
    url: str
    headers: Mapping[str, str]


def explain_failure(exc: Exception) -> str:
    """Say in one short line why a connection failed; what a server sent that is no HTTP is escaped in it."""
    why = _RAW.sub(r"\1", str(exc)) or type(exc).__name__
    return f"the connection failed ({why if len(why) <= MAX_REASON else f'{why[:MAX_REASON]}...'})"


def make_fetcher(
    env: Mapping[str, str],
    hosts: Sequence[str] | HostRules,
    *,
    headers: Mapping[str, str] | None = None,
    headers_host: str | None = None,
    requests_per_s: float = 20.0,
    timeout_s: float = 30.0,
    secrets: Sequence[str] = (),
) -> "Fetcher":
    """Return a fetcher for the listed hosts: `example.com`, `*.example.com`, `example.com:8443`. Safe for threads.

    `env` may hold VISIONLOOP_PRIVATE_HOSTS: hosts that may have a private address. Rules may stand for both.

    `headers` go only to the scheme, host and port of the URL `headers_host`. `secrets` are masked in messages.

    Raises:
        SourceError: an entry of `hosts` or VISIONLOOP_PRIVATE_HOSTS is no host, a header cannot be sent, or httpcore
            is not installed.
    """
    try:
        from visionloop.web.connect import Deadline, make_pool
    except ModuleNotFoundError as exc:
        expected, todo = "the extra `ingest` or `train`", f"Run `{describe_install('ingest')}`."
        raise SourceError("download", f"{exc.name} is not installed", expected, todo) from exc
    rules = hosts if isinstance(hosts, HostRules) else HostRules(parse_hosts(hosts, "hosts"), parse_private_hosts(env))
    deadline = Deadline()
    return Fetcher(
        rules=rules,
        pool=make_pool(rules, deadline),
        deadline=deadline,
        pace=Pace(requests_per_s),
        headers=check_headers(headers or {}),
        headers_origin=parse_url(headers_host).origin if headers_host else None,
        timeout_s=timeout_s,
        secrets=tuple(secrets),
    )


def parse_private_hosts(env: Mapping[str, str]) -> tuple[HostRule, ...]:
    """Return the hosts of VISIONLOOP_PRIVATE_HOSTS. Raises SourceError."""
    return parse_hosts(env.get(PRIVATE_HOSTS, "").replace(",", " ").split(), PRIVATE_HOSTS)


@dataclass(frozen=True)
class Fetcher:
    """Fetches from allowed hosts, at most `requests_per_s`. Made by `make_fetcher`.

    `passed` are schemes, hosts and ports that the rules allow: a table names one host a million times.
    """

    rules: HostRules
    pool: "httpcore.ConnectionPool"
    deadline: "Deadline"
    pace: Pace
    headers: Mapping[str, str]
    headers_origin: tuple[str, str, int] | None
    timeout_s: float
    secrets: tuple[str, ...]
    passed: set[tuple[str, str, int]] = field(default_factory=set)

    def check(self, url: str) -> Address:
        """Parse and check a URL without connecting. Raises ImageError (`refused_url`)."""
        try:
            address = parse_url(url)
            if address.origin not in self.passed:
                self.rules.check(address)
                if len(self.passed) < MAX_PASSED:
                    self.passed.add(address.origin)
        except ImageError as exc:
            raise self._masked(exc) from None
        return address

    def describe(self, url: str) -> str:
        """Return host and path of a URL that may be shown and kept: without query and secrets."""
        try:
            return self.describe_address(parse_url(url))
        except ImageError:
            return mask(describe_url(url), self.secrets)

    def describe_address(self, address: Address) -> str:
        """Return what `describe` does for a URL that was parsed."""
        return mask(address.place, self.secrets)

    def make_reader(self, url: str) -> Callable[[int], bytes]:
        """Return the `read` of an item. It raises ImageError: `refused_url`, `unreadable` or `too_large`."""
        return partial(self._read, url)

    def fetch(self, url: str, max_bytes: int) -> Fetched:
        """Return the answer to GET, which the server may compress. Raises ImageError as a reader does."""
        file = io.BytesIO()
        return replace(self._fetch("GET", url, max_bytes, {"Accept-Encoding": "gzip"}, file), data=file.getvalue())

    def download(self, url: str, file: BinaryIO, max_bytes: int) -> None:
        """Write the answer to GET into an empty file. Raises ImageError as a reader does."""
        self._fetch("GET", url, max_bytes, IDENTITY, file)

    def fetch_stamp(self, url: str) -> str | None:
        """Return the ETag of a URL, or its date and length, by HEAD; None when the server gives neither."""
        try:
            headers = self._fetch("HEAD", url, 0, IDENTITY, io.BytesIO()).headers
        except ImageError:
            return None  # reading the image reports what is wrong
        if etag := headers.get("etag"):
            return f"etag {etag}"
        date, length = headers.get("last-modified"), headers.get("content-length")
        return f"date {date} {length}" if date and length else None

    def open_stream(
        self, method: str, address: Address, headers: Mapping[str, str]
    ) -> "AbstractContextManager[httpcore.Response]":
        """Send one request: no retry, no redirect; `timeout_s` limits each wait. `address` must be checked before."""
        import httpcore

        secret = self.headers if self.headers_origin == address.origin else {}
        sent = {"User-Agent": "visionloop", "Accept": "*/*", **headers, **secret, "Host": address.netloc}
        url = httpcore.URL(
            scheme=address.scheme.encode(),
            host=address.host.encode(),
            port=address.port,
            target=address.target.encode(),
        )
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), self.timeout_s)
        return self.pool.stream(method, url, headers=list(sent.items()), extensions={"timeout": timeouts})

    def _read(self, url: str, max_bytes: int) -> bytes:
        file = io.BytesIO()
        self.download(url, file, max_bytes)
        return file.getvalue()

    def _fetch(self, method: str, url: str, max_bytes: int, headers: Mapping[str, str], file: BinaryIO) -> Fetched:
        """Return the answer; its body is in the file."""
        address = self.check(url)
        where = self.describe(url)
        if self.pace.has_given_up(address.host):
            raise make_unreadable(
                where, f"{address.host} failed too often in a row", "It is not asked again in this run."
            )
        body = Body(file)
        for attempt in range(TRIES):
            try:
                fetched = self._follow(method, address, max_bytes, headers, body)
            except TryAgain as exc:
                if attempt < TRIES - 1 and self._may_try_again(address.host, exc.wait_s, FIRST_WAIT_S * 2**attempt):
                    continue
                self.pace.note(address.host, failed=exc.of_host)
                wish = f", and asks to wait {exc.wait_s:,.0f} s" if exc.wait_s else ""
                raise make_unreadable(where, mask(exc.reason, self.secrets) + wish, "Run it again later.") from exc
            except ImageError as exc:
                self.pace.note(address.host, failed=False)
                raise self._masked(exc) from exc.__cause__
            self.pace.note(address.host, failed=False)
            return fetched
        raise AssertionError("the last try ends the loop")

    def _may_try_again(self, host: str, wished_s: float | None, wait_s: float) -> bool:
        """Wait before the next try; a wait that a server asks for holds for all threads. False when it is too long."""
        if wished_s is None:
            self.pace.rest(wait_s)
        elif wished_s <= MAX_WAIT_S:
            self.pace.hold(host, wished_s)
        return wished_s is None or wished_s <= MAX_WAIT_S

    def _follow(self, method: str, address: Address, max_bytes: int, headers: Mapping[str, str], body: Body) -> Fetched:
        first = address
        for _ in range(MAX_REDIRECTS + 1):
            try:
                self.rules.check(address)
            except ImageError as exc:
                _refuse(first.place, f"redirects to {address.place}: {exc.found}", exc.expected)
            answer = self._request(method, address, max_bytes, headers, body)
            if isinstance(answer, Fetched):
                return answer
            address = answer
        _refuse(first.place, f"redirects more than {MAX_REDIRECTS} times", "an image")

    def _request(
        self, method: str, address: Address, max_bytes: int, headers: Mapping[str, str], body: Body
    ) -> Fetched | Address:
        """Return the answer, or where it redirects to. Raises TryAgain, ImageError."""
        import httpcore

        headers = {**headers, **body.ask_for_rest(address.url)}
        self.pace.wait(address.host)
        try:
            with (
                self.deadline.within(self.timeout_s),
                self.open_stream(method, address, headers) as response,
            ):
                return self._receive(method, response, address, max_bytes, body)
        except httpcore.TimeoutException as exc:
            raise TryAgain(f"gave no whole answer within {self.timeout_s:g} s") from exc
        except (httpcore.NetworkError, httpcore.ProtocolError) as exc:
            if exc.args and isinstance(exc.args[0], ssl.SSLCertVerificationError):
                message = f"has no certificate that can be trusted ({exc.args[0].verify_message})"
                raise make_unreadable(address.place, message, "Check the address.") from exc
            raise TryAgain(explain_failure(exc)) from exc

    def _receive(
        self, method: str, response: "httpcore.Response", address: Address, max_bytes: int, body: Body
    ) -> Fetched | Address:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        status = response.status
        if status in REDIRECTS and "location" in headers:
            return follow_redirect(address, headers["location"])
        if status in TRANSIENT:
            wished_s = parse_retry_after(headers.get("retry-after"))
            raise TryAgain(f"answered {status}", wished_s, of_host=status != 500)
        if status == 206 and goes_on(headers, body.num_bytes):
            pass
        elif status == 200:
            body.start(address.url, find_validator(headers))
        elif status in {206, 416} and body.num_bytes:
            body.start(address.url, None)
            raise TryAgain("answered with another part than the one asked for", of_host=False)
        else:
            raise make_unreadable(address.place, f"answered {status}", _advise(status))
        if method != "HEAD":
            body.receive(response.iter_stream(), headers, max_bytes, address.place, self._extend_deadline)
        return Fetched(b"", address.url, headers)

    def _extend_deadline(self, num_bytes: int) -> None:
        self.deadline.extend(num_bytes / MIN_BYTES_PER_S)

    def _masked(self, error: ImageError) -> ImageError:
        parts = (mask(part, self.secrets) for part in (error.where, error.found, error.expected, error.todo))
        return ImageError(*parts, reason_code=error.reason_code)


def check_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return headers that can be sent. Raises SourceError, which names the header and not its value."""
    for name, value in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or not re.fullmatch(
            r"[\x21-\x7e]([\x20-\x7e\t]*)", value
        ):
            raise SourceError(
                f"header {name!r}", "cannot be sent", "a name, and a value of plain characters in one line"
            )
        if name.lower() in {"host", "content-length", "transfer-encoding", "connection", "range", "if-range"}:
            raise SourceError(f"header {name!r}", "is set by visionloop", "another header")
    return dict(headers)


def follow_redirect(address: Address, location: str) -> Address:
    """Return where a redirect leads. The text is checked before `urljoin` could change it. Raises ImageError."""
    if re.search(r"[\x00-\x20\x7f\\]", location):
        _refuse(address.place, f"redirects to {describe_url(location)}", "a plain URL")
    target = parse_url(urljoin(address.url, location))
    if address.scheme == "https" and target.scheme == "http":
        _refuse(address.place, f"redirects from https to http ({target.place})", "https")
    return target


def _advise(status: int) -> str:
    if status in {401, 403, 407}:
        return "Check the credentials in `headers`."
    return "Check the address." if status in {404, 410} else "Ask its owner."


def _refuse(where: str, found: str, expected: str) -> NoReturn:
    raise ImageError(where, found, expected, reason_code="refused_url")
