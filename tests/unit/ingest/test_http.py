"""The way from one page of a listing to the next, and what kind of answer a page is."""

import pytest

from visionloop.ingest.sources.http import find_link, find_number, guess_kind, set_query
from visionloop.web.download import Fetched


@pytest.mark.parametrize(
    ("header", "target"),
    [
        ('<https://a.example/?p=2>; rel="next"', "https://a.example/?p=2"),
        ('</1>; rel=prev, </3>; title="x, y; rel=next"; rel="NEXT last"', "/3"),
        ("</2>; rel=next", "/2"),
        ('</2>; rel="nextish"', ""),
        ("</2>; title=next", ""),
        ("<" * 5000, ""),
        ("", ""),
    ],
)
def test_link_headers(header: str, target: str) -> None:
    assert find_link(header) == target


def test_queries_keep_their_other_parameters() -> None:
    assert set_query("http://a.example/x?q=a%20b&p=1&r", "p", "2") == "http://a.example/x?q=a%20b&r&p=2"
    assert set_query("http://a.example/x", "after", "a&b=c") == "http://a.example/x?after=a%26b%3Dc"
    assert find_number("http://a.example/x?page%5Bn%5D=0", "page[n]") == 0
    assert find_number("http://a.example/x?p=x", "p") == 1


@pytest.mark.parametrize(
    ("content_type", "url", "data", "kind"),
    [
        ("application/json; charset=utf-8", "http://a.example/x.csv", b"", "json"),
        ("application/vnd.api+json", "http://a.example/x", b"", "json"),
        ("application/x-ndjson", "http://a.example/x", b"", "jsonl"),
        ("text/csv", "http://a.example/x.json", b"", "csv"),
        ("application/octet-stream", "http://a.example/x.jsonl?a=.csv", b"", "jsonl"),
        ("text/plain", "http://a.example/x", b' \n{"a": 1}', "json"),
        ("", "http://a.example/x.parquet", b"a,b", "csv"),
    ],
)
def test_kinds_of_answers(content_type: str, url: str, data: bytes, kind: str) -> None:
    assert guess_kind(Fetched(data, url, {"content-type": content_type})) == kind
