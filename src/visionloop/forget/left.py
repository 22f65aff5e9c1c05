"""What is left after images were forgotten, and what to do about it: models, history, sources."""

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionloop.bundle import DIGESTS
from visionloop.errors import VisionLoopError, shorten
from visionloop.forget.bundles import Held, list_champions
from visionloop.forget.copies import count, git
from visionloop.forget.dataset import Trace
from visionloop.promotion.ledger import read_history
from visionloop.records import compute_digest
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
