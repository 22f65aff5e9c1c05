"""Model bundles that keep a forgotten image: as a golden image, or as a row of reference.npz (its embedding).

A bundle is all or nothing: without its golden images it is refused everywhere. So one that holds an image goes as a
whole, unless it is a champion: taking that away would stop the service. It is listed as left.
"""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from visionloop.bundle import DIGESTS
from visionloop.errors import DatasetError, ObjectMissing
from visionloop.forget.copies import Copy, Sought, read_json, remove_tree
from visionloop.forget.hidden import list_bundle_folders
from visionloop.promotion.ledger import read_champion
from visionloop.records import compute_digest
from visionloop.store import ObjectStore
from visionloop.workspace import Workspace

GOLDEN = "golden/"
REFERENCE = "reference.npz"
MISSING = (ObjectMissing, FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True)
class Held:
    """A bundle that holds a forgotten image, and the name on its card."""

    digest: str
    name: str


def list_champions(store: ObjectStore) -> frozenset[str]:
    """Return the champion of every name in this store."""
    names = {key.split("/")[1] for key in store.list("ledger/")}
    entries = (read_champion(store, name) for name in sorted(names))
    return frozenset(entry.bundle for entry in entries if entry)


def find_bundles(workspace: Workspace, sought: Sought) -> tuple[list[Copy], list[Held]]:
    """Return the bundles in store and workspace that go, and those that stay: champions, and those of other names."""
    settings, store = workspace.settings, workspace.store
    copies: list[Copy] = []
    kept: dict[str, Held] = {}

    def sort(held: Held | None, what: str, remove: Callable[[], None]) -> None:
        if held and (held.digest in sought.champions or held.name != sought.name):
            kept.setdefault(held.digest, held)
        elif held:
            copies.append(Copy(f"bundle {held.digest[:12]} in {what}", remove))

    for digest in sorted({key.split("/")[1] for key in store.list("bundles/") if key.endswith(f"/{DIGESTS}")}):
        held = examine_bundle(_read_stored(store, digest), sought, f"bundles/{digest}")
        sort(held, "the store (no champion; no rollback to it)", partial(_purge_bundle, store, digest))
    for folder in (settings.candidate_dir, *list_bundle_folders(settings)):
        if folder.name.startswith("."):
            copies.append(Copy(f"half a bundle in {folder.parent.name}", partial(remove_tree, folder)))
            continue
        held = examine_bundle(_read_folder(folder), sought, str(folder))
        sort(held, folder.relative_to(settings.home).as_posix(), partial(remove_tree, folder))
    return copies, [kept[digest] for digest in sorted(kept)]


def examine_bundle(read: Callable[[str], bytes], sought: Sought, where: str) -> Held | None:
    """Say whether a bundle holds one of the images; None also where there is no bundle. Raises DatasetError.

    Only a model of a version that held the images can have their embeddings. One whose card or embeddings are missing
    is what a killed forget has left: a bundle gets its table of digests when all else is there.
    """
    try:
        files: Any = read_json(read(DIGESTS), f"bundle in {where}")
    except MISSING:
        return None
    try:
        card: Any = read_json(read("card.json"), f"card in {where}")
    except MISSING:
        card = {"name": sought.name, "dataset": None}
    try:
        golden = {digest for file, digest in files.items() if file.startswith(GOLDEN)}
        name, dataset = str(card["name"]), card["dataset"]
        may_embed = dataset is None or dataset.get("version") in sought.versions
        digest = compute_digest(files)
    except (AttributeError, TypeError, KeyError) as exc:
        raise DatasetError(f"bundle in {where}", "is damaged", "a table of digests and a card", "Remove it.") from exc
    holds = bool(golden & sought.sha256s) or (may_embed and _may_embed(read, sought.sha256s))
    return Held(digest, name) if holds else None


def _read_stored(store: ObjectStore, digest: str) -> Callable[[str], bytes]:
    return lambda file: store.get(f"bundles/{digest}/{file}")


def _read_folder(folder: Path) -> Callable[[str], bytes]:
    return lambda file: (folder / file).read_bytes()


def _may_embed(read: Callable[[str], bytes], sha256s: frozenset[str]) -> bool:
    """Say whether reference.npz has the embedding of an image, or is gone already."""
    try:
        with np.load(io.BytesIO(read(REFERENCE)), allow_pickle=False) as arrays:
            return any(value.decode() in sha256s for value in arrays["sha256_n"].tolist())
    except MISSING:
        return True
    except (KeyError, ValueError, OSError, zipfile.BadZipFile):
        return False  # not written by us: it says of no image that it is in there


def _purge_bundle(store: ObjectStore, digest: str) -> None:
    """Remove a bundle, last of all that by which it is found again after a kill."""
    last = [f"bundles/{digest}/{name}" for name in (REFERENCE, "card.json", DIGESTS)]
    for key in [*(key for key in store.list(f"bundles/{digest}/") if key not in last), *last]:
        store.purge(key)
