"""One suite over every object store."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from visionloop.errors import ObjectMissing, StoreError
from visionloop.store import LocalStore, ObjectStore


@pytest.fixture(params=["local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    yield LocalStore(tmp_path / "store")


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


def test_list_is_sorted_and_by_prefix(store: ObjectStore) -> None:
    for key in ("a/2", "a/10", "b/1", "a/c/3", "ab"):
        store.put(key, b"x")
    assert list(store.list("a/")) == ["a/10", "a/2", "a/c/3"]
    assert list(store.list("a")) == ["a/10", "a/2", "a/c/3", "ab"]


def test_delete(store: ObjectStore) -> None:
    store.put("a/1", b"x")
    store.delete("a/1")
    store.delete("a/1")
    assert not store.exists("a/1")


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "a/.hidden", "a b", "a\\b", "a\n"])
def test_a_key_that_is_none(store: ObjectStore, key: str) -> None:
    with pytest.raises(StoreError, match="expected parts of letters"):
        store.put(key, b"x")


def test_local_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot reach 1.*Run `visionloop doctor`"):
        LocalStore(tmp_path / "file").put("a/1", b"x")
