"""The store in a bucket, against a real S3 server, through a proxy that commits every fault a network has."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import write_photos
from fault_proxy import FaultProxy, serve_faults
from memory_tracking import MemoryTracking
from s3_server import make_bucket, make_client, point_to
from visionloop.data.known_store import check_store
from visionloop.errors import StoreError
from visionloop.ingest.pull import pull
from visionloop.params import FolderSource, make_params
from visionloop.store import S3Store
from visionloop.workspace import connect
from workspaces import NOW, make_settings

DATA = b"some bytes of an image" * 20
SHA = hashlib.sha256(DATA).hexdigest()
KEY = f"images/{SHA[:2]}/{SHA}"
FULL = f"team/{KEY}"


@pytest.fixture(scope="module")
def endpoint_url(endpoint_url: str) -> str:
    """The server, with two buckets."""
    make_bucket(endpoint_url, "pets")
    make_bucket(endpoint_url, "versioned", versioned=True)
    return endpoint_url


@pytest.fixture(scope="module")
def shared_proxy(endpoint_url: str) -> Iterator[FaultProxy]:
    with serve_faults(endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The proxy, with nobody waiting between tries."""
    point_to(monkeypatch, shared_proxy.url)
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("visionloop.store.s3.FIRST_PAUSE_S", 0.001)
    shared_proxy.plan()
    return shared_proxy


@pytest.fixture
def store(proxy: FaultProxy, client: Any) -> S3Store:
    return S3Store("s3://pets/team")


@pytest.fixture(scope="module")
def plain_client(endpoint_url: str) -> Any:
    return make_client(endpoint_url)


@pytest.fixture
def client(plain_client: Any) -> Any:
    """A plain client beside the proxy, on an empty bucket."""
    for entry in plain_client.list_objects_v2(Bucket="pets").get("Contents", ()):
        plain_client.delete_object(Bucket="pets", Key=entry["Key"])
    return plain_client


OPERATIONS = {
    "put": (lambda store: store.put(KEY, DATA), None),
    "create": (lambda store: store.create(KEY, DATA), True),
    "get": (lambda store: store.get("there/1"), b"old"),
    "exists": (lambda store: store.exists("there/1"), True),
    "list": (lambda store: list(store.list("there/")), ["there/1"]),
    "delete": (lambda store: store.delete("there/1"), None),
    "purge": (lambda store: store.purge("there/1"), None),
}
FAULTS = ("refuse", "reset", "cut_request", "lost", 500, 503)


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        *((operation, fault) for operation in ("put", "create", "get") for fault in FAULTS),
        *((operation, fault) for operation in ("exists", "list", "delete", "purge") for fault in ("reset", 503)),
    ],
)
def test_one_fault_is_ridden_out(proxy: FaultProxy, store: S3Store, client: Any, operation: str, fault: Any) -> None:
    act, expected = OPERATIONS[operation]
    store.put("there/1", b"old")
    proxy.plan(fault)
    assert act(store) == expected
    assert store.exists("there/1") is (operation not in ("delete", "purge"))
    if operation in ("put", "create"):
        assert client.get_object(Bucket="pets", Key=FULL)["Body"].read() == DATA


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", ["put", "get"])
def test_a_fault_that_stays_is_one_line(
    proxy: FaultProxy, store: S3Store, client: Any, operation: str, fault: Any
) -> None:
    act, _ = OPERATIONS[operation]
    store.put("there/1", b"old")
    proxy.plan(*[fault] * 20)
    with pytest.raises(StoreError, match=r"^store s3://pets/team: .*; expected .*\. \w.*") as caught:
        act(store)
    assert caught.value.transient, "a flow may try again"
    assert "test-secret" not in str(caught.value)
    whole = [b"old", *([DATA] if fault == "lost" else [])]
    entries = client.list_objects_v2(Bucket="pets").get("Contents", ())
    assert all(client.get_object(Bucket="pets", Key=e["Key"])["Body"].read() in whole for e in entries)


@pytest.mark.parametrize("fault", ["cut", "short", "flip"])
def test_bytes_that_were_damaged_are_read_again(proxy: FaultProxy, store: S3Store, fault: str) -> None:
    store.put(KEY, DATA)
    store.put("ledger/1.json", b'{"a": 1}')
    proxy.plan(fault, fault)
    assert store.get(KEY) == DATA
    proxy.plan(fault)
    assert store.get("ledger/1.json") == b'{"a": 1}'


def test_damaged_bytes_are_never_returned(proxy: FaultProxy, store: S3Store, client: Any) -> None:
    store.put("ledger/1.json", b'{"a": 1}')
    proxy.plan(*["flip"] * 9)
    with pytest.raises(StoreError, match=r"ledger/1.json does not have the bytes that its digest says, read 5 times"):
        store.get("ledger/1.json")
    proxy.plan(*["cut"] * 9)
    with pytest.raises(StoreError, match="broke off"):
        store.get("ledger/1.json")
    proxy.plan()
    client.put_object(Bucket="pets", Key=FULL, Body=b"copied here by another tool, and wrong")
    with pytest.raises(StoreError, match="does not have the bytes that its digest says"):
        store.get(KEY)


