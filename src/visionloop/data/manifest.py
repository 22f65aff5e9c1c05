"""Dataset versions as the store and the workspace name them: commit objects, lists of unusable files, the pin.

datasets/NAME/000001.json         the commit: created only if the number is free
quarantine/NAME/<digest>.json     files that could not be used
data/dataset.json                 the pin (in the workspace, in git)

The rows of a version are in `parts.py`. Nothing here needs pyarrow: commands that read no rows start without it.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from visionloop.errors import DatasetError, ObjectMissing
from visionloop.params.text import has_conflict_marks
from visionloop.records import DatasetVersion, Pin, Rejected, canonical_json, compute_digest
from visionloop.store import ObjectStore
from visionloop.store.keys import make_number_key

# Listed in a quarantine for an image that is in the dataset all the same.
IS_TAKEN = "side_conflict"
# Listed, but not broken: images that no row names or whose split is an unknown word, forgotten ones, left-out classes.
NOT_UNUSABLE = frozenset({"image_without_row", "unknown_side", "forgotten", "class_left_out", IS_TAKEN})


def make_image_key(sha256: str) -> str:
    """Return the store key of an image's bytes."""
    return f"images/{sha256[:2]}/{sha256}"


def make_version_key(name: str, number: int) -> str:
    """Return the store key of a commit object."""
    return make_number_key(f"datasets/{name}", number)


def list_versions(store: ObjectStore, name: str) -> list[DatasetVersion]:
    """Return all versions of a dataset, oldest first."""
    return [_read_version(store, key) for key in store.list(f"datasets/{name}/")]


def latest_version(store: ObjectStore, name: str) -> DatasetVersion | None:
    """Return the newest version of a dataset, or None."""
    keys = list(store.list(f"datasets/{name}/"))
    return _read_version(store, keys[-1]) if keys else None


def load_version(store: ObjectStore, name: str, number: int) -> DatasetVersion:
    """Return one version. Raises DatasetError when the store has no such version."""
    try:
        return _read_version(store, make_version_key(name, number))
    except ObjectMissing as exc:
        newest = latest_version(store, name)
        raise DatasetError(
            f"dataset {name} version {number}",
            f"is not in the store {store.url}" + (f", whose newest one is {newest.version}" if newest else ""),
            "the store it was ingested into, or another version",
            "Correct VISIONLOOP_STORE, or mount the store; `visionloop datasets` lists what is there.",
        ) from exc


def is_experiment(version: DatasetVersion) -> bool:
    """Say whether a version is split at random, as tutorials do. Its models are for comparison, never promoted."""
    return version.split.get("method") == "random"


def make_lost_error(sha256: str, origin: str) -> DatasetError:
    """Return the error of an image that the store has lost, with a way out for each kind of pull."""
    source = origin.partition(":")[0] if ":" in origin else "NAME"
    return DatasetError(
        f"image {sha256[:12]} ({origin})",
        "is missing from the store or damaged there",
        "its bytes as they were ingested",
        f"Run `visionloop ingest --verify`, or after a one-time pull `visionloop ingest PATH --name {source} --verify`"
        f" (with the options of then): it mends what its source still has. Without its source: "
        f"`visionloop forget {sha256[:12]} --why lost`.",
    )


def count_unusable(rejected: Iterable[Rejected]) -> int:
    """Return how many lines of a quarantine list are of what cannot be used."""
    return sum(one.code not in NOT_UNUSABLE for one in rejected)


def write_quarantine(store: ObjectStore, name: str, rejected: Sequence[Rejected]) -> str | None:
    """Keep the list of unusable files in the store; return its digest, None for an empty list."""
    if not rejected:
        return None
    rows = [r.to_json() for r in sorted(rejected, key=lambda r: (r.origin, r.code))]
    digest = compute_digest(rows)
    store.put(f"quarantine/{name}/{digest}.json", canonical_json(rows))
    return digest


def load_quarantine(store: ObjectStore, version: DatasetVersion) -> list[Rejected]:
    """Return the files that could not be used in the pull that made a version."""
    if version.rejected is None:
        return []
    return [Rejected.from_json(r) for r in json.loads(store.get(f"quarantine/{version.name}/{version.rejected}.json"))]


def make_pin(version: DatasetVersion) -> Pin:
    """Return the pin of a version."""
    return Pin(version.name, version.version, version.digest, version.num_images, version.classes)


def write_pin(path: Path, pin: Pin) -> None:
    """Write the pin atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(pin.to_json(), indent=2) + "\n")
    os.replace(staged, path)


def load_pin(path: Path, name: str | None = None) -> Pin:
    """Read the pin of a workspace, whose `name` it should bear.

    Raises:
        DatasetError: nothing was ingested yet, the file is damaged, or it pins a dataset of another name.
    """
    text = ""
    try:
        text = path.read_text()
        pin = Pin.from_json(json.loads(text))
    except FileNotFoundError as exc:
        raise DatasetError(
            f"{path.parent.name}/{path.name}",
            "not found: this workspace has no images yet",
            "a pinned dataset version",
            "Run `visionloop ingest FOLDER`.",
        ) from exc
    except (ValueError, TypeError, AttributeError) as exc:
        raise DatasetError(
            f"{path.parent.name}/{path.name}",
            "has the conflict marks of a merge in it" if has_conflict_marks(text) else "is damaged",
            "JSON of a pin",
            "`git checkout HEAD data/dataset.json` brings the last one back; `visionloop ingest` pins the newest.",
        ) from exc
    if name is not None:
        check_name(pin, name)
    return pin


def check_name(pin: Pin, name: str) -> None:
    """Raise DatasetError unless a pin bears the name of its workspace: `name` was changed after the ingest."""
    if pin.name != name:
        raise DatasetError(
            "data/dataset.json",
            f"pins version {pin.version} of {pin.name}",
            f"a version of {name}, as `name` in params.yaml says",
            f"Put the name back, or run `visionloop ingest` (or `visionloop ingest PATH`) to make {name}.",
        )


def load_pinned(store: ObjectStore, pin: Pin) -> DatasetVersion:
    """Return the pinned version. Raises DatasetError: the store has not this one."""
    version = load_version(store, pin.name, pin.version)
    if version.digest != pin.digest:
        raise DatasetError(
            f"dataset {pin.name} version {pin.version}",
            f"has digest {version.digest[:12]} in {store.url}",
            f"{pin.digest[:12]}, as data/dataset.json says",
            "This is another store: correct VISIONLOOP_STORE, or mount the one that holds it.",
        )
    return version


def _read_version(store: ObjectStore, key: str) -> DatasetVersion:
    try:
        return DatasetVersion.from_json(json.loads(store.get(key)))
    except (ValueError, TypeError) as exc:
        raise DatasetError(f"store object {key}", "is damaged", "a dataset version") from exc
