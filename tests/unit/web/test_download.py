"""What surrounds a download, without a network: URLs, hosts, addresses, pace, bodies, and what is masked."""

import gzip
import io
import ipaddress
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloop.errors import ImageError, SourceError
from visionloop.secrets import Environment, mask
from visionloop.web.addresses import HostRules, classify, describe_url, parse_hosts, parse_url
from visionloop.web.body import Body, Pace, TryAgain, find_validator, goes_on, parse_retry_after
from visionloop.web.download import make_fetcher


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("HTTP://Photos.Example", "http://photos.example/"),
        ("https://photos.example:443/a b/ü.jpg?x=ä&y=1#top", "https://photos.example/a%20b/%C3%BC.jpg?x=%C3%A4&y=1"),
        ("http://photos.example:8080/a%20b?", "http://photos.example:8080/a%20b?"),
        ("http://[2606:4700::0001]:81/", "http://[2606:4700::1]:81/"),
        ("http://1.2.3.4/", "http://1.2.3.4/"),
        ("http://a_b.example/../x;y=1,2(3)'", "http://a_b.example/../x;y=1,2(3)'"),
    ],
)
def test_urls_have_one_form(url: str, expected: str) -> None:
    assert parse_url(url).url == expected
    assert parse_url(expected).url == expected


@settings(max_examples=150)
@given(
    st.text(max_size=60),
    st.sampled_from(["http://ok.example", "http://", "https://ok.example:1/", "http://ok.example@"]),
)
def test_any_text_is_understood_or_refused(text: str, start: str) -> None:
    try:
        address = parse_url(start + text)
    except ImageError as exc:
        assert exc.reason_code == "refused_url"
        assert str(exc).isprintable()
    else:
        assert address.url.isascii()
        assert address.url.isprintable()
        assert parse_url(address.url) == address


@settings(max_examples=150)
@given(st.text("aZ0/%:@!$&'()*+,;=~-._ \"<>[]^`{|}ü猫", max_size=20), st.text("a/?=& %ü|", max_size=10))
def test_what_needs_no_quoting_is_as_if_it_was_quoted(path: str, query: str) -> None:
    expected = quote(f"/{path}", safe="/%:@!$&'()*+,;=~-._") + quote(f"?{query}", safe="/%:@!$&'()*+,;=~-._?")
    assert parse_url(f"http://ok.example/{path}?{query}").target == expected


def test_a_host_that_has_passed_vouches_for_no_other_port_scheme_or_host() -> None:
    fetcher = make_fetcher({}, ["a.example:81", "*.b.example"])
    for url in ("http://a.example:81/1", "http://a.example:81/2", "https://x.b.example/1"):
        assert fetcher.check(url).url == url
        assert fetcher.describe_address(fetcher.check(url)) == fetcher.describe(url)
    for url in (
        "http://a.example/1",
        "http://b.example/1",
        "http://a.example:81@evil.example/",
        "http://c.example:81/",
    ):
        for _ in range(2):
            with pytest.raises(ImageError, match=r"not in the list of hosts|user name") as refused:
                fetcher.check(url)
            assert refused.value.reason_code == "refused_url"


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        ("8.8.8.8", None),
        ("2606:4700::1", None),
        ("127.0.0.53", "loopback"),
        ("::1", "loopback"),
        ("172.31.255.255", "private"),
        ("172.32.0.1", None),
        ("100.127.0.1", "shared (carrier-grade NAT)"),
        ("169.254.169.254", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("::ffff:8.8.8.8", "embedded IPv4"),
        ("64:ff9b::808:808", "embedded IPv4"),
        ("2002:808:808::", "embedded IPv4"),
        ("0.1.2.3", "unspecified"),
        ("255.255.255.255", "broadcast"),
        ("ff02::1", "multicast"),
        ("198.51.100.7", "reserved"),
        ("5f00::1", "reserved"),
    ],
)
def test_addresses_are_what_they_are(host: str, kind: str | None) -> None:
    assert classify(ipaddress.ip_address(host)) == kind


