"""Dataset versions put into a store by hand, for tests of what is done with them."""

import hashlib
from collections.abc import Sequence
from typing import Any

from fakes import make_image
from visionloop.data.leaks import Leak, make_leaks, write_leaks
from visionloop.data.manifest import commit_version, make_image_key, make_version, write_quarantine
from visionloop.records import DatasetVersion, ImageRecord, Rejected
from visionloop.store import ObjectStore

NAME = "pets"
NOW = "2026-01-01T00:00:00+00:00"


def store_image(store: ObjectStore, seed: int, **facts: Any) -> ImageRecord:
    """Put an image into the store and return its row; `facts` replace what is made up."""
    kind = facts.pop("format", "PNG")
    data = facts.pop("data", None) or make_image(seed, kind=kind)
    sha256 = hashlib.sha256(data).hexdigest()
    store.add(make_image_key(sha256), data)
    row: dict[str, Any] = {
        "sha256": sha256,
        "labels": ("cat" if seed % 2 else "dog",),
        "sources": ("photos",),
        "origins": (f"photos:{'cat' if seed % 2 else 'dog'}/{seed}.{kind.lower()}",),
        "ordinal": seed,
        "group": None,
        "key": sha256,
        "side": ("train", "train", "val", "test")[seed % 4],
        "captured_at": None,
        "width": 32,
        "height": 32,
        "format": kind,
        "num_bytes": len(data),
        "phash": "",
    }
    return ImageRecord(**{**row, **facts})


def commit(
    store: ObjectStore,
    before: Sequence[ImageRecord],
    changed: Sequence[ImageRecord],
    parent: DatasetVersion | None = None,
    *,
    rejected: Sequence[Rejected] = (),
    leaks: Sequence[Leak] = (),
    name: str = NAME,
) -> DatasetVersion:
    """Commit the version that has `changed` on top of `before`."""
    rows = {row.sha256: row for row in (*before, *changed)}
    version = make_version(
        name,
        parent,
        [rows[sha256] for sha256 in sorted(rows)],
        changed,
        num_added=len(rows) - len(before),
        split={"method": "hash", "seed": 0, "fractions": [0.7, 0.15, 0.15], "first": None},
        rejected=write_quarantine(store, name, rejected),
        num_rejected=len(rejected),
        created_at=NOW,
        leaks=write_leaks(store, name, make_leaks(leaks)),
        num_leaks=len(leaks),
    )
    assert commit_version(store, version, changed)
    return version