def test_bytes_damaged_on_the_way_to_the_store_are_sent_again(proxy: FaultProxy, store: S3Store) -> None:
    proxy.plan("flip_request", "flip_request")
    assert store.add(KEY, DATA)
    assert [method for method, _, _ in proxy.seen] == ["PUT"] * 3
    assert store.get(KEY) == DATA
    proxy.plan(*["flip_request"] * 9)
    with pytest.raises(StoreError, match="bytes were damaged on their way") as caught:
        store.put("a/1", DATA)
    assert caught.value.transient


def test_a_conflict_of_two_writers_is_tried_again(proxy: FaultProxy, store: S3Store) -> None:
    proxy.plan(409, 409)
    assert store.create("ledger/1.json", b"mine")
    proxy.plan(409)
    assert not store.create("ledger/1.json", b"yours")
    proxy.plan(*[409] * 9)
    with pytest.raises(StoreError, match=r"is busy: it answers ConditionalRequestConflict to put_object ledger/2.json"):
        store.create("ledger/2.json", b"mine")
    assert [method for method, _, _ in proxy.seen] == ["PUT"] * 5


def test_a_lost_reply_of_a_create_is_still_ours(proxy: FaultProxy, store: S3Store) -> None:
    proxy.plan("lost")
    assert store.create("ledger/1.json", b"mine"), "the second try finds our own object there"
    assert [method for method, _, _ in proxy.seen] == ["PUT", "PUT", "GET"]
    proxy.plan("lost")
    assert not store.create("ledger/1.json", b"yours")
    proxy.plan(412)
    assert not store.create("ledger/2.json", b"x"), "taken then, free now: whoever asks looks again"


def test_a_late_answer_is_asked_for_again(proxy: FaultProxy, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.plan("delay")
    store.put("a/1", b"x")
    assert len(proxy.seen) == 1, "late, but in time"
    monkeypatch.setattr("visionloop.store.s3.READ_TIMEOUT_S", 0.2)
    hasty = S3Store("s3://pets/team")
    proxy.plan("delay")
    assert hasty.get("a/1") == b"x"
    proxy.plan("delay", "delay")
    with pytest.raises(StoreError, match=r"the connection to http://127.0.0.1:\d+ broke off \(get_object a/1\)"):
        hasty.get("a/1")


def test_what_is_there_is_not_sent_again(proxy: FaultProxy, store: S3Store) -> None:
    large, small = b"x" * 300_000, [f"{i}".encode() * 100 for i in range(5)]
    assert store.add("images/l", large)
    for number, data in enumerate(small):
        assert store.add(f"images/{number}", data)
    proxy.plan()
    assert not store.add("images/l", large)
    assert [not store.add(f"images/{number}", data) for number, data in enumerate(small)] == [True] * 5
    assert [method for method, _, _ in proxy.seen] == ["HEAD"] * 6
    again = S3Store("s3://pets/team")
    proxy.plan()
    assert not any(again.add(f"images/{number}", data) for number, data in enumerate(small))
    assert [method for method, _, _ in proxy.seen] == ["PUT", *["HEAD"] * 4], "after the first it asks"
    assert again.add("images/new", b"new")


def test_half_an_object_under_a_digest_is_replaced(store: S3Store, client: Any) -> None:
    data = b"x" * 300_000
    client.put_object(Bucket="pets", Key="team/images/l", Body=data[:1000])
    assert store.add("images/l", data)
    assert store.get("images/l") == data


def test_small_objects_go_in_one_round_trip_large_ones_ask_for_leave(store: S3Store) -> None:
    asked: list[Any] = []
    connection = store.connection
    connection.watch("before-send.s3.PutObject", lambda request, **_: asked.append(request.headers.get("Expect")))
    store.put("a/small", b"x" * 9000)
    store.put("a/large", b"x" * 300_000)
    assert asked == [None, b"100-continue"]


def test_every_object_carries_its_digest(store: S3Store, client: Any) -> None:
    store.put("a/1", DATA)
    assert client.head_object(Bucket="pets", Key="team/a/1")["Metadata"] == {"sha256": SHA}


def test_purge_removes_all_versions_and_delete_markers(proxy: FaultProxy, client: Any) -> None:
    store = S3Store("s3://versioned")
    for number in range(3):
        store.put("images/1", str(number).encode())
    store.put("images/10", b"neighbour")
    store.delete("images/1")
    left = client.list_object_versions(Bucket="versioned")
    assert (len(left["Versions"]), len(left["DeleteMarkers"])) == (4, 1)
    store.purge("images/1")
    left = client.list_object_versions(Bucket="versioned")
    assert [v["Key"] for v in left["Versions"]] == ["images/10"]
    assert not left.get("DeleteMarkers")


def test_a_listing_of_many_pages(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"a/{number:02d}" for number in range(7)]
    for key in keys:
        store.put(key, b"x")
    call = store.connection.call

    def call_small(operation: str, *given: Any, **named: Any) -> Any:
        return call(operation, *given, **named, **({"MaxKeys": 3} if operation.startswith("list") else {}))

    monkeypatch.setattr(store.connection, "call", call_small)
    assert list(store.list("a/")) == keys
    for key in keys:
        store.purge(key)
    assert list(store.list("a/")) == []


def test_keys_that_are_not_ours_are_passed_over(store: S3Store, client: Any) -> None:
    for key in ("team/a/1", "team/a/.hidden", "team/a/with space", "other/a/2", "team/a/"):
        client.put_object(Bucket="pets", Key=key, Body=b"x")
    assert list(store.list("")) == ["a/1"]


@pytest.mark.parametrize(
    ("extra", "url", "message"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "s3://pets", "cannot connect to http://127.0.0.1:1; expected"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, "s3://pets", r"settings cannot be used \(Invalid endpoint: nonsense\)"),
        ({}, "s3://no-such-bucket/a", "there is no bucket no-such-bucket; .* Run `visionloop store init`, or"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "s3://pets", "no credentials found; expected AWS_"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "s3://pets", "half of the credentials is missing"),
        ({"AWS_PROFILE": "nobody"}, "s3://pets", "the AWS profile is not there"),
        ({"AWS_DEFAULT_REGION": "no region!"}, "s3://pets", "the AWS settings cannot be used"),
    ],
)
def test_settings_that_cannot_work(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, extra: dict[str, str], url: str, message: str
) -> None:
    for name, value in extra.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=message):
        S3Store(url).put("a/1", b"x")