def test_only_public_addresses_of_the_registry_pass() -> None:
    for first in range(256):
        for rest in ("0.0.1", "16.0.1", "64.0.1", "168.0.1", "254.1.1"):
            ip = ipaddress.ip_address(f"{first}.{rest}")
            assert (classify(ip) is None) <= ip.is_global, ip


def make_rules(*hosts: str, private: tuple[str, ...] = ()) -> HostRules:
    return HostRules(parse_hosts(hosts, "hosts"), parse_hosts(private, "private"))


def test_hosts_are_allowed_by_name_and_port() -> None:
    rules = make_rules("a.example", "*.b.example", "c.example:8443", "c.example")
    for url in ("http://a.example/", "https://x.y.b.example/", "https://c.example:8443/", "https://c.example/"):
        rules.check(parse_url(url))
    for url in ("http://x.a.example/", "http://b.example/", "http://a.example:8443/", "http://c.example:81/"):
        with pytest.raises(ImageError, match="not in the list of hosts"):
            rules.check(parse_url(url))


def test_a_private_host_is_private_on_its_port_only() -> None:
    rules = make_rules("10.0.0.1:81", "10.0.0.1:82", "10.0.0.2", private=("10.0.0.1:81",))
    rules.check(parse_url("http://10.0.0.1:81/"))
    for url in ("http://10.0.0.1:82/", "http://10.0.0.2/"):
        with pytest.raises(ImageError, match="is at a private address; expected a public address"):
            rules.check(parse_url(url))


@pytest.mark.parametrize(
    "entry", ["", "*", "*.com", "http://a.example", "a.example/x", "a b", "*.1.2.3.4", "a.example:x"]
)
def test_entries_that_are_no_hosts(entry: str) -> None:
    with pytest.raises(SourceError, match=r"HOST, HOST:PORT or \*.DOMAIN|a domain of two parts"):
        parse_hosts([entry], "hosts")


def test_places_keep_what_tells_images_apart_and_no_signature() -> None:
    place = parse_url("https://a.example/i?id=7&X-Amz-Signature=abc&token=t&Expires=9").place
    assert place.startswith("a.example/i?")
    assert len(place) == len("a.example/i?") + 12
    assert place == parse_url("https://a.example/i?id=7&X-Amz-Signature=zzz&token=u&Expires=10").place
    assert place != parse_url("https://a.example/i?id=8").place
    assert parse_url("https://a.example/i?sig=abc").place == "a.example/i"
    assert describe_url("ftp://me:secret@host/x?k=secret\n") == "URL ftp://***@host/x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("p@ss/1 p%40ss%2F1 p@ss", "*** *** ***"),
        ("https://me:p@ss@host.example/x?sig=abc&a=1 and s3://b/k", "https://***@host.example/x?... and s3://b/k"),
        ("got 'https://token@host/x?a=1'; expected what?", "got 'https://***@host/x?...'; expected what?"),
        ("me@host.example/x?a=1 #2", "me@host.example/x?a=1 #2"),
    ],
)
def test_secrets_logins_and_queries_are_masked(text: str, shown: str) -> None:
    assert mask(text, ["p@ss/1", "p@ss"]) == shown


def test_pace_lets_a_second_of_requests_go_and_then_one_by_one() -> None:
    now, slept = 100.0, list[float]()
    pace = Pace(4.0, clock=lambda: now, sleep=slept.append)
    for _ in range(7):
        pace.wait("a")
    assert slept == [0.25, 0.5, 0.75]
    pace.wait("b")
    assert len(slept) == 3
    pace.hold("b", 30)
    pace.wait("b")
    assert slept[3:] == [30.0]


