"""Listings over HTTP from a real server on loopback: every way to page, credentials, stamps, and what goes wrong."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes import make_image
from http_server import Answer, Handler, WebServer, serve
from source_runs import Run
from visionloop.data.manifest import list_versions
from visionloop.errors import ImageError, SourceError
from visionloop.ingest.pull import pull
from visionloop.ingest.sources import Cursor, SourceContext
from visionloop.params import HttpSource, make_params
from visionloop.settings import load_settings
from visionloop.store import LocalStore
from visionloop.workspace import connect

ENV = {"VISIONLOOP_PRIVATE_HOSTS": "127.0.0.1", "API_TOKEN": "t0ken/with=odd signs"}
MAX_BYTES = 1_000_000


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.web.download.FIRST_WAIT_S", 0.001)


@pytest.fixture
def site() -> Iterator[WebServer]:
    with serve() as site:
        for i in range(12):
            site.routes[f"/images/{i}.png"] = Answer(make_image(i), headers={"ETag": f'"v{i}"'})
        yield site


def make_rows(first: int, last: int) -> list[dict[str, Any]]:
    return [{"image": f"/images/{i}.png", "label": "cat" if i % 2 else "dog"} for i in range(first, last)]


def answer(value: object, **headers: str) -> Answer:
    return Answer(json.dumps(value).encode(), headers={"Content-Type": "application/json", **headers})


class Result(Run):
    """What a listing gave, and what was told on the way."""

    def __init__(
        self, site: WebServer, home: Path, path: str = "/list", pulled: str | None = None, **keys: Any
    ) -> None:
        super().__init__()
        url = keys.pop("url", f"{site.url}{path}")
        context = SourceContext(home, home, keys.pop("env", ENV), cursor=pulled, tell=self.told.append)
        source = HttpSource(kind="http", url=url, name="api", requests_per_s=1e5, **keys)
        self.take(source, context)

    @property
    def origins(self) -> list[str]:
        return [item.origin.rpartition("/")[2] for item in self.items]


def expect_all(result: Result, number: int) -> None:
    assert result.error is None
    assert result.origins == [f"{i}.png" for i in range(number)]
    assert [item.read(MAX_BYTES) for item in result.items] == [make_image(i) for i in range(number)]
    assert [item.labels for item in result.items] == [("cat",) if i % 2 else ("dog",) for i in range(number)]


def test_next_links_are_followed_with_the_header(site: WebServer, tmp_path: Path) -> None:
    site.routes |= {
        "/v1/list": answer({"data": {"items": make_rows(0, 5)}, "links": {"next": "list?after=5"}}),
        "/v1/list?after=5": answer({"data": {"items": make_rows(5, 10)}, "links": {"next": None}}),
    }
    headers = {"Authorization": "Bearer ${API_TOKEN}"}
    result = Result(site, tmp_path, "/v1/list", items="data.items", next="links.next", headers=headers)
    expect_all(result, 10)
    assert {request.headers["authorization"] for request in site.requests} == {f"Bearer {ENV['API_TOKEN']}"}
    assert result.items[0].origin == f"api:{site.host}/images/0.png"
    assert result.cursors == [Cursor("api", "pulled")]


def test_images_of_another_host_get_no_header(site: WebServer, tmp_path: Path) -> None:
    with serve({"/a.png": Answer(make_image(1))}) as other:
        rows = [{"url": f"{other.url}/a.png?id=7&X-Amz-Signature=abc", "label": "cat"}]
        site.routes["/list"] = answer(rows)
        headers = {"X-Key": "${API_TOKEN}"}
        allowed = Result(site, tmp_path, headers=headers, hosts=(other.host,))
        assert allowed.items[0].read(MAX_BYTES) == make_image(1)
        assert "x-key" not in other.requests[0].headers
        assert "x-key" in site.requests[0].headers
        assert "abc" not in allowed.items[0].origin
        refused = Result(site, tmp_path, headers=headers)
        assert [r.code for r in refused.rejected] == ["refused_url"]
        assert len(other.requests) == 1


@pytest.mark.parametrize("end", ["empty", "404", "repeats"])
def test_counted_pages_end(site: WebServer, tmp_path: Path, end: str) -> None:
    def page(number: int) -> Answer:
        rows = "".join(f"{row['image']},{row['label']}\n" for row in make_rows(4 * number - 4, 4 * number))
        return Answer(f"image,label\n{rows}".encode(), headers={"Content-Type": "text/csv; charset=utf-8"})

    last = {"empty": Answer(b"image,label\n"), "404": Answer(status=404), "repeats": page(3)}[end]
    site.routes |= {f"/list?per=4&p={number}": page(number) for number in (1, 2, 3)} | {"/list?per=4&p=4": last}
    result = Result(site, tmp_path, "/list?per=4", page="p")
    expect_all(result, 12)
    assert any("repeats page 3: taken as the end" in line for line in result.told) == (end == "repeats")


def test_a_cursor_is_sent_back(site: WebServer, tmp_path: Path) -> None:
    site.routes |= {
        "/list": answer({"rows": make_rows(0, 4), "meta": {"after": "a b&c"}}),
        "/list?after=a%20b%26c": answer({"rows": make_rows(4, 8), "meta": {"after": 17}}),
        "/list?after=17": answer({"rows": make_rows(8, 12), "meta": {"after": ""}}),
    }
    expect_all(Result(site, tmp_path, items="rows", cursor=("meta.after", "after")), 12)


def test_a_link_header_leads_on_and_gzip_is_read(site: WebServer, tmp_path: Path) -> None:
    link = '<https://elsewhere.example/>; rel="prev", </list/2>; title="a, b"; rel="last next"'
    lines = b"\n".join(json.dumps(row).encode() for row in make_rows(5, 10))
    site.routes |= {
        "/list": answer(make_rows(0, 5), Link=link),
        "/list/2": Answer(
            gzip.compress(lines), headers={"Content-Encoding": "gzip", "Content-Type": "application/x-ndjson"}
        ),
    }
    expect_all(Result(site, tmp_path), 10)


@pytest.mark.parametrize(
    ("pages", "keys", "message"),
    [
        ([{"rows": make_rows(0, 2), "next": "/list"}], {"next": "next"}, "page 1: leads back to a page before"),
        ([{"rows": make_rows(0, 2), "next": "/list?n=2"}] * 2, {"next": "next"}, "page 2: has the same rows as page 1"),
        ([{"rows": make_rows(0, 2)}] * 3, {"page": "n"}, "page 2: has the same rows as page 1"),
        ([{"rows": make_rows(0, 2), "next": "/list?n=2"}], {"next": "next", "max_pages": 1}, "more than 1 pages"),
        ([{"rows": make_rows(0, 2), "next": "http://169.254.169.254/"}], {"next": "next"}, "not in the list of hosts"),
        ([{"rows": make_rows(0, 2), "next": "file:///etc/passwd"}], {"next": "next"}, "leads to no URL"),
        ([{"rows": make_rows(0, 2), "next": {"x": 1}}], {"next": "next"}, "no short text under 'next'"),
        ([{"rows": {}, "more": []}], {"items": "rows"}, "has no list under 'rows'; there is more, rows"),
        ([{"a": [], "b": []}], {}, "an object with 2 lists (a, b)"),
        ([{"rows": []}], {}, "has no row"),
        (["text"], {}, "holds a str"),
        ([make_rows(0, 2)], {"columns": {"label": "kind"}}, "no column 'kind'; expected one of image, label"),
    ],
)
def test_listings_that_cannot_be_read(
    site: WebServer, tmp_path: Path, pages: list[Any], keys: dict[str, Any], message: str
) -> None:
    site.routes |= {"/list": answer(pages[0])} | {f"/list?n={n}": answer(page) for n, page in enumerate(pages, start=1)}
    result = Result(site, tmp_path, **keys)
    assert message in str(result.error)
    assert not any("169.254" in target for target in site.targets)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\n<!doctype html><html>sign in</html>", "is a page for people (HTML) or XML"),
        (b"[{", "is not JSON"),
        (b"[" * 100_000, "is not JSON (nested too deep)"),
        (b'{"n": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"", "has no row"),
    ],
)
def test_answers_that_are_no_listing(site: WebServer, tmp_path: Path, body: bytes, message: str) -> None:
    site.routes["/list"] = Answer(body)
    assert message in str(Result(site, tmp_path).error)


def test_bad_rows_do_not_stop_the_others(site: WebServer, tmp_path: Path) -> None:
    rows: list[Any] = make_rows(0, 5)
    rows += ["no object", {"image": "", "label": "cat"}, {"image": "http://evil.example/a.png", "label": "cat"}]
    rows += [{"image": "/images/none.png", "label": "cat"}, {"image": "/images/1.png\r\nX: y", "label": "cat"}]
    site.routes["/list"] = answer(rows)
    result = Result(site, tmp_path)
    codes = {r.origin: r.code for r in result.rejected}
    assert codes == {
        "api:page 1 row 6": "bad_row",
        "api:page 1 row 7": "row_without_image",
        "api:page 1 row 8": "refused_url",
        "api:page 1 row 10": "refused_url",
    }
    assert len(result.items) == 6
    with pytest.raises(ImageError, match=r"/images/none.png: answered 404") as caught:
        result.items[5].read(MAX_BYTES)
    assert caught.value.reason_code == "unreadable"
    with pytest.raises(ImageError, match="is too large"):
        result.items[0].read(100)


def test_a_missing_variable_is_named(site: WebServer, tmp_path: Path) -> None:
    result = Result(site, tmp_path, headers={"X-Key": "${API_TOKEN}"}, env={})
    assert "source api: the variable API_TOKEN is not set" in str(result.error)
    broken = Result(site, tmp_path, headers={"X-Key": "${API_TOKEN}"}, env={**ENV, "API_TOKEN": "line\nbreak"})
    assert "header 'X-Key': cannot be sent" in str(broken.error)
    assert "break" not in str(broken.error)
    assert site.requests == []


def test_secrets_are_never_shown(site: WebServer, tmp_path: Path) -> None:
    secret = "abc123secret"
    env = {**ENV, "KEY": secret}
    site.routes[f"/{secret}/list"] = answer({"rows": make_rows(0, 2), "x": 1})
    result = Result(site, tmp_path, url=f"{site.url}/${{KEY}}/list?key=${{KEY}}", env=env, columns={"image": "no"})
    shown = [str(result.error), *result.told, str(result.error.__cause__ if result.error else "")]
    assert site.targets == [f"/{secret}/list?key={secret}"]
    assert result.error is not None
    assert not any(secret in line for line in shown)
    site.routes[f"/{secret}/list"] = answer([{"url": f"{secret}/a.png", "label": "x"}])
    result = Result(site, tmp_path, url=f"{site.url}/${{KEY}}/list", env=env)
    assert result.items[0].origin == f"api:{site.host}/***/***/a.png"
    with pytest.raises(ImageError) as caught:
        result.items[0].read(MAX_BYTES)
    assert secret not in str(caught.value)


def test_a_page_that_fails_for_a_while_is_asked_again(site: WebServer, tmp_path: Path) -> None:
    answers = [Answer(status=503, headers={"Retry-After": "0"}), Answer(status=500), answer(make_rows(0, 5))]
    site.routes["/list"] = lambda handler: answers.pop(0)
    expect_all(Result(site, tmp_path), 5)
    assert site.targets.count("/list") == 3


def test_a_page_that_fails_for_good_leaves_no_version(site: WebServer, tmp_path: Path) -> None:
    site.routes |= {
        "/list": answer({"rows": make_rows(0, 6), "next": "/list/2"}),
        "/list/2": Answer(status=503, headers={"Retry-After": "3600"}),
    }
    home = tmp_path / "ws"
    home.mkdir()
    source = {"kind": "http", "url": f"{site.url}/list", "name": "api", "next": "next", "requests_per_s": 1e5}
    value: dict[str, Any] = {"name": "pets", "ingest": {"sources": [source]}}
    (home / "params.yaml").write_text("name: pets\n")
    settings, store, params = load_settings({}, home), LocalStore(tmp_path / "store"), make_params(value)

    def run() -> Any:
        return pull(
            connect(settings, params, store=store),
            sources=params.ingest.sources,
            now="2026-01-01T00:00:00+00:00",
            env=ENV,
        )

    with pytest.raises(SourceError, match=r"source api page 2: .*answered 503, and asks to wait 3,600 s"):
        run()
    assert list_versions(store, "pets") == []
    site.routes["/list/2"] = answer({"rows": make_rows(6, 12), "next": None})
    report = run()
    assert (report.version.version, report.num_added) == (1, 12)
    assert dict(report.version.cursors) == {"api": "pulled"}


def test_a_cut_download_goes_on_where_it_ended(site: WebServer, tmp_path: Path) -> None:
    image = make_image(1, size_hw=(64, 64))

    def give(handler: Handler) -> Answer:
        begin = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        if not begin:
            return Answer(image, headers={"ETag": '"v1"'}, cut=1000)
        assert handler.headers["If-Range"] == '"v1"'
        part = {"Content-Range": f"bytes {begin}-{len(image) - 1}/{len(image)}", "ETag": '"v1"'}
        return Answer(image[begin:], 206, part, cut=500 if begin == 1000 else None)

    site.routes |= {"/list": answer([{"image": "/a.png", "label": "cat"}]), "/a.png": give}
    assert Result(site, tmp_path).items[0].read(MAX_BYTES) == image
    assert [r.headers.get("range") for r in site.requests[1:]] == [None, "bytes=1000-", "bytes=1500-"]


def test_a_download_without_validator_begins_again(site: WebServer, tmp_path: Path) -> None:
    answers = [Answer(b"old" * 100, cut=100), Answer(b"new" * 100)]
    site.routes |= {"/list": answer([{"image": "/a.png", "label": "cat"}]), "/a.png": lambda handler: answers.pop(0)}
    assert Result(site, tmp_path).items[0].read(MAX_BYTES) == b"new" * 100
    assert [r.headers.get("range") for r in site.requests[1:]] == [None, None]


def test_stamps_come_from_the_listing_or_from_etags(site: WebServer, tmp_path: Path) -> None:
    rows = make_rows(0, 5)
    site.routes["/list"] = answer(rows)
    assert [item.stamp for item in Result(site, tmp_path).items] == [None] * 5
    later = Result(site, tmp_path, pulled="pulled")
    assert [item.stamp for item in later.items] == [f'etag "v{i}"' for i in range(5)]
    assert [r.method for r in site.requests].count("HEAD") == 5
    site.routes["/list"] = answer([{**row, "updated_at": f"2026-01-0{i + 1}"} for i, row in enumerate(rows)])
    listed = Result(site, tmp_path, pulled="pulled")
    assert listed.items[1].stamp == "updated_at 2026-01-02"
    assert [r.method for r in site.requests].count("HEAD") == 5


def test_a_dead_host_is_given_up(site: WebServer, tmp_path: Path) -> None:
    site.routes["/list"] = answer([{"image": f"/dead/{i}.png", "label": "cat"} for i in range(12)])
    items = Result(site, tmp_path).items
    site.routes |= {f"/dead/{i}.png": Answer(status=502) for i in range(12)}
    found = []
    for item in items:
        with pytest.raises(ImageError) as caught:
            item.read(MAX_BYTES)
        found.append(caught.value.found)
    assert found == ["answered 502"] * 10 + ["127.0.0.1 failed too often in a row"] * 2
    assert len(site.requests) == 1 + 10 * 4
