"""Workspaces made in this process: images in a store, a dataset version, its pin, and prepared data where it is wanted.

The one builder behind `worlds.py` (judging), `trainings.py` and the workspace of two versions here (forgetting).
`shapes.py` makes workspaces with commands, as a person does.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fakes import make_image
from memory_tracking import MemoryTracking
from visionloop.data.leaks import Leak, make_leaks, write_leaks
from visionloop.data.manifest import list_versions, make_image_key, make_pin, write_pin, write_quarantine
from visionloop.data.parts import commit_version, load_version_records, make_version
from visionloop.data.prepare import prepare
from visionloop.data.rows import hold_records
from visionloop.forget import Forgotten, forget, resolve_images
from visionloop.params import Params, make_params
from visionloop.records import DatasetVersion, ImageRecord, Rejected
from visionloop.settings import Settings
from visionloop.store import LocalStore, ObjectStore
from visionloop.workspace import Workspace, connect

NAME = "pets"
NOW = "2026-01-01T00:00:00+00:00"
SECRET = "anna"


def make_settings(home: Path) -> Settings:
    """The settings of a workspace with a store of its own. Its MLflow cannot be reached."""
    return Settings(home, (home / "store").as_uri(), "http://127.0.0.1:1", (home / "artifacts").as_uri())


def build(
    settings: Settings, params: Params, store: ObjectStore, rows: Sequence[ImageRecord], *, prepared: bool
) -> Workspace:
    """Commit rows as version 1 of the dataset, pin it, and prepare it if asked to."""
    write_pin(settings.pin_path, make_pin(commit(store, [], rows, name=params.name)))
    workspace = connect(settings, params, store=store)
    if prepared:
        prepare(workspace)
    return workspace


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
        hold_records(rows.values()),
        hold_records(changed),
        num_added=len(rows) - len(before),
        split={"method": "hash", "seed": 0, "fractions": [0.7, 0.15, 0.15], "first": None},
        rejected=write_quarantine(store, name, rejected),
        num_rejected=len(rejected),
        created_at=NOW,
        leaks=write_leaks(store, name, make_leaks(leaks)),
        num_leaks=len(leaks),
    )
    assert commit_version(store, version, hold_records(changed))
    return version


@dataclass(frozen=True)
class Pets(Workspace):
    """A workspace on version 2 of a dataset; `anna` is an image that came with version 1, on the val side."""

    versions: tuple[DatasetVersion, DatasetVersion]
    rows: tuple[ImageRecord, ...]

    @property
    def anna(self) -> ImageRecord:
        return next(r for r in self.rows if SECRET in r.origins[0])

    def forget(self, *digests: str, origins: tuple[str, ...] = (), why: str = "asked") -> Forgotten:
        wanted = resolve_images(self.store, NAME, digests, origins)
        return forget(self, wanted, now=NOW, by="me", why=why)


def open_pets(home: Path) -> Pets:
    settings = make_settings(home)
    store = LocalStore(home / "store")
    one, two = list_versions(store, NAME)
    place = connect(settings, make_params({"name": NAME}), store=store, tracking=MemoryTracking())
    return Pets(**vars(place), versions=(one, two), rows=tuple(load_version_records(store, two)))


def make_pets(home: Path) -> Pets:
    settings = make_settings(home)
    store = LocalStore(home / "store")
    first = [store_image(store, seed) for seed in range(10)]
    first[2] = replace(first[2], origins=("photos:anna/1.png", "photos:anna/again.png"))
    # A near duplicate of anna's, whose side was decided by anna's key.
    second = [store_image(store, seed) for seed in range(10, 16)]
    second[0] = replace(second[0], key=first[2].sha256, side="val")
    refused = [Rejected("photos:anna/1.png", "label_conflict", "x"), Rejected("photos:b.png", "empty", "y")]
    near = Leak("across", first[2].sha256, first[2].origins, "val", first[3].sha256, ("photos:3",), "test", 1, 0.1, "r")
    other = replace(near, sha256=first[4].sha256, origins=("photos:4",))
    back = replace(
        near, sha256=first[5].sha256, origins=("photos:5",), other=first[2].sha256, other_origins=near.origins
    )
    one = commit(store, [], first, rejected=refused, leaks=[near, other, back])
    two = commit(store, first, second, one, leaks=[near, other, back])
    write_pin(settings.pin_path, make_pin(two))
    return replace(open_pets(home), rows=(*first, *second))


def read_all(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
