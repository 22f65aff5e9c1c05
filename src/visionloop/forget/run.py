"""Forgetting, from the first tombstone to the last copy. If it is killed at any point, a second run finishes it."""

from collections.abc import Callable
from dataclasses import dataclass

from visionloop.data.manifest import make_image_key
from visionloop.data.tombstones import Forgetting, finish_forgetting, load_tombstones, load_unfinished, write_tombstones
from visionloop.forget.bundles import Held, find_bundles, list_champions
from visionloop.forget.copies import (
    Copy,
    Sought,
    find_checkpoints,
    find_features,
    find_logged,
    find_pages,
    find_prepared,
    find_reports,
    find_stored,
    find_windows,
)
from visionloop.forget.dataset import Trace, commit_without, find_other_holders, move_pin, redact, trace_images
from visionloop.forget.dvc_cache import find_dvc_copies
from visionloop.forget.hidden import find_hidden, list_unknown
from visionloop.forget.left import Left, list_left
from visionloop.forget.resolve import Wanted
from visionloop.ingest.journal import Journal, make_journal_path
from visionloop.params import Ingest
from visionloop.records import DatasetVersion
from visionloop.workspace import Workspace


@dataclass(frozen=True)
class Everything:
    """All that holds some images: where the versions name them, the copies that go, and what stays."""

    trace: Trace
    copies: list[Copy]
    kept_bundles: list[Held]
    unclear: list[str]
    holders: dict[str, frozenset[str]]


@dataclass(frozen=True)
class Forgotten:
    """What was done: the newest version, whether the pin moved, what was removed, what is left."""

    version: DatasetVersion | None
    pin_moved: bool
    num_rewritten: int
    removed: tuple[str, ...]
    left: tuple[Left, ...]


def find_everything(
    workspace: Workspace, sha256s: frozenset[str], *, gone: frozenset[str] = frozenset(), is_rest: bool = False
) -> Everything:
    """Look for every copy of some images; change nothing. `gone` are those that an earlier forget has finished.

    `is_rest`: an earlier forget was stopped, and may have taken images out of versions already.
    """
    settings, store, name = workspace.settings, workspace.store, workspace.name
    trace = trace_images(store, name, sha256s)
    holders = find_other_holders(store, name, sha256s)
    shared = frozenset(sha256 for held in holders.values() for sha256 in held)
    # Of those that are gone the store keeps no earlier version; a pull at that very moment may have put one back.
    back = {sha256 for sha256 in gone if store.exists(make_image_key(sha256))}
    was_prepared = bool(trace.parts or holders or gone or is_rest)
    sought = Sought(name, sha256s, trace.versions, list_champions(store))
    bundles, kept = find_bundles(workspace, sought)
    dvc_copies, unclear = find_dvc_copies(settings, sought)
    copies = [
        *find_stored(store, (sha256s - gone | back) - shared),
        *find_logged(store, name, sha256s),
        *find_prepared(settings, sha256s),
        *find_hidden(settings, name, sha256s, trace.versions, was_prepared=was_prepared),
        *find_features(workspace, sha256s, shared=shared),
        *find_reports(settings, sha256s),
        *find_pages(settings, sha256s),
        *dvc_copies,
        *bundles,
        *find_checkpoints(store, name),
        *find_windows(store, name, sha256s),
    ]
    return Everything(trace, copies, kept, [*unclear, *list_unknown(settings)], holders)


def forget(
    workspace: Workspace,
    wanted: Wanted,
    *,
    now: str,
    by: str,
    why: str,
    tell: Callable[[str], None] = lambda line: None,
) -> Forgotten:
    """Forget images for good; what an earlier run began is finished too.

    Raises:
        BusyError: a stage is running in this workspace.
        StoreError, DatasetError: the store cannot be written, or a version in it is damaged.
    """
    store, name = workspace.store, workspace.name
    if new := wanted.sha256s - load_tombstones(store, name):
        write_tombstones(store, name, Forgetting(tuple(sorted(new)), now, by, why))
    begun = load_unfinished(store, name)
    for forgetting in begun:
        write_tombstones(store, name, forgetting)
    unfinished = frozenset(sha256 for forgetting in begun for sha256 in forgetting.sha256s)
    sha256s = wanted.sha256s | unfinished
    version = commit_without(store, name, sha256s, now=now)
    gone, is_rest = frozenset(wanted.again) - unfinished, bool(unfinished - new)
    everything = find_everything(workspace, sha256s, gone=gone, is_rest=is_rest)
    pin_moved = version is not None and move_pin(workspace.settings, version, everything.trace.versions)
    for copy in everything.copies:
        tell(copy.what)
        copy.remove()
    _forget_journal(workspace, sha256s)
    num_rewritten = redact(store, name, sha256s, everything.trace)
    for forgetting in begun:
        finish_forgetting(store, name, forgetting)
    left = list_left(
        workspace,
        everything.trace,
        kept_bundles=everything.kept_bundles,
        unclear=everything.unclear,
        holders=everything.holders,
        sources={source for record in wanted.records for source in record.sources},
    )
    removed = tuple(copy.what for copy in everything.copies)
    return Forgotten(version, pin_moved, num_rewritten, removed, tuple(left))


def _forget_journal(workspace: Workspace, sha256s: frozenset[str]) -> None:
    """Drop what ingest remembers of the images: their names, and that their bytes are stored."""
    path = make_journal_path(workspace.settings)
    if path.is_file():
        journal = Journal(path, workspace.store.url, Ingest())
        journal.forget(sha256s)
        journal.close()
