"""Images from a bucket: folders, patterns, a table beside them; pinned as listed, read once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes import make_image
from fault_proxy import FaultProxy, serve_faults
from s3_server import make_bucket, point_to
from visionloop.errors import ImageError, SourceError, StoreError
from visionloop.ingest.sources import Item, SourceContext, read_source
from visionloop.params import BucketSource
from visionloop.records import Rejected
from visionloop.store import open_bucket

MAX_BYTES = 100_000


@pytest.fixture(params=["plain", "versioned"])
def bucket(request: pytest.FixtureRequest, endpoint_url: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, once without versions and once with."""
    point_to(monkeypatch, endpoint_url)
    name = f"photos-{request.param}"
    make_bucket(endpoint_url, name, versioned=request.param == "versioned")
    for entry in client.list_object_versions(Bucket=name).get("Versions", ()):
        client.delete_object(Bucket=name, Key=entry["Key"], VersionId=entry["VersionId"])
    return name


def fill(client: Any, bucket: str, keys: list[str]) -> None:
    for number, key in enumerate(keys):
        client.put_object(Bucket=bucket, Key=key, Body=make_image(number))


def read(bucket: str, **more: Any) -> tuple[list[Item], list[Rejected], list[str]]:
    lines: list[str] = []
    context = SourceContext(Path(), Path(), {}, tell=lines.append)
    source = BucketSource(kind="bucket", path=f"s3://{bucket}/2024", name="photos", **more)
    offered = list(read_source(source, context))
    return [o for o in offered if isinstance(o, Item)], [o for o in offered if isinstance(o, Rejected)], lines


def test_class_folders_with_split_folders(bucket: str, client: Any) -> None:
    keys = [f"2024/{s}/{c}/{n}.png" for s in ("train", "validation") for c in ("cat", "dog") for n in range(2)]
    others = ["2024/train/cat/", "2024/train/cat/notes.txt", "2024/.thumbs/cat/1.png", "2023/train/cat/9.png"]
    fill(client, bucket, [*keys, *others, "2024/train/dog/wëird %0a name.png"])
    items, rejected, _ = read(bucket)
    assert rejected == []
    assert [item.origin for item in items[:2]] == ["photos:train/cat/0.png", "photos:train/cat/1.png"]
    assert {(i.labels, i.side, i.test_is_given) for i in items} == {
        *((((name,), None, True)) for name in ("cat", "dog")),
        *((((name,), "test", False)) for name in ("cat", "dog")),
    }
    assert [item.read(MAX_BYTES) for item in items[:2]] == [make_image(0), make_image(1)]
    named = next(item for item in items if "wëird" in item.origin)
    assert named.read(MAX_BYTES) == make_image(12)


def test_flat_keys_by_pattern(bucket: str, client: Any) -> None:
    fill(client, bucket, ["2024/cat.1.png", "2024/dog.1.png", "2024/sub/dog.2.png", "2024/unnamed.png"])
    items, rejected, _ = read(bucket, pattern="{label}.*.png")
    assert [(i.origin, i.labels) for i in items] == [
        ("photos:cat.1.png", ("cat",)),
        ("photos:dog.1.png", ("dog",)),
        ("photos:sub/dog.2.png", ("dog",)),
    ]
    assert [(r.origin, r.code) for r in rejected] == [("photos:unnamed.png", "no_label")]


def test_a_table_beside_the_images(bucket: str, client: Any) -> None:
    fill(client, bucket, [f"2024/meta/img/{n}.png" for n in range(6)])
    rows = ["id,breed,split,shot", "0,pug,train,2026-01-02 03:04:05", "img/1.png,collie,train,", "2,pug,test,"]
    rows += [
        "9,pug,train,",
        ",pug,train,",
        "../../3,pug,train,",
        f"s3://{bucket}/2024/meta/img/3.png,pug,train,",
        "s3://other/x.png,pug,train,",
    ]
    client.put_object(Bucket=bucket, Key="2024/meta/labels.csv", Body="\n".join(rows).encode())
    columns = {"image": "id", "label": "breed", "time": "shot"}
    items, rejected, lines = read(bucket, table="meta/labels.csv", columns=columns)
    assert [(i.origin, i.labels, i.side, i.test_is_given) for i in items] == [
        ("photos:meta/img/0.png", ("pug",), None, True),
        ("photos:meta/img/1.png", ("collie",), None, True),
        ("photos:meta/img/2.png", ("pug",), "test", False),
        ("photos:meta/img/3.png", ("pug",), None, True),
    ]
    assert items[0].captured_at == "2026-01-02T03:04:05+00:00"
    assert [(r.origin, r.code) for r in rejected] == [
        ("photos:meta/labels.csv row 4", "row_without_image"),
        ("photos:meta/labels.csv row 5", "row_without_image"),
        ("photos:meta/labels.csv row 6", "unsafe_path"),
        ("photos:meta/labels.csv row 8", "unsafe_path"),
        ("photos:meta/img/4.png", "image_without_row"),
        ("photos:meta/img/5.png", "image_without_row"),
    ]
    assert lines == [
        f"source photos s3://{bucket}/2024 meta/labels.csv: "
        "columns guessed: side = split (name them under `columns` to be sure)"
    ]


