"""A workspace with two versions of a dataset, one image of which somebody wants to be forgotten."""

from dataclasses import dataclass, replace
from pathlib import Path

from memory_tracking import MemoryTracking
from versions import NAME, NOW, commit, store_image
from visionloop.data.leaks import Leak
from visionloop.data.manifest import list_versions, load_version_records, make_pin, write_pin
from visionloop.forget import Forgotten, forget, resolve_images
from visionloop.params import make_params
from visionloop.records import DatasetVersion, ImageRecord, Rejected
from visionloop.settings import Settings
from visionloop.store import LocalStore
from visionloop.workspace import Workspace, connect

SECRET = "anna"


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
    settings = Settings(home, (home / "store").as_uri(), "http://127.0.0.1:1", (home / "artifacts").as_uri())
    store = LocalStore(home / "store")
    one, two = list_versions(store, NAME)
    place = connect(settings, make_params({"name": NAME}), store=store, tracking=MemoryTracking())
    return Pets(**vars(place), versions=(one, two), rows=tuple(load_version_records(store, two)))


def make_pets(home: Path) -> Pets:
    settings = Settings(home, (home / "store").as_uri(), "http://127.0.0.1:1", (home / "artifacts").as_uri())
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
