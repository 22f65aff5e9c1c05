"""The champion's bundle in the store: what of it is damaged, and putting it back from the copies on this machine.

A copy may be another bundle, or a damaged one itself: each file is taken from wherever its bytes have the right digest.
MLflow is no copy: its registered model is the network alone.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from visionloop.bundle import DIGESTS, TRAINING_ONLY, hash_file
from visionloop.data.known_store import check_store
from visionloop.errors import BundleError, ObjectMissing, shorten
from visionloop.promotion.ledger import read_champion
from visionloop.promotion.promote import compare_alias, mirror_alias, verify_in_store
from visionloop.records import canonical_json, compute_digest
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.workspace import Workspace

OTHER_WAYS = (
    "Run `visionloop doctor --fix` where the model was trained or served, restore the store from its backup, or "
    "`visionloop rollback`."
)
FIX = "`visionloop doctor --fix` puts it back from a copy, if there is one."


def find_damage(store: ObjectStore, digest: str) -> list[str]:
    """Return the files of a stored bundle that are missing or differ from their digest, sorted; reads all of them.

    `weights.safetensors` may be missing: no server needs it. Raises StoreError.
    """
    table = _parse_table(_get(store, f"bundles/{digest}/{DIGESTS}"), digest)
    if table is None:
        return [DIGESTS]
    wrong = []
    for name in sorted(table):
        data = _get(store, f"bundles/{digest}/{name}")
        if (name not in TRAINING_ONLY) if data is None else (hashlib.sha256(data).hexdigest() != table[name]):
            wrong.append(name)
    return wrong


def require_whole(store: ObjectStore, digest: str) -> None:
    """Raise BundleError unless every file of a bundle in the store is as it was made."""
    if damaged := find_damage(store, digest):
        found = f"{shorten(damaged)} is missing or differs from its digest in {store.url}"
        raise BundleError(f"champion {digest[:12]}", found, "the files as they were made", FIX)


def mend(workspace: Workspace) -> list[str]:
    """Put the champion's damaged files back, and point MLflow's alias at the champion; return what was done.

    Moves no champion: the ledger is read, never written.

    Raises:
        BundleError: no copy has a file, or the whole answers differently here.
        PromotionError: the ledger is damaged, or something else keeps changing the alias.
        StoreError: the store is not the one that the workspace knows.
        TrackingError: MLflow cannot be reached; the bundle is mended by then.
    """
    check_store(workspace)
    champion = read_champion(workspace.store, workspace.name)
    if champion is None:
        return []
    done = []
    if damaged := find_damage(workspace.store, champion.bundle):
        restored = _restore(workspace, champion.bundle, damaged)
        done.append(f"restored {shorten(restored)} of bundle {champion.bundle[:12]} in {workspace.store.url}")
    version, alias = compare_alias(workspace)
    if alias != version or workspace.tracking.find_version(champion.bundle) is None:
        mirrored = mirror_alias(workspace)
        done.append(f"MLflow's alias `champion` is model version {mirrored} (was {alias or 'none'})")
    return done


def find_lost(workspace: Workspace, digest: str, damaged: Sequence[str]) -> list[str]:
    """Return those damaged files of a bundle that no copy on this machine has, as `mend` would find them."""
    folders = _list_folders(workspace.settings)
    try:
        table = _find_table(workspace.store, digest, folders)
    except BundleError:
        return [DIGESTS]
    names = [name for name in damaged if name not in (DIGESTS, *TRAINING_ONLY)]
    return [name for name in names if _find_file(folders, name, table[name]) is None]


def _restore(workspace: Workspace, digest: str, damaged: Sequence[str]) -> list[str]:
    """Write the damaged files again, the table first: it names the others. Then check the whole, as a server would."""
    store, folders = workspace.store, _list_folders(workspace.settings)
    restored = []
    if damaged == [DIGESTS]:
        store.put(f"bundles/{digest}/{DIGESTS}", canonical_json(_find_table(store, digest, folders)))
        restored.append(DIGESTS)
        damaged = find_damage(store, digest)
    table = _find_table(store, digest, folders)
    found = {name: _find_file(folders, name, table[name]) for name in damaged}
    if lost := sorted(name for name, path in found.items() if path is None and name not in TRAINING_ONLY):
        raise _make_loss(store, digest, f"no copy on this machine has {shorten(lost)}")
    for name, path in found.items():
        if path is None:
            store.delete(f"bundles/{digest}/{name}")
        else:
            store.put(f"bundles/{digest}/{name}", path.read_bytes())
            restored.append(name)
    verify_in_store(workspace, digest)
    return restored


def _list_folders(settings: Settings) -> list[Path]:
    """Return every folder of this workspace that may hold a bundle: the candidate's, and what was fetched before."""
    caches = (settings.hidden_dir / "bundles", settings.hidden_dir / "serving")
    fetched = [path for cache in caches if cache.is_dir() for path in sorted(cache.iterdir()) if path.is_dir()]
    return [settings.candidate_dir, *fetched]


def _find_table(store: ObjectStore, digest: str, folders: Sequence[Path]) -> dict[str, str]:
    tables = [_get(store, f"bundles/{digest}/{DIGESTS}")]
    tables += [(folder / DIGESTS).read_bytes() for folder in folders if (folder / DIGESTS).is_file()]
    for data in tables:
        if table := _parse_table(data, digest):
            return table
    raise _make_loss(store, digest, f"no copy on this machine has {DIGESTS}")


def _find_file(folders: Sequence[Path], name: str, sha256: str) -> Path | None:
    paths = (folder / name for folder in folders)
    return next((path for path in paths if path.is_file() and hash_file(path) == sha256), None)


def _parse_table(data: bytes | None, digest: str) -> dict[str, str] | None:
    try:
        table = json.loads(data or b"")
        return table if isinstance(table, dict) and compute_digest(table) == digest else None
    except ValueError:
        return None


def _get(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.get(key)
    except ObjectMissing:
        return None


def _make_loss(store: ObjectStore, digest: str, found: str) -> BundleError:
    return BundleError(
        f"champion {digest[:12]}",
        f"is damaged in {store.url}, and {found}",
        "models/candidate or a server's cache to hold it",
        OTHER_WAYS,
    )
