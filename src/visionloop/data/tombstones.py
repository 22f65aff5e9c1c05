"""Images that were forgotten on purpose: each has a tombstone, written before anything is removed.

tombstones/NAME/<sha256>.json    when, by whom and why; no name of a file
forgetting/NAME/<digest>.json    a forget that is not finished yet: its images, by whom and why

A forgotten image is not ingested again, and a version that still has it cannot be prepared.
"""

import json
from dataclasses import dataclass

from visionloop.errors import DatasetError
from visionloop.parallel import map_parallel
from visionloop.records import Record, canonical_json, compute_digest
from visionloop.store import ObjectStore


@dataclass(frozen=True)
class Forgetting(Record):
    """A forget that was begun. It stays in the store until all of it is done, so that any machine can finish it."""

    sha256s: tuple[str, ...]
    at: str
    by: str
    why: str


def make_tombstone_key(name: str, sha256: str) -> str:
    """Return the store key of the tombstone of an image in a dataset."""
    return f"tombstones/{name}/{sha256}.json"


def load_tombstones(store: ObjectStore, name: str) -> frozenset[str]:
    """Return the sha256 of every forgotten image of a dataset."""
    return frozenset(key.rpartition("/")[2].removesuffix(".json") for key in store.list(f"tombstones/{name}/"))


def write_tombstones(store: ObjectStore, name: str, forgetting: Forgetting) -> None:
    """Begin to forget: from now on the images are not ingested again. An existing tombstone is kept."""
    store.put(_make_key(name, forgetting), canonical_json(forgetting.to_json()))

    def write_tombstone(sha256: str) -> None:
        value = {"sha256": sha256, "at": forgetting.at, "by": forgetting.by, "why": forgetting.why}
        store.create(make_tombstone_key(name, sha256), canonical_json(value))

    for _ in map_parallel(write_tombstone, forgetting.sha256s):
        pass
    store.sync()


def load_unfinished(store: ObjectStore, name: str) -> list[Forgetting]:
    """Return the forgets that were begun and not finished. Raises DatasetError."""
    found = []
    for key in store.list(f"forgetting/{name}/"):
        try:
            found.append(Forgetting.from_json(json.loads(store.get(key))))
        except (ValueError, TypeError) as exc:
            raise DatasetError(f"store object {key}", "is damaged", "a list of images", "Delete it.") from exc
    return found


def finish_forgetting(store: ObjectStore, name: str, forgetting: Forgetting) -> None:
    """Remove the record of a forget whose steps are all done."""
    store.purge(_make_key(name, forgetting))


def _make_key(name: str, forgetting: Forgetting) -> str:
    return f"forgetting/{name}/{compute_digest(forgetting.to_json())}.json"