def test_pace_holds_over_all_threads() -> None:
    slept: list[float] = []
    pace = Pace(10.0, clock=lambda: 5.0, sleep=slept.append)
    threads = [threading.Thread(target=lambda: [pace.wait("a") for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(slept) == 30
    assert max(slept) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        ("Wed, 01 Jan 2025 00:01:00 GMT", 60.0),
        ("Tue, 31 Dec 2024 00:00:00 GMT", 0.0),
        ("soon", None),
        ("-5", None),
        ("", None),
        (None, None),
        ("9" * 50, float("9" * 20)),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str | None, seconds: float | None) -> None:
    assert parse_retry_after(text, datetime(2025, 1, 1, tzinfo=UTC)) == seconds


def receive(chunks: list[bytes], max_bytes: int = 1000, **headers: str) -> bytes:
    body, counted = Body(), list[int]()
    body.receive(
        chunks, {name.replace("_", "-"): value for name, value in headers.items()}, max_bytes, "a", counted.append
    )
    assert sum(counted) == sum(len(chunk) for chunk in chunks)
    assert isinstance(body.file, io.BytesIO)
    return body.file.getvalue()


def test_gzip_is_read_in_any_pieces_and_members() -> None:
    packed = gzip.compress(b"hello ") + gzip.compress(b"world")
    assert receive([packed], content_encoding="gzip") == b"hello world"
    assert receive([packed[i : i + 1] for i in range(len(packed))], content_encoding="x-gzip") == b"hello world"
    assert receive([gzip.compress(bytes(1000))], content_encoding="gzip") == bytes(1000)


@pytest.mark.parametrize(
    ("read", "code"),
    [
        (lambda: receive([bytes(600), bytes(600)]), "too_large"),
        (lambda: receive([], content_length="1001"), "too_large"),
        (lambda: receive([gzip.compress(bytes(1001))], content_encoding="gzip"), "too_large"),
        (lambda: receive([b"x"], content_encoding="br"), "unreadable"),
    ],
)
def test_bodies_end_at_their_limit(read: Callable[[], bytes], code: str) -> None:
    with pytest.raises(ImageError) as caught:
        read()
    assert caught.value.reason_code == code


def test_cut_gzip_is_tried_again() -> None:
    with pytest.raises(TryAgain, match="was cut"):
        receive([gzip.compress(b"hello")[:-2]], content_encoding="gzip")


def test_a_part_goes_on_only_with_what_it_belongs_to() -> None:
    assert find_validator({"etag": '"a"', "last-modified": "x"}) == '"a"'
    assert find_validator({"etag": 'W/"a"', "last-modified": "x"}) is None
    assert find_validator({"last-modified": "x"}) == "x"
    assert find_validator({"etag": '"a"', "content-encoding": "gzip"}) is None
    assert goes_on({"content-range": "bytes 5-9/10"}, 5)
    assert not goes_on({"content-range": "bytes 0-9/10"}, 5)
    assert not goes_on({"content-range": "bytes 5-9/10", "content-encoding": "gzip"}, 5)
    file = io.BytesIO(b"12345")
    body = Body(file, 5, "http://a.example/x", '"a"')
    assert body.ask_for_rest("http://a.example/x") == {"Range": "bytes=5-", "If-Range": '"a"'}
    assert body.ask_for_rest("http://b.example/x") == {}
    assert (body.num_bytes, file.getvalue()) == (0, b"")


def test_variables_come_from_the_environment() -> None:
    environment = Environment({"KEY": "a/b c", "EMPTY": "", "U": "u"}, "source api")
    assert environment.expand("Bearer ${KEY} $KEY") == "Bearer a/b c $KEY"
    assert environment.expand_url("https://a.example/?k=${KEY}") == "https://a.example/?k=a%2Fb%20c"
    assert environment.expand_url("${KEY}") == "a/b c"
    assert environment.expand("${U}") == "u"
    assert environment.secrets == {"a/b c"}
    for text, message in (("${NO}", "NO is not set"), ("${EMPTY}", "EMPTY is empty"), ("${a b}", r"got \$\{a b\}")):
        with pytest.raises(SourceError, match=f"source api: .*{message}"):
            environment.expand(text)


@pytest.mark.parametrize("name", ["Host", "bad name", "X-Key\n", "Range"])
def test_headers_that_cannot_be_sent(name: str) -> None:
    with pytest.raises(SourceError, match="header"):
        make_fetcher({}, [], headers={name: "secret"})
