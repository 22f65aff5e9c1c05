"""Makes a batch: looks through the log for images that the server kept and nobody has labelled, and chooses some.

An image has one chance in the lot: it is drawn only among the images that came after the batch before. So what an
earlier batch chose for its doubt is not missing among those that are drawn, and the random share of all batches
together is a fair sample of the traffic, whose labels can be judged by.
"""

import zipfile
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from visionloop.bundle import download_bundle
from visionloop.confidence import pick_rows, scale_to_one
from visionloop.data.answers import (
    LABEL,
    LOG,
    RANDOM,
    SUSPECTS,
    UNDO,
    Asked,
    Batch,
    create_batch,
    load_batches,
    load_feedback_opinions,
    load_opinions,
    make_asked,
)
from visionloop.data.day_table import IMAGE, DayReader
from visionloop.data.manifest import latest_version
from visionloop.data.parts import iterate_version
from visionloop.data.prediction_log import PREDICTIONS
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import DatasetError, VisionLoopError
from visionloop.features.album import Album
from visionloop.features.neighbours import find_neighbours
from visionloop.features.suspects import Suspect
from visionloop.monitoring.review import (
    NOVEL,
    SPREAD,
    UNCERTAIN,
    UNSURE_BELOW,
    BoolArray,
    Candidates,
    Float32Array,
    IntArray,
    choose_spread,
    draw_by_lot,
    find_novel,
)
from visionloop.workspace import Workspace, get_user

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = (
    "request_id",
    "time",
    IMAGE,
    "model_digest",
    "task",
    "prediction",
    "labels",
    "confidence",
    "keep_probability",
)
MAX_CANDIDATES = 10_000  # whose embeddings are compared; of more some by lot
NUM_SIMILAR, MAX_KNOWN = 6, 1000
TRIES = 20


@dataclass(frozen=True)
class Reference:
    """The validation images of a model: their embeddings, which they are, and their labels."""

    embedding_rd: Float32Array
    sha256_r: Sequence[str] = ()
    labels_r: Sequence[tuple[str, ...]] = ()

    @cached_property
    def _unit_rd(self) -> Float32Array:
        return scale_to_one(self.embedding_rd)

    def find_similar(self, embedding_d: Float32Array) -> tuple[dict[str, Any], ...]:
        """Return the nearest ones, the nearest first."""
        if self.embedding_rd.shape[1:] != embedding_d.shape or not np.isfinite(embedding_d).all():
            return ()
        near_r = self._unit_rd @ scale_to_one(embedding_d[None])[0]
        rows = np.argsort(-near_r, kind="stable")[:NUM_SIMILAR]
        return tuple({"sha256": self.sha256_r[row], "labels": list(self.labels_r[row])} for row in rows)


@dataclass(frozen=True)
class Progress:
    """How far a batch is: images with an answer of anybody, and all."""

    answered: frozenset[str]
    num_images: int

    @property
    def num_answered(self) -> int:
        return len(self.answered)

    @property
    def is_done(self) -> bool:
        return self.num_answered == self.num_images


def ask(workspace: Workspace, *, now: datetime, by: str, count: int | None = None, is_new: bool = False) -> Batch:
    """Return the batch that is not answered yet, or choose another one, and keep it in the store.

    Raises:
        DatasetError: the log has no image that could be asked about.
        StoreError: the store cannot be read or written.
    """
    store, name, rules = workspace.store, workspace.name, workspace.params.review
    for _ in range(TRIES):
        batches = load_batches(store, name)
        since = now - timedelta(days=rules.days)
        last = next((one for one in reversed(batches) if one.kind == LOG), None)
        is_young = last is not None and not is_new and datetime.fromisoformat(last.at) >= since
        if last and is_young and not measure_progress(workspace, last).is_done:
            return last
        batch = _Chooser(workspace, batches, now).choose(count or rules.count, by)
        if create_batch(store, name, batch):
            return batch
    raise _make_lost(name)


