"""Forgetting, from the first tombstone to the last copy, and what is left. A second run finishes a killed one."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionloop.bundle import DIGESTS
from visionloop.data.manifest import make_image_key
from visionloop.data.tombstones import Forgetting, finish_forgetting, load_tombstones, load_unfinished, write_tombstones
from visionloop.errors import VisionLoopError, shorten
from visionloop.forget.bundles import Held, find_bundles, list_champions
from visionloop.forget.copies import (
    Copy,
    Sought,
    count,
    find_checkpoints,
    find_features,
    find_logged,
    find_pages,
    find_prepared,
    find_reports,
    find_stored,
    find_windows,
    git,
)
from visionloop.forget.dataset import Trace, commit_without, find_other_holders, move_pin, redact, trace_images
from visionloop.forget.dvc_cache import find_dvc_copies
from visionloop.forget.hidden import find_hidden, list_unknown
from visionloop.forget.resolve import Wanted
from visionloop.ingest.journal import Journal, make_journal_path
from visionloop.params import Ingest
from visionloop.promotion.ledger import read_history
from visionloop.records import DatasetVersion, compute_digest
from visionloop.workspace import Workspace

GIT_SHOWN = 8


@dataclass(frozen=True)
class Left:
    """One thing that stays, and what a person can do about it."""

    what: str
    todo: str


def list_left(
    workspace: Workspace,
    trace: Trace,
    *,
    kept_bundles: Iterable[Held],
    unclear: Iterable[str],
    holders: Mapping[str, Collection[str]],
    sources: Collection[str],
) -> list[Left]:
    """Return what stays, the most important first."""
    left = [_describe_kept(held, workspace.name, list_champions(workspace.store)) for held in kept_bundles]
    left += [Left(what, "Then run `visionloop forget` again.") for what in unclear]
    for other, held in holders.items():
        what = f"dataset {other} of the same store holds {len(held):,} of the images"
        left.append(Left(what, f"Run `visionloop forget` in a workspace of {other} too; until then the bytes stay."))
    left += _list_models(workspace, trace.versions)
    if trace.versions:
        numbers = shorten_numbers(trace.versions)
        what = f"rows in {numbers}: digest, labels, side, size, group and time; no origin"
        left.append(Left(what, "They cannot be prepared any more."))
    left += _list_commits(workspace.settings.home, workspace.name, trace.versions)
    if sources:
        what = f"the images where they came from ({shorten(list(sources))}): they are not taken in again"
        left.append(Left(what, "Remove them there if nobody should have them."))
    if records := [n for n in ("logs", "prefect") if (workspace.settings.hidden_dir / n).is_dir()]:
        what = f"the names of their files, where a run has told them: {', '.join(f'.visionloop/{n}' for n in records)}"
        left.append(Left(what, "Remove these folders if the names matter."))
    what = "what is outside of visionloop: exports, clones of the workspace, backups, the caches of running servers"
    left.append(Left(what, "Run `visionloop forget` in each clone; it looks for copies once more."))
    return left


def shorten_numbers(numbers: Collection[int]) -> str:
    """Return `version 3` or `versions 1 to 7`; they hold an image from one version on to the last."""
    first, last = min(numbers), max(numbers)
    return f"version {first}" if first == last else f"versions {first} to {last}"


def _describe_kept(held: Held, name: str, champions: Collection[str]) -> Left:
    if held.name != name:
        return Left(f"bundle {held.digest[:12]} of {held.name} keeps one", f"Forget it in a workspace of {held.name}.")
    assert held.digest in champions
    what = f"bundle {held.digest[:12]} is the champion and keeps one (golden image or embedding)"
    return Left(what, "Retrain and promote; then `visionloop forget` removes it, also from dvc and models/candidate.")


def _list_models(workspace: Workspace, versions: Collection[int]) -> list[Left]:
    """Return the models that were trained on a version that held an image, and their MLflow runs."""
    trained: dict[str, Mapping[str, Any]] = {}
    runs: dict[str, str] = {}
    for digest, dataset, run_id in _list_trainings(workspace):
        trained.setdefault(digest, dataset)
        runs[digest] = run_id or runs.get(digest, "")
    learned = [d for d, on in trained.items() if on.get("name") == workspace.name and on.get("version") in versions]
    left = []
    if learned:
        what = f"models that learned from them: {shorten([d[:12] for d in learned])}"
        left.append(Left(what, "Retrain, promote."))
    unmade, unasked = _list_runs(workspace, versions)
    if ids := sorted({*unmade, *(runs[digest] for digest in learned if runs[digest])}):
        what = f"what MLflow keeps of {count(len(ids), 'run')} (pictures of batches and mistakes): {shorten(ids)}"
        left.append(Left(what + unasked, "Delete the runs there, then `mlflow gc`."))
    elif unasked:
        left.append(Left(f"what MLflow keeps{unasked}", "Run `visionloop forget` again when it answers."))
    return left


def _list_runs(workspace: Workspace, versions: Collection[int]) -> tuple[list[str], str]:
    """Return the MLflow runs on a version that held an image, also those that made no model; or why that is unknown."""
    numbers = {str(version) for version in versions}
    try:
        runs = list(workspace.tracking.iterate_runs())
    except VisionLoopError as exc:
        return [], f" ({exc.where} could not be asked for others)"
    return [run.run_id for run in runs if run.tags.get("visionloop.dataset_version") in numbers], ""


def _list_trainings(workspace: Workspace) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Yield bundle, dataset and MLflow run of all that store and workspace know of; each may come several times."""
    settings, store = workspace.settings, workspace.store
    for key in store.list("bundles/"):
        if key.endswith(f"/{DIGESTS}"):
            digest = key.split("/")[1]
            with contextlib.suppress(VisionLoopError, ValueError, KeyError, TypeError):
                yield digest, json.loads(store.get(f"bundles/{digest}/card.json"))["dataset"], None
    for key in store.list(f"decisions/{workspace.name}/"):
        with contextlib.suppress(VisionLoopError, ValueError, KeyError, TypeError):
            decision = json.loads(store.get(key))
            yield decision["candidate"], decision["dataset"], decision.get("run_id")
    for entry in read_history(store, workspace.name):
        yield entry.bundle, entry.dataset, entry.run_id
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        digest = compute_digest(json.loads((settings.candidate_dir / DIGESTS).read_bytes()))
        yield digest, json.loads((settings.candidate_dir / "card.json").read_bytes())["dataset"], None
    for path in sorted(settings.runs_dir.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            yield path.stem, {}, json.loads(path.read_bytes())["run_id"]


def _list_commits(home: Path, name: str, versions: Collection[int]) -> list[Left]:
    """Return the git commits whose pin is a version that held an image."""
    commits = git(home, "log", "--all", "--format=%H", "--", "data/dataset.json").split()
    old = []
    for commit in commits:
        with contextlib.suppress(ValueError, AttributeError):
            pin = json.loads(git(home, "show", f"{commit}:./data/dataset.json"))
            if pin.get("name") == name and pin.get("version") in versions:
                old.append(commit[:10])
    if not old:
        return []
    shown = ", ".join(old[:GIT_SHOWN]) + (f" and {len(old) - GIT_SHOWN} more" if len(old) > GIT_SHOWN else "")
    what = f"git commits that pin a version with them: {shown}"
    return [Left(what, "`visionloop prepare` refuses there; nothing else to do.")]


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
