"""Images that were forgotten on purpose: a tombstone each, written before anything is removed.

tombstones/NAME/<sha256>.json    when, by whom and why; no name of a file

A forgotten image is not taken in again, and no version that still names it is prepared.
"""

from visionloop.store import ObjectStore


def make_tombstone_key(name: str, sha256: str) -> str:
    """Return the store key of the tombstone of an image in a dataset."""
    return f"tombstones/{name}/{sha256}.json"


def load_tombstones(store: ObjectStore, name: str) -> frozenset[str]:
    """Return the sha256 of every forgotten image of a dataset."""
    return frozenset(key.rpartition("/")[2].removesuffix(".json") for key in store.list(f"tombstones/{name}/"))