def ask_about(workspace: Workspace, album: Album, suspects: Sequence[Suspect], *, now: datetime) -> Batch:
    """Return a batch of suspicious labels; the last one, if it asks the same and is not answered yet.

    Raises:
        StoreError: the store cannot be read or written.
    """
    store, name, prepared = workspace.store, workspace.name, album.prepared
    rows = sorted({one.row for one in suspects})
    _, row_mk = find_neighbours(album.embedding_nd[rows], album.embedding_nd, NUM_SIMILAR + 1)
    others = ([int(one) for one in near if one != row] for row, near in zip(rows, row_mk, strict=True))
    near_of = {row: near[:NUM_SIMILAR] for row, near in zip(rows, others, strict=True)}
    found: dict[int, Asked] = {}
    for one in suspects:
        before = found.get(one.row)
        labels = tuple(sorted(prepared.labels(one.row)))
        proposed = {*(before.proposed if before else labels), one.new} - {one.old, ""}
        similar = [(prepared.sha256_n[row], prepared.labels(row)) for row in near_of[one.row]]
        found[one.row] = Asked(
            sha256=prepared.sha256_n[one.row],
            day="",
            request_id="",
            model=labels,
            confidence=one.score,
            reason="suspect",
            proposed=tuple(sorted(proposed)),
            similar=tuple({"sha256": sha256, "labels": list(said)} for sha256, said in similar),
        )
    images = tuple(found.values())
    for _ in range(TRIES):
        batches = load_batches(store, name)
        last = next((one for one in reversed(batches) if one.kind == SUSPECTS), None)
        is_same = last is not None and [one.sha256 for one in last.images] == [one.sha256 for one in images]
        if last and is_same and not measure_progress(workspace, last).is_done:
            return last
        number = max((one.number for one in batches), default=0) + 1
        at, task = now.isoformat(timespec="seconds"), "multilabel" if prepared.targets_nk is not None else "multiclass"
        batch = Batch(number, SUSPECTS, at, get_user(), task, list_classes(workspace, images), images)
        if create_batch(store, name, batch):
            return batch
    raise _make_lost(name)


def find_answered(workspace: Workspace) -> frozenset[str]:
    """Return the suspects whose label a person has given or confirmed. Raises StoreError, DatasetError."""
    said = load_opinions(workspace.store, workspace.name)
    return frozenset(one.asked.sha256 for one in said if one.kind == SUSPECTS and one.verdict == LABEL)


def _make_lost(name: str) -> DatasetError:
    return DatasetError(f"review {name}", f"lost the race for a batch {TRIES} times", "a quieter moment")


def measure_progress(workspace: Workspace, batch: Batch) -> Progress:
    """Return how far a batch is. Raises StoreError, DatasetError."""
    said = load_opinions(workspace.store, workspace.name, [batch])
    answered = frozenset(one.asked.sha256 for one in said if one.verdict != UNDO)
    return Progress(answered, len(batch.images))


