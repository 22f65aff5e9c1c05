"""One suite over every object store."""

import pickle
import secrets
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from s3_server import make_bucket, point_to, serve_s3
from visionloop.errors import LeaseHeld, LeaseLost, ObjectMissing, StoreError
from visionloop.promotion import entries
from visionloop.promotion.ledger import append_entry, read_champion, read_ledger
from visionloop.store import LocalStore, ObjectStore, S3Store, open_store
from visionloop.store.lease import Lease, make_claim, take_lease


@pytest.fixture(scope="module")
def endpoint_url() -> Iterator[str]:
    with serve_s3() as url:
        yield url


@pytest.fixture(scope="module")
def seaweed_bucket(seaweed_url: str) -> str:
    """A bucket with versions: each bucket is files of its own there, so there is one for all tests."""
    return make_bucket(seaweed_url, "contract", versioned=True)


@pytest.fixture(params=["local", "s3", "s3-versioned", "s3-whole-bucket", "seaweed"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "local":
        yield LocalStore(tmp_path / "store")
        return
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "seaweed":
            bucket = request.getfixturevalue("seaweed_bucket")
            point_to(patch, request.getfixturevalue("seaweed_url"))
            yield open_store(f"s3://{bucket}/{secrets.token_hex(8)}")
            return
        endpoint = request.getfixturevalue("endpoint_url")
        point_to(patch, endpoint)
        bucket = make_bucket(endpoint, f"b-{secrets.token_hex(8)}", versioned=request.param == "s3-versioned")
        yield open_store(f"s3://{bucket}" + ("" if request.param == "s3-whole-bucket" else "/team/pets"))


def test_put_then_get(store: ObjectStore) -> None:
    store.put("a/b.json", b"one")
    store.put("a/b.json", b"two")
    assert store.get("a/b.json") == b"two"
    assert store.exists("a/b.json")


def test_get_of_nothing(store: ObjectStore) -> None:
    with pytest.raises(ObjectMissing, match="no object a/b"):
        store.get("a/b")
    assert not store.exists("a/b")
    assert list(store.list("a/")) == []


def test_create_takes_a_free_key_once(store: ObjectStore) -> None:
    assert store.create("ledger/pets/000001.json", b"mine")
    assert not store.create("ledger/pets/000001.json", b"yours")
    assert store.create("ledger/pets/000001.json", b"mine"), "a retry of what we wrote ourselves is a success"
    assert store.get("ledger/pets/000001.json") == b"mine"


def test_one_of_many_creators_wins(store: ObjectStore) -> None:
    wins: list[int] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        if store.create("ledger/pets/000001.json", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.get("ledger/pets/000001.json") == str(wins[0]).encode()


def test_the_lease_of_a_dead_holder_is_taken_over_once(store: ObjectStore) -> None:
    """By one of many who have waited; the dead one is told so when it comes back."""
    gone = take_lease(store, "pets", replace(make_claim("ann", "then", ttl_s=0.3), machine="another"))
    taken: list[Lease] = []
    refused: list[str] = []

    def work(name: str) -> None:
        try:
            taken.append(take_lease(store, "pets", replace(make_claim(name, "now"), machine=name)))
        except LeaseHeld as exc:
            refused.append(str(exc))

    threads = [threading.Thread(target=work, args=(f"ben{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lease,) = taken
    lease.renew()
    lease.end()
    assert (lease.claim.number, len(refused)) == (2, 3)
    assert all(f"{lease.claim.who} on" in text for text in refused), refused
    with pytest.raises(LeaseLost, match=f"taken over by {lease.claim.who}"):
        gone.renew()
    lease.forget(lease.died[0])
    assert list(store.list("leases/")) == ["leases/pets/000002.json"]


def test_list_is_sorted_and_by_prefix(store: ObjectStore) -> None:
    for key in ("a/2", "a/10", "b/1", "a/c/3", "ab"):
        store.put(key, b"x")
    assert list(store.list("a/")) == ["a/10", "a/2", "a/c/3"]
    assert list(store.list("a")) == ["a/10", "a/2", "a/c/3", "ab"]


def test_list_of_what_is_behind_a_key(store: ObjectStore) -> None:
    keys = [f"log/pets/date=2026-{day}/{part}" for day in ("10-31", "11-01", "11-02") for part in ("1", "2")]
    for key in (*keys, "log/dogs/1", "other/1"):
        store.put(key, b"x")
    assert list(store.list("log/pets/", "log/pets/date=2026-10-31/~")) == keys[2:]
    assert list(store.list("log/pets/", keys[2])) == keys[3:]
    assert list(store.list("log/pets/date=2026-1", keys[0])) == keys[1:]
    assert list(store.list("log/pets/", "log/pets/date=2026-11-05/~")) == []
    assert list(store.list("log/pets/date=2026-11-0", "log/pets/date=2026-10-04/~")) == keys[2:]


def test_an_opened_object_is_read_in_parts(store: ObjectStore) -> None:
    """One that is larger than what the first request brings, a small one, and one without a byte."""
    large = b"".join(number.to_bytes(4, "big") for number in range(100_000))
    for name, data in {"a/large": large, "a/small": b"small", "a/empty": b""}.items():
        store.put(name, data)
        with store.open(name) as file:
            assert (file.seek(0, 2), file.tell(), file.read(3)) == (len(data), len(data), b"")
            file.seek(max(0, len(data) - 5))
            assert file.read(9) == data[-5:]
            file.seek(1)
            assert (file.read(7), file.tell()) == (data[1:8], min(len(data), 8) if data else 1)
            file.seek(0)
            assert file.read() == data
    with pytest.raises(ObjectMissing, match="no object a/b"):
        store.open("a/b")


def test_delete(store: ObjectStore) -> None:
    store.put("a/1", b"x")
    store.delete("a/1")
    store.delete("a/1")
    assert not store.exists("a/1")


def test_add_sends_what_is_not_there(store: ObjectStore) -> None:
    small, large = b"x" * 10, b"y" * 400_000
    keys = ("images/a/1", "images/a/2")
    assert [store.add(key, data) for key, data in zip(keys, (small, large), strict=True)] == [True, True]
    assert [store.add(key, data) for key, data in zip(keys, (small, large), strict=True)] == [False, False]
    assert store.add("images/a/3", small), "a new one after some that were there"
    assert [store.get(key) for key in keys] == [small, large]


def test_purge_leaves_neither_the_object_nor_its_neighbours_without_one(store: ObjectStore) -> None:
    for data in (b"one", b"two"):
        store.put("images/a/1", data)
    store.put("images/a/10", b"neighbour")
    store.delete("images/a/1")
    store.purge("images/a/1")
    store.purge("images/a/1")
    assert list(store.list("images/")) == ["images/a/10"]
    assert store.get("images/a/10") == b"neighbour"
    assert store.create("images/a/1", b"new")


def test_what_is_empty_or_binary_comes_back_as_it_was(store: ObjectStore) -> None:
    for key, data in {"a/empty": b"", "a/binary": bytes(range(256)) * 4000}.items():
        store.put(key, data)
        assert store.get(key) == data


def test_list_begins_with_any_text_of_a_key(store: ObjectStore) -> None:
    for key in ("a/b/1", "a/b2", "c"):
        store.put(key, b"x")
    assert list(store.list("")) == ["a/b/1", "a/b2", "c"]
    assert list(store.list("a/b")) == ["a/b/1", "a/b2"]
    assert list(store.list("nothing/")) == []


def test_a_store_travels_to_another_process(store: ObjectStore) -> None:
    store.put("a/1", b"x")
    assert pickle.loads(pickle.dumps(store)).get("a/1") == b"x"


def test_sync_and_writers(store: ObjectStore) -> None:
    store.put("a/1", b"x")
    store.sync()
    assert store.num_writers == (8 if store.url.startswith("file") else 64)


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "a/.hidden", "a b", "a\\b", "a\n"])
def test_a_key_that_is_none(store: ObjectStore, key: str) -> None:
    with pytest.raises(StoreError, match="expected parts of letters"):
        store.put(key, b"x")


def test_local_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot reach 1.*Run `visionloop doctor`"):
        LocalStore(tmp_path / "file").put("a/1", b"x")


def test_the_champion_of_a_long_ledger_takes_few_requests(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """33 entries in pages of 10: two lists and two reads, one list for who knows the entry before."""
    if not isinstance(store, S3Store):
        pytest.skip("a folder has no requests")
    monkeypatch.setattr(entries, "PAGE", 10)
    entry = None
    for number in range(33):
        facts = {"decision": 1, "dataset": {}, "run_id": None, "why": "test", "at": "2026", "by": "ann"}
        more = {"action": "promote", "bundle": str(number), "model_version": "1"}
        entry = append_entry(store, "pets", entry, **facts, **more)
    asked: list[str] = []
    store.connection.watch("before-call.s3", lambda model, **told: asked.append(model.name))
    assert read_champion(store, "pets") == entry
    assert sorted(asked) == ["GetObject", "GetObject", "ListObjectsV2", "ListObjectsV2"]
    asked.clear()
    assert read_champion(store, "pets", since=32) == entry
    assert sorted(asked) == ["GetObject", "GetObject", "ListObjectsV2"]
    asked.clear()
    assert len(read_ledger(store, "pets").entries) == 33
    assert sorted(asked) == ["GetObject"] * 6 + ["ListObjectsV2"] * 2


def test_of_a_large_object_only_what_is_asked_for_is_sent(store: ObjectStore) -> None:
    """The end comes with the first request; a request brings each other part."""
    if not isinstance(store, S3Store):
        pytest.skip("a folder has no requests")
    data = secrets.token_bytes(2_000_000)
    store.put("a/large", data)
    sizes: list[int] = []
    store.connection.watch("after-call.s3", lambda parsed, **told: sizes.append(int(parsed["ContentLength"])))
    with store.open("a/large") as file:
        file.seek(-1000, 2)
        assert file.read(1000) == data[-1000:]
        file.seek(5000)
        assert file.read(100) == data[5000:5100]
    assert sizes == [256 * 1024, 100]


def test_an_object_that_cannot_be_opened_is_asked_for_once(store: ObjectStore) -> None:
    """Not as a whole after its end: where a store is away that would wait as long again."""
    if not isinstance(store, S3Store):
        pytest.skip("a folder has no requests")
    elsewhere = S3Store("s3://no-such-bucket/x")
    asked: list[str] = []
    elsewhere.connection.watch("before-call.s3", lambda model, **told: asked.append(model.name))
    with pytest.raises(StoreError, match="there is no bucket no-such-bucket"):
        elsewhere.open("a/b")
    assert asked == ["GetObject"]
