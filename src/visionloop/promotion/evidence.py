"""Collects what the page about a decision shows, and writes it: decisions/000007.html, and latest.html for the newest.

The page is for people. What cannot be had for it (a picture that is gone, curves while MLflow is away) is left out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visionloop.bundle import load_run_note
from visionloop.data.compare import Diff, compare_records
from visionloop.data.images import decode_image
from visionloop.data.leaks import load_leaks
from visionloop.data.manifest import load_version, make_image_key
from visionloop.data.parts import iterate_version
from visionloop.errors import VisionLoopError
from visionloop.evaluation.answers import Answers
from visionloop.evaluation.slices import make_slices
from visionloop.promotion.drawings import encode_picture
from visionloop.promotion.judge import Aligned
from visionloop.promotion.report import Judged, RetrainFacts, approve_page, choose_pictures, make_retrain_report
from visionloop.records import Card, Decision, ImageRecord, LedgerEntry
from visionloop.store import ObjectStore
from visionloop.workfolder import write_file
from visionloop.workspace import Workspace, get_user

CURVES = ("train/loss", "val/loss")
LEAK_WORDS = {
    "across": "test images with a near duplicate on another side",
    "excluded": "images left out because they would link two sides",
    "conflict": "images that a later source puts on another side",
}


@dataclass(frozen=True)
class Asked:
    """The test images, the answers to them, and who gave these: digest and card of each, in the order of `aligned`."""

    tests: Sequence[ImageRecord]
    aligned: Aligned
    models: Sequence[tuple[str, Card]]


def write_report(workspace: Workspace, decision: Decision, asked: Asked, champion: LedgerEntry | None) -> Path:
    """Write the page about a decision, and return its path. `champion` is its ledger entry, if there is one."""
    facts = collect_facts(workspace, decision, asked, champion)
    return _keep_page(workspace, decision, make_page(workspace.store, facts))


def write_approval(workspace: Workspace, decision: Decision, waited: Decision) -> Path | None:
    """Write the page about a decision that a person let pass, from that of the one that waited if it is here."""
    path = workspace.settings.decisions_dir / f"{waited.number:06d}.html"
    if not path.is_file():
        return None
    return _keep_page(workspace, decision, approve_page(path.read_text(encoding="utf-8"), decision))


def _keep_page(workspace: Workspace, decision: Decision, page: str) -> Path:
    folder = workspace.settings.decisions_dir
    for name in (f"{decision.number:06d}.html", "latest.html"):
        write_file(folder / name, page.encode())
    return folder / f"{decision.number:06d}.html"


def make_page(store: ObjectStore, facts: RetrainFacts) -> str:
    """Return the page as HTML, with pictures of the images that it shows."""
    return make_retrain_report(facts, _load_pictures(store, choose_pictures(facts)))


def collect_facts(workspace: Workspace, decision: Decision, asked: Asked, champion: LedgerEntry | None) -> RetrainFacts:
    """Return what the page shows. The champion is left out where it was not asked."""
    tests, aligned = asked.tests, asked.aligned
    judged = [
        Judged(digest, card, Answers(aligned.labels, scores.probs_nk, scores.chosen, aligned.classes, aligned.key_n))
        for (digest, card), scores in zip(asked.models, aligned.models, strict=True)
    ]
    return RetrainFacts(
        decision=decision,
        candidate=judged[0],
        champion=judged[1] if len(judged) > 1 else None,
        sha256_n=[record.sha256 for record in tests],
        origins=[(*record.origins, "")[0] for record in tests],
        slices=make_slices(tests, aligned.models[0].measures),
        diff=_compare_data(workspace, decision, champion),
        leaks=_count_leaks(workspace, decision),
        curves=_load_curves(workspace, decision),
        origin=_tell_origin(workspace, decision),
    )


def _load_pictures(store: ObjectStore, names: Sequence[str]) -> dict[str, str]:
    """Return images as data URIs, those that are missing or damaged left out."""
    pictures = {}
    for sha256 in names:
        try:
            image = decode_image(store.get(make_image_key(sha256)), sha256, max_pixels=None)
        except VisionLoopError:
            continue
        pictures[sha256] = encode_picture(image)
    return pictures


def _compare_data(workspace: Workspace, decision: Decision, champion: LedgerEntry | None) -> Diff | None:
    """Return what the data changed since the champion's version; None where one of the versions cannot be read."""
    if champion is None:
        return None
    try:
        versions = [
            load_version(workspace.store, str(dataset["name"]), int(dataset["version"]))
            for dataset in (champion.dataset, decision.dataset)
        ]
        return compare_records(*(iterate_version(workspace.store, version) for version in versions))
    except (VisionLoopError, KeyError):
        return None


def _count_leaks(workspace: Workspace, decision: Decision) -> Mapping[str, int]:
    try:
        version = load_version(workspace.store, decision.dataset["name"], decision.dataset["version"])
        kinds = Counter(leak.kind for leak in load_leaks(workspace.store, version).rows)
    except VisionLoopError:
        return {}
    return {LEAK_WORDS.get(kind, kind): count for kind, count in kinds.items()}


def _load_curves(workspace: Workspace, decision: Decision) -> Mapping[str, Sequence[tuple[float, float]]]:
    if decision.run_id is None:
        return {}
    try:
        return dict(workspace.tracking.load_curves(decision.run_id, CURVES))
    except VisionLoopError:
        return {}


def _tell_origin(workspace: Workspace, decision: Decision) -> dict[str, str]:
    note = load_run_note(workspace.settings.runs_dir, decision.candidate)
    dataset = decision.dataset
    facts = {
        "decided by": get_user(),
        "decided at": decision.decided_at,
        "dataset": f"{dataset['name']} version {dataset['version']}, {dataset['digest']}",
        "MLflow run": decision.run_id or "",
        "git commit": (note.git_commit if note else None) or "",
        "trained": f"until {note.finished_at}, {note.seconds:,.0f} s" if note else "",
    }
    return {what: found for what, found in facts.items() if found}