class _Chooser:
    """Chooses the images of the next batch among the rows of the log whose images were kept: `table`, each once."""

    def __init__(self, workspace: Workspace, batches: Sequence[Batch], now: datetime) -> None:
        self.workspace, self.batches, self.now = workspace, batches, now
        self.rules = workspace.params.review
        self.since = now - timedelta(days=self.rules.days)
        self.number = max((one.number for one in batches), default=0) + 1
        self.table = _read_kept(workspace, self.since, now)
        kept = workspace.params.serve.keep_images
        self.unsure_below = (kept.confidence if kept != "none" else None) or UNSURE_BELOW

    def choose(self, count: int, by: str) -> Batch:
        """Return the batch. Raises DatasetError: there is nothing to ask about."""
        chances, others = self._draw(count)
        lot = [*chances]
        rows = np.array([*lot, *others.tolist()], np.int64)
        if not len(rows):
            raise _make_nothing(self.workspace, len(self.table))
        digest = str(self.table["model_digest"][len(self.table) - 1])  # of the newest row: the model that serves now
        reference = _load_reference(self.workspace, digest)
        embedding_nd = _read_embeddings(self.workspace, self.table.take(rows), digest, self.since, self.now)
        chosen, novel_n = self._spread(rows, embedding_nd, len(lot), count - len(lot), reference)
        found = []
        for place in [*range(len(lot)), *chosen]:
            row = int(rows[place])
            one = make_asked(self.table.slice(row, 1).to_pylist()[0], RANDOM, chances.get(row))
            if place >= len(lot):
                is_unsure = one.confidence < self.unsure_below
                one = replace(one, reason=NOVEL if novel_n[place] else UNCERTAIN if is_unsure else SPREAD)
            found.append(replace(one, similar=reference.find_similar(embedding_nd[place])))
        order = np.random.default_rng(self._seed(3)).permutation(len(found))  # people tire: not the lot first
        return Batch(
            number=self.number,
            kind=LOG,
            at=self.now.isoformat(timespec="seconds"),
            by=by,
            task=str(self.table["task"][len(self.table) - 1]),
            classes=list_classes(self.workspace, found),
            images=tuple(found[k] for k in order),
            until=self.now.isoformat(),
        )

    def _draw(self, count: int) -> tuple[dict[int, float], IntArray]:
        """Draw the share by lot: row -> probability; and return the other rows that may be asked about."""
        images, times = self.table[IMAGE].to_pylist(), self.table["time"].to_pylist()
        untils = [datetime.fromisoformat(one.until) for one in self.batches if one.until]
        known, labelled = _find_known(self.workspace, self.batches, self.since, {*images})
        known_n = np.array([one in known for one in images], bool)
        fresh_n = np.array([not untils or time >= max(untils) for time in times], bool)
        pool = np.flatnonzero(fresh_n & ~known_n)
        keep_n = np.asarray(self.table["keep_probability"].to_numpy(), np.float64)[pool]
        lot, chance_n = draw_by_lot(keep_n, round(count * self.rules.random), self._seed(0))
        chances = dict(zip(pool[lot].tolist(), chance_n.tolist(), strict=True))
        free_n = ~known_n & np.array([one not in labelled for one in images], bool)
        others = np.setdiff1d(np.flatnonzero(free_n), pool[lot])
        if len(others) > MAX_CANDIDATES:
            others = np.sort(np.random.default_rng(self._seed(1)).choice(others, MAX_CANDIDATES, replace=False))
        return chances, others

    def _spread(
        self, rows: IntArray, embedding_nd: Float32Array, num_lot: int, count: int, reference: "Reference"
    ) -> tuple[list[int], BoolArray]:
        """Return the places of those that are chosen among the rows behind the lot, and which rows are novel."""
        confidence_n = np.asarray(self.table["confidence"].cast("float64").to_numpy(), np.float64)[rows]
        known_rd = _join_known(reference.embedding_rd, embedding_nd[:num_lot])
        candidates = Candidates(embedding_nd[num_lot:], confidence_n[num_lot:], known_rd)
        chosen = choose_spread(candidates, count, self._seed(2)) + num_lot
        novel_n = find_novel(Candidates(embedding_nd, confidence_n, reference.embedding_rd))
        return chosen.tolist(), novel_n

    def _seed(self, step: int) -> list[int]:
        return [self.rules.seed, self.number, step]


def list_classes(workspace: Workspace, images: Sequence[Asked]) -> tuple[str, ...]:
    """Return the classes that there are to choose from: those of the dataset, of params.yaml, and of the answers."""
    version = latest_version(workspace.store, workspace.name)
    names = {*(version.classes if version else ()), *(workspace.params.ingest.expect.classes or ())}
    return tuple(sorted(names | {label for one in images for label in (*one.model, *one.proposed)}))


