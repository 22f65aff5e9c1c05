"""Walks back from a model to its images, and forward from an image to the models that used it. Reads, never writes.

back      bundle -> ledger entries, decisions -> run, git commit, params -> dataset version -> images
forward   image -> dataset versions that hold it -> bundles made on one of them
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionloop.bundle import DIGESTS, load_bundle, load_run_note
from visionloop.data.known_store import check_entry
from visionloop.data.manifest import latest_version, list_versions, load_version
from visionloop.data.parts import hold_version, iterate_version, make_part_key
from visionloop.data.rows import iterate_part
from visionloop.errors import BundleError, DatasetError, ObjectMissing, VisionLoopError, shorten
from visionloop.promotion.ledger import read_decisions, read_history, require_entry
from visionloop.promotion.models import require_name
from visionloop.records import Card, DatasetVersion, Decision, ImageRecord, LedgerEntry
from visionloop.store import ObjectStore
from visionloop.tracking import DIGEST_TAG
from visionloop.workspace import Workspace

USES = {"train": "trained on it", "val": "chosen and tuned on it", "test": "judged on it", "excluded": "did not use it"}
_PROMOTED = re.compile(r"([A-Za-z0-9._-]+@)?(champion|[0-9]{1,6})")
_HEX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class ModelOrigin:
    """Where a model came from. `version` is None, with the reason in `lost`, if the store has it no longer.

    `git_commit` is None where it is not known, and "" where there was none yet. `network_of`: the run that its network
    was trained in, where that was packed again with another card.
    """

    digest: str
    card: Card
    entries: tuple[LedgerEntry, ...]
    is_champion: bool
    decisions: tuple[Decision, ...]
    run_id: str | None
    git_commit: str | None
    version: DatasetVersion | None
    images: Sequence[ImageRecord]
    lost: str = ""
    network_of: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it for machines, every image included."""
        return {
            "bundle": self.digest,
            "champion": self.is_champion,
            "card": self.card.to_json(),
            "entries": [entry.to_json() for entry in self.entries],
            "decisions": [decision.to_json() for decision in self.decisions],
            "run_id": self.run_id,
            "git_commit": self.git_commit or None,
            "network_of": self.network_of,
            "dataset": self.version.to_json() if self.version else None,
            "lost": self.lost,
            "images": [image.to_json() for image in self.images],
        }


@dataclass(frozen=True)
class ImageUse:
    """A bundle made on a dataset version that holds the image, and the side that the image had there."""

    bundle: str
    version: int
    side: str
    marks: tuple[str, ...]