def test_an_https_endpoint_that_speaks_http(
    proxy: FaultProxy, endpoint_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint_url.replace("http://", "https://name:topsecret@"))
    with pytest.raises(StoreError, match=r"no TLS connection to https://127.0.0.1") as caught:
        S3Store("s3://pets").get("a/1")
    assert "topsecret" not in str(caught.value)


def test_permission_is_not_a_matter_of_trying_again(proxy: FaultProxy, store: S3Store) -> None:
    proxy.plan(403)
    with pytest.raises(StoreError, match=r"access denied to put_object a/1; .* infra/s3.md") as caught:
        store.put("a/1", b"x")
    assert not caught.value.transient
    assert len(proxy.seen) == 1
    proxy.plan(501)
    with pytest.raises(StoreError, match="the store cannot put_object a/1; expected an S3 store with conditional wri"):
        store.create("a/1", b"x")


@pytest.mark.parametrize(
    "body", [b"<html><body>Precondition Failed</body></html>", b"<Error><Code/><Message/></Error>"]
)
def test_a_refusal_that_names_no_code_is_no_success(proxy: FaultProxy, store: S3Store, body: bytes) -> None:
    proxy.refusals = {"PUT ": (412, body)}
    assert store.create("ledger/1.json", b"mine") is False
    proxy.refusals = {"PUT ": (403, body)}
    with pytest.raises(StoreError, match=r"access denied to put_object a/1"):
        store.put("a/1", b"x")
    proxy.refusals = {"GET ": (404, body)}
    with pytest.raises(StoreError, match="there is no bucket"):
        store.get("a/1")


def test_an_emptied_bucket_is_not_taken_for_a_new_store(store: S3Store, client: Any, tmp_path: Path) -> None:
    """Another prefix, or the same one without its objects; while the bucket is away, that alone is said."""
    params = make_params({"name": "pets"})
    workspace = connect(make_settings(tmp_path), params, store=store, tracking=MemoryTracking())
    source = FolderSource(kind="folder", path=str(write_photos(tmp_path / "photos", 4)), name="photos")
    assert pull(workspace, sources=[source], now=NOW).pin.version == 1
    check_store(workspace)
    elsewhere = replace(workspace, store=S3Store("s3://pets/taem"))
    for entry in client.list_objects_v2(Bucket="pets")["Contents"]:
        client.delete_object(Bucket="pets", Key=entry["Key"])
    for emptied in (workspace, elsewhere):
        with pytest.raises(StoreError, match=r"^store s3://pets/t.{3}: does not hold dataset pets version 1 \("):
            pull(emptied, sources=[source], now=NOW)
    assert "Contents" not in client.list_objects_v2(Bucket="pets"), "nothing was written"
    with pytest.raises(StoreError, match=r"NoSuchBucket|no bucket|does not exist"):
        check_store(replace(workspace, store=S3Store("s3://no-such-bucket/team")))