def _find_known(
    workspace: Workspace, batches: Sequence[Batch], since: datetime, images: Set[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """Return those `images` that are in the dataset, and all that were asked about or forgotten, or have feedback.

    Feedback on answers from `since` on came after them: what came before is not read.
    The lot does not leave out the latter: what clients send feedback on is not chance.
    """
    store, name = workspace.store, workspace.name
    version = latest_version(store, name)
    rows = {one.sha256 for one in iterate_version(store, version) if one.sha256 in images} if version else set[str]()
    asked = {one.sha256 for batch in batches for one in batch.images}
    said = {one.asked.sha256 for one in load_feedback_opinions(store, name, since) if not one.is_echo}
    return frozenset(rows | asked | load_tombstones(store, name)), frozenset(said)


def _read_kept(workspace: Workspace, since: datetime, now: datetime) -> "pa.Table":
    """Return the rows of images that were kept with a known probability, each image once: its first row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    reader = DayReader(PREDICTIONS, workspace.store, workspace.name)
    parts = [PREDICTIONS.make_schema().empty_table().select(list(COLUMNS))]
    for part in reader.read(since, now, [*COLUMNS, "image_kept"]):
        kept = part.filter(pc.and_kleene(part["image_kept"], pc.greater(part["keep_probability"], 0)))
        parts.append(kept.select(list(COLUMNS)))
    table = pa.concat_tables(parts).sort_by([("time", "ascending"), ("request_id", "ascending")])
    first: dict[str, int] = {}
    for row, sha256 in enumerate(table[IMAGE].to_pylist()):
        first.setdefault(sha256, row)
    return table.take(pa.array(first.values(), pa.int64()))


def _read_embeddings(
    workspace: Workspace, rows: "pa.Table", digest: str, since: datetime, now: datetime
) -> Float32Array:
    """Return the embeddings (n, d) that one model gave; NaN for rows of others, and where the log has none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    place = {one: row for row, one in enumerate(rows["request_id"].to_pylist())}
    wanted = pa.array([*place], pa.string())
    found: dict[int, Any] = {}
    reader = DayReader(PREDICTIONS, workspace.store, workspace.name)
    for part in reader.read(since, now, ["request_id", "model_digest", "embedding"]):
        mine = part.filter(
            pc.and_(pc.is_in(part["request_id"], value_set=wanted), pc.equal(part["model_digest"], digest))
        )
        for request_id, embedding in zip(mine["request_id"].to_pylist(), mine["embedding"], strict=True):
            if embedding.is_valid:
                found[place[request_id]] = np.asarray(embedding.values, np.float32)
    size = max((len(one) for one in found.values()), default=1)
    embedding_nd = np.full((len(rows), size), np.nan, np.float32)
    for row, one in found.items():
        if len(one) == size:
            embedding_nd[row] = one
    return embedding_nd


def _load_reference(workspace: Workspace, digest: str) -> Reference:
    """Return what a bundle says of its validation images; nothing where it cannot be had, as one served by its path."""
    nothing = Reference(np.zeros((0, 1), np.float32))
    try:
        bundle = download_bundle(workspace.store, digest, workspace.settings.hidden_dir / "bundles")
        with np.load(bundle.folder / "reference.npz", allow_pickle=False) as arrays:
            embedding_rd, sha256_r, label_r = (arrays[one] for one in ("embedding_nd", "sha256_n", "label_n"))
            several_rk = arrays.get("targets_nk")
        rows = pick_rows(len(sha256_r))[:: -(-len(pick_rows(len(sha256_r))) // MAX_KNOWN) or 1]
        chosen = [[label_r[row]] if several_rk is None else np.flatnonzero(several_rk[row]) for row in rows]
        labels = [tuple(bundle.card.classes[k] for k in each if k >= 0) for each in chosen]
        if embedding_rd.ndim != 2 or not np.isfinite(embedding_rd).all():
            return nothing
        return Reference(embedding_rd[rows].astype(np.float32), [sha256_r[row].decode() for row in rows], labels)
    except (VisionLoopError, OSError, ValueError, KeyError, IndexError, AttributeError, zipfile.BadZipFile):
        return nothing


def _join_known(one_rd: Float32Array, other_rd: Float32Array) -> Float32Array:
    """Return embeddings of known images together; those of another length, or without numbers, are left out."""
    other_rd = other_rd[np.isfinite(other_rd).all(axis=1)]
    if not len(one_rd):
        return other_rd
    return np.concatenate([one_rd, other_rd]) if one_rd.shape[1] == other_rd.shape[1] else one_rd


def _make_nothing(workspace: Workspace, number: int) -> DatasetError:
    """Return the error of a log without an image to ask about, with the way out."""
    rules, days = workspace.params.serve.keep_images, workspace.params.review.days
    if number:
        found, todo = f"all {number:,} images that were kept are labelled or asked about", "Wait for more traffic."
    elif rules == "none":
        found = f"the server has kept no image in {days} days"
        todo = "Set `serve.keep_images: {confidence: 0.8, novel: 0.95, random: 0.01}` in params.yaml, and serve."
    else:
        found, todo = f"no image was kept in {days} days", "Wait for traffic, or raise review.days."
    delay = f"A server sends what it keeps every {workspace.params.serve.log_flush_s:g} s (serve.log_flush_s)."
    return DatasetError(f"review {workspace.name}", found, "images to ask about", f"{todo} {delay}")


def describe_reasons(images: Sequence[Asked]) -> str:
    """Return how many images there are of each reason: `10 random, 25 novel, 15 uncertain`."""
    reasons = [one.reason for one in images]
    return ", ".join(f"{reasons.count(one)} {one}" for one in sorted(set(reasons)))