@dataclass(frozen=True)
class ImagePath:
    """Where an image went: each version that holds it, with its row there, and the bundles made on one of them."""

    sha256: str
    rows: tuple[tuple[int, ImageRecord], ...]
    uses: tuple[ImageUse, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it for machines."""
        return {
            "image": self.sha256,
            "versions": [{"version": number, **record.to_json()} for number, record in self.rows],
            "bundles": [{**vars(use), "use": USES[use.side]} for use in self.uses],
        }


def trace(workspace: Workspace, what: str) -> ModelOrigin | ImagePath:
    """Follow a model back or an image forward.

    A model is `champion`, `candidate`, an entry's number, NAME@champion, NAME@3, a bundle's folder or the first letters
    of its digest. An image is a file, the first letters of its sha256, or its origin in the newest version.

    Raises:
        DatasetError: it names neither, or several. PromotionError: there is no such ledger entry.
        BundleError: the bundle is not in the store, or damaged. StoreError: it lacks the last ledger entry seen.
    """
    check_entry(workspace)  # a ledger that is away, or damaged, would name another champion or none
    path = Path(what).expanduser()
    if what == "candidate" or (path / DIGESTS).is_file():
        bundle = load_bundle(workspace.settings.candidate_dir if what == "candidate" else path)
        return trace_model(workspace, bundle.digest, bundle.card)
    if path.is_file():
        return trace_image(workspace, hashlib.sha256(path.read_bytes()).hexdigest())
    if found := _PROMOTED.fullmatch(what):
        name = (found[1] or f"{workspace.name}@")[:-1]
        if found[1]:
            require_name(workspace.store, name, f"lineage {what!r}")
        entry = require_entry(workspace.store, name, None if found[2] == "champion" else int(found[2]))
        return trace_model(workspace, entry.bundle, _load_card(workspace.store, entry.bundle))
    if _HEX.fullmatch(what):
        bundles = [digest for digest in _list_bundles(workspace.store) if digest.startswith(what)]
        if len(bundles) == 1:
            return trace_model(workspace, bundles[0], _load_card(workspace.store, bundles[0]))
        if not bundles:
            with contextlib.suppress(VisionLoopError):
                candidate = load_bundle(workspace.settings.candidate_dir)
                if candidate.digest.startswith(what):
                    return trace_model(workspace, candidate.digest, candidate.card)
            _tell_not_kept(workspace, what)
    return trace_image(workspace, _find_image(workspace, what))


def _tell_not_kept(workspace: Workspace, start: str) -> None:
    """Raise BundleError with what is known of a candidate that was judged and not promoted, if one begins so."""
    for decision in reversed(read_decisions(workspace.store, workspace.name)):
        if decision.candidate.startswith(start):
            run = f", run {decision.run_id}" if decision.run_id else ""
            raise BundleError(
                f"bundle {decision.candidate[:12]}",
                f"was not kept: decision {decision.number} on dataset version {decision.dataset['version']} is "
                f"{decision.verdict}{run}",
                "a registered bundle, or the one in models/candidate",
                f"See decisions/{decision.number:06d}.html and `visionloop runs`.",
            )


def trace_model(workspace: Workspace, digest: str, card: Card) -> ModelOrigin:
    """Follow a model back to the images of its dataset version. MLflow is asked only for what nothing else knows."""
    store, note = workspace.store, load_run_note(workspace.settings.runs_dir, digest)
    history = read_history(store, card.name)
    entries = tuple(entry for entry in history if entry.bundle == digest)
    decisions = tuple(one for one in read_decisions(store, card.name) if one.candidate == digest)
    known = [*(one.run_id for one in entries), *(one.run_id for one in decisions)]
    run_id = note.run_id if note else next(filter(None, known), None)
    commit, network_of = (note.git_commit or "", note.extra.get("network_of")) if note else (None, None)
    with contextlib.suppress(VisionLoopError):  # MLflow may be away, or may have lost the run
        run_id = run_id or workspace.tracking.find_tagged_run(DIGEST_TAG, digest)
        if run_id and commit is None:
            tags = workspace.tracking.load_run(run_id).tags
            commit, network_of = tags.get("visionloop.git_commit"), tags.get("visionloop.network_of")
            commit = "" if commit == "none" else commit
    version, images, lost = _load_dataset(store, card)
    is_champion = bool(history) and history[-1].bundle == digest
    return ModelOrigin(digest, card, entries, is_champion, decisions, run_id, commit, version, images, lost, network_of)


def _load_dataset(store: ObjectStore, card: Card) -> tuple[DatasetVersion | None, Sequence[ImageRecord], str]:
    """Return the dataset version that a card names, with its rows; or none, and why not."""
    try:
        version = load_version(store, str(card.dataset["name"]), int(card.dataset["version"]))
        if version.digest != card.dataset["digest"]:
            return None, (), f"version {version.version} of the store is another one, {version.digest[:12]}"
        return version, hold_version(store, version), ""
    except DatasetError as exc:
        return None, (), f"{exc.where} {exc.found}"


def trace_image(workspace: Workspace, sha256: str) -> ImagePath:
    """Follow an image to the versions that hold it and to the bundles made on them.

    Raises:
        DatasetError: no version of this dataset holds it.
    """
    store, name = workspace.store, workspace.name
    rows = tuple(_iterate_rows(store, name, sha256))
    if not rows:
        where = f"image {sha256[:12]}"
        raise DatasetError(where, f"is in no version of dataset {name}", "one of it", "See `visionloop datasets`.")
    sides = {number: record.side for number, record in rows}
    history = read_history(store, name)
    cards = {digest: _load_card(store, digest) for digest in _list_bundles(store)}
    marks: dict[str, list[str]] = {}
    with contextlib.suppress(VisionLoopError):
        candidate = load_bundle(workspace.settings.candidate_dir)
        cards[candidate.digest] = candidate.card
        marks.setdefault(candidate.digest, []).append("candidate")
    if history:
        marks.setdefault(history[-1].bundle, []).append("champion")
    made = {digest: int(c.dataset["version"]) for digest, c in cards.items() if c.dataset.get("name") == name}
    for decision in read_decisions(store, name):  # of a candidate that was not promoted only its decision is left
        if decision.candidate not in cards:
            made[decision.candidate] = int(decision.dataset["version"])
            marks[decision.candidate] = [f"not kept; decision {decision.number}: {decision.verdict}"]
    order = sorted((n, digest) for digest, n in made.items() if n in sides)
    uses = [ImageUse(digest, n, sides[n], tuple(marks.get(digest, ()))) for n, digest in order]
    return ImagePath(sha256, rows, tuple(uses))


def _iterate_rows(store: ObjectStore, name: str, sha256: str) -> Iterator[tuple[int, ImageRecord]]:
    """Yield the row of an image in each version that holds it. A part is read once, however many versions share it."""
    known: dict[str, ImageRecord | None] = {}
    for version in list_versions(store, name):
        row = None
        for part in version.parts:
            if part not in known:
                with store.open(make_part_key(part)) as file:
                    records = iterate_part(file, f"manifest {part[:12]}")
                    known[part] = next((record for record in records if record.sha256 == sha256), None)
            row = known[part] or row
        if row:
            yield version.version, row


def _find_image(workspace: Workspace, what: str) -> str:
    """Return the sha256 of the one image that begins so, or came from there."""
    store, name = workspace.store, workspace.name
    newest, is_hex = latest_version(store, name), _HEX.fullmatch(what)
    rows = iterate_version(store, newest) if newest else ()
    found = [r.sha256 for r in rows if what in r.origins or (is_hex and r.sha256.startswith(what))]
    if len(found) == 1:
        return found[0]
    if not found and len(what) == 64 and _HEX.fullmatch(what):
        return what  # of an older version
    what_is_there = f"{len(found)} images are meant: {shorten(found, 3)}" if found else "names no model and no image"
    raise DatasetError(
        f"lineage {what!r}",
        what_is_there,
        "champion, candidate, NAME@3, a bundle's folder or digest; or an image's file, sha256 or origin",
        "See `visionloop history` and `visionloop datasets show`.",
    )


def _list_bundles(store: ObjectStore) -> list[str]:
    return sorted({key.split("/")[1] for key in store.list("bundles/") if key.endswith(f"/{DIGESTS}")})


def _load_card(store: ObjectStore, digest: str) -> Card:
    try:
        return Card.from_json(json.loads(store.get(f"bundles/{digest}/card.json")))
    except (ObjectMissing, ValueError, TypeError, AttributeError) as exc:
        todo = "If it is the champion, `visionloop doctor --fix` puts it back."
        raise BundleError(f"bundle {digest[:12]}", "has no readable card in the store", "card.json", todo) from exc


def describe_origin(origin: ModelOrigin, *, shown: int = 5) -> list[str]:
    """Tell where a model came from, a step on each line."""
    card, marks = origin.card, " (champion)" if origin.is_champion else ""
    classes = f"{len(card.classes)} classes: {shorten(card.classes)}"
    lines = [f"bundle    {origin.digest[:12]}{marks}: {card.task}, {classes}"]
    for entry in origin.entries:
        what = "put back" if entry.action == "rollback" else "promoted"
        lines.append(f"ledger    entry {entry.number}, {what} by {entry.by} on {entry.at[:10]}: {entry.why}")
    for decision in origin.decisions:
        against = f"entry {decision.entry}" if decision.entry else (decision.champion or "no champion")[:12]
        lines.append(
            f"decision  {decision.number}: {decision.verdict} against {against}, {decision.num_test:,} test images"
        )
    commit = {None: "git commit not known", "": "no git commit yet"}.get(origin.git_commit)
    taken = f", with the network of run {origin.network_of}" if origin.network_of else ""
    commit = commit or f"git commit {(origin.git_commit or '')[:12]}"
    lines.append(f"run       {origin.run_id or 'not known here'}, {commit}{taken}")
    params = card.params.get("train", card.params)
    told = [f"{key} {value}" for key, value in sorted(params.items()) if isinstance(value, str | int | float)]
    lines.append(f"params    {', '.join(told)}")
    about = f"{card.dataset.get('name')} version {card.dataset.get('version')}, {str(card.dataset.get('digest'))[:12]}"
    lines.append(f"dataset   {about}" + (f" ({origin.lost})" if origin.lost else f": {len(origin.images):,} images"))
    for image in origin.images[:shown]:
        labels, place = ", ".join(image.labels) or "no label", (*image.origins, "")[0]
        lines.append(f"image     {image.sha256[:12]}  {image.side:<8}  {labels}  {place}")
    if len(origin.images) > shown:
        lines.append(f"          and {len(origin.images) - shown:,} more; --json lists all")
    return lines


def describe_path(path: ImagePath) -> list[str]:
    """Tell where an image went, a step on each line."""
    _, last = path.rows[-1]
    labels = ", ".join(last.labels) or "no label"
    lines = [f"image     {path.sha256[:12]}: {last.width} x {last.height} {last.format}, {labels}"]
    lines += [f"origin    {origin}" for origin in last.origins]
    lines += [f"version   {number}: {record.side}" for number, record in path.rows]
    for use in path.uses:
        marks = f" ({', '.join(use.marks)})" if use.marks else ""
        lines.append(f"bundle    {use.bundle[:12]}{marks}: {USES[use.side]} (dataset version {use.version})")
    return lines if path.uses else [*lines, "bundle    none was made on a version that holds it"]