def test_an_object_that_changed_is_another_one_later(bucket: str, client: Any) -> None:
    fill(client, bucket, ["2024/cat/1.png", "2024/dog/1.png"])
    before = read(bucket)[0]
    assert [i.stamp for i in read(bucket)[0]] == [i.stamp for i in before], "unchanged: not read again"
    client.put_object(Bucket=bucket, Key="2024/cat/1.png", Body=make_image(77))
    after = read(bucket)[0]
    assert [a.stamp == b.stamp for a, b in zip(after, before, strict=True)] == [False, True]
    assert after[0].read(MAX_BYTES) == make_image(77)
    if bucket.endswith("versioned"):
        assert before[0].read(MAX_BYTES) == make_image(0), "pinned: what was listed is what is read"
    else:
        with pytest.raises(ImageError, match="has changed since it was listed") as caught:
            before[0].read(MAX_BYTES)
        assert caught.value.reason_code == "unreadable"


def test_an_object_that_is_gone(bucket: str, client: Any) -> None:
    fill(client, bucket, ["2024/cat/1.png", "2024/dog/1.png", "2024/old/1.png"])
    client.delete_object(Bucket=bucket, Key="2024/old/1.png")
    items = read(bucket)[0]
    assert [i.labels for i in items] == [("cat",), ("dog",)], "a deleted object is in no listing"
    for version in client.list_object_versions(Bucket=bucket)["Versions"]:
        client.delete_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])
    with pytest.raises(ImageError, match="is gone since it was listed"):
        items[0].read(MAX_BYTES)


def test_a_large_object_is_not_read(bucket: str, client: Any) -> None:
    fill(client, bucket, ["2024/cat/1.png", "2024/dog/1.png"])
    client.put_object(Bucket=bucket, Key="2024/cat/2.png", Body=b"x" * (MAX_BYTES + 1))
    large = read(bucket)[0][1]
    with pytest.raises(ImageError, match="is too large; expected at most 100000 bytes") as caught:
        large.read(MAX_BYTES)
    assert caught.value.reason_code == "too_large"


@pytest.fixture
def proxy(endpoint_url: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    make_bucket(endpoint_url, "faulty")
    fill(client, "faulty", ["2024/cat/1.png", "2024/dog/1.png"])
    with serve_faults(endpoint_url) as proxy:
        point_to(monkeypatch, proxy.url, AWS_MAX_ATTEMPTS="1")
        monkeypatch.setattr("visionloop.store.s3.FIRST_PAUSE_S", 0.001)
        yield proxy


def test_faults_while_an_image_is_read(proxy: FaultProxy) -> None:
    item, other = read("faulty")[0]
    assert other.read(MAX_BYTES) == make_image(1), "here an ETag is an MD5"
    for fault in ("cut", "flip"):
        proxy.plan(fault, fault)
        assert item.read(MAX_BYTES) == make_image(0)
        assert len(proxy.seen) == 3
    proxy.plan(403)
    with pytest.raises(ImageError, match=r"s3://faulty/2024/cat/1.png: access denied to get_object cat/1.png"):
        item.read(MAX_BYTES)
    proxy.plan("reset")
    with pytest.raises(StoreError, match="broke off") as caught:
        item.read(MAX_BYTES)
    assert caught.value.transient, "a network that is down is no fault of an image"


def test_an_etag_that_is_no_md5_is_found_out_once(proxy: FaultProxy, client: Any) -> None:
    bucket = open_bucket("s3://faulty/2024")
    entry = next(bucket.scan())
    wrong = type(entry)(entry.key, entry.num_bytes, "0" * 32, None)
    proxy.ignored = {"if-match"}
    proxy.seen.clear()
    assert bucket.read(wrong, MAX_BYTES) == make_image(0)
    assert bucket.read(wrong, MAX_BYTES) == make_image(0)
    assert len(proxy.seen) == 3, "twice the same bytes, then never asked again"


@pytest.mark.parametrize("ending", ["cut", "short"])
def test_a_body_that_ends_early_is_noticed_by_its_length(proxy: FaultProxy, ending: str) -> None:
    bucket = open_bucket("s3://faulty/2024")
    entry = next(bucket.scan())
    in_parts = type(entry)(entry.key, entry.num_bytes, "0" * 32 + "-2", None)
    proxy.ignored = {"if-match"}
    proxy.script = [ending]
    proxy.seen.clear()
    assert bucket.read(in_parts, MAX_BYTES) == make_image(0)
    assert len(proxy.seen) == 2


def test_who_may_not_see_versions_reads_by_etag(proxy: FaultProxy) -> None:
    proxy.refusals = {"versioning": 403}
    assert [item.read(MAX_BYTES) for item in read("faulty")[0]] == [make_image(0), make_image(1)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, r"^source photos s3://nobody-has-it/2024: there is no bucket nobody-has-it"),
        ({"endpoint_url": "http://127.0.0.1:1"}, r"cannot connect to http://127.0.0.1:1"),
    ],
)
def test_buckets_that_cannot_be_listed(bucket: str, more: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read("nobody-has-it", **more)
    assert caught.value.transient is bool(more)


@pytest.mark.parametrize(
    ("table", "body", "message"),
    [
        ("no.csv", None, "there is no no.csv; expected one of labels.csv"),
        ("labels.csv", b"", "is empty"),
        ("labels.csv", b"\x00\xff\x00", "NUL byte"),
        ("labels.csv", b"image,label\nx,cat\ny,dog", "none of its first 2 images is there, such as 'x'"),
        ("cat/1.png", None, "cat/1.png: has the suffix of no table; expected .csv"),
    ],
)
def test_tables_that_cannot_be_used(bucket: str, client: Any, table: str, body: bytes | None, message: str) -> None:
    fill(client, bucket, ["2024/cat/1.png", "2024/dog/1.png"])
    client.put_object(Bucket=bucket, Key="2024/labels.csv", Body=body or b"")
    with pytest.raises(SourceError, match=message):
        read(bucket, table=table)


def test_an_empty_prefix(bucket: str) -> None:
    with pytest.raises(SourceError, match="no image in any class folder"):
        read(bucket)
