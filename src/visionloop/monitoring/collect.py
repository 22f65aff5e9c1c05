"""Reads what a window is judged by: rows of the prediction log, kept images, late labels, the champion's bundle."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionloop.bundle import Bundle
from visionloop.confidence import compute_probs, find_abstained, get_limit
from visionloop.data.day_table import DayReader
from visionloop.data.images import decode_image
from visionloop.data.prediction_log import (
    PREDICTIONS,
    join_feedback,
    make_kept_key,
    read_feedback,
    read_predictions,
)
from visionloop.errors import BundleError, VisionLoopError
from visionloop.evaluation.metrics import compute_confusion
from visionloop.evaluation.resampling import compute_wilson
from visionloop.monitoring.drift import BoolArray, FloatArray, Sample
from visionloop.monitoring.judge import Known
from visionloop.monitoring.quality import LabelledAccuracy, compute_labelled_accuracy
from visionloop.monitoring.window import (
    COLUMNS,
    START,
    Span,
    find_chosen,
    get_flags,
    get_numbers,
    make_sample,
    number_blocks,
    pick_rows,
    read_embeddings,
)
from visionloop.predictor import choose_classes, compute_confidence
from visionloop.workspace import Workspace

if TYPE_CHECKING:
    import pyarrow as pa

MAX_VALIDATION = 4000
MAX_COLOURS = 40  # kept images that are opened for their colours, of the window and of the reference
COLOUR_PX = 32


@dataclass
class Rows:
    """The sampled rows of one window that the champion answered, and their embeddings."""

    table: "pa.Table"
    embedding_nd: NDArray[np.float32] | None


class Log:
    """The prediction log of a workspace, and what one model answered in it. `damaged` parts are passed over."""

    def __init__(self, workspace: Workspace, digest: str) -> None:
        self.workspace, self.digest = workspace, digest
        self.section = workspace.params.monitor
        self.damaged: set[str] = set()

    def find_start(self) -> datetime:
        """Return the start of the first day that there are rows of: those before have expired."""
        days = DayReader(PREDICTIONS, self.workspace.store, self.workspace.name).list_parts()
        first = min(days, default=None)
        return datetime(first.year, first.month, first.day, tzinfo=UTC) if first else START

    def has_rows_before(self, end: datetime) -> bool:
        """Say whether the log has a row of a time before `end`."""
        reader = DayReader(PREDICTIONS, self.workspace.store, self.workspace.name)
        return any(len(part) for part in reader.read(self.find_start(), end, ["time"]))

    def read(self, span: Span) -> "pa.Table":
        found = read_predictions(self.workspace.store, self.workspace.name, span.start, span.end, COLUMNS)
        self.damaged.update(found.damaged)
        return found.table

    def sample(self, span: Span, own: "pa.Table | None" = None) -> Rows:
        """Return so many rows of a window as are looked at, with their embeddings, in order of their blocks."""
        table = filter_model(self.read(span), self.digest) if own is None else own
        rows = pick_rows(len(table), self.section.max_images, int(span.start.timestamp()) // 3600)
        table = table.take(rows)
        return Rows(table, self._read_embeddings(span, table))

    def _read_embeddings(self, span: Span, table: "pa.Table") -> NDArray[np.float32] | None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if not len(table):
            return None
        wanted = table["request_id"].combine_chunks()
        reader = DayReader(PREDICTIONS, self.workspace.store, self.workspace.name)
        parts = [
            part.filter(pc.is_in(part["request_id"], value_set=wanted))
            for part in reader.read(span.start, span.end, ["request_id", "embedding"])
        ]
        if not parts:
            return None
        found = pa.concat_tables(parts)
        place = pc.index_in(wanted, value_set=found["request_id"].combine_chunks())
        return None if place.null_count else read_embeddings(found["embedding"].take(place))

    def to_sample(self, rows: Rows, known: Known) -> Sample:
        """Return rows as a sample; embeddings of another length than the model's are none."""
        embedding_nd, validation_nd = rows.embedding_nd, known.validation.embedding_nd
        if embedding_nd is not None and validation_nd is not None and embedding_nd.shape[1] != validation_nd.shape[1]:
            embedding_nd = None
        return make_sample(rows.table, known.classes, self.section.block_hours, embedding_nd)

    def measure_colours(self, table: "pa.Table") -> FloatArray:
        """Return the mean colours (n, 3) of some images that were kept, from 0 to 255."""
        kept_n = np.flatnonzero(np.array([bool(one) for one in table["image_kept"].to_pylist()], bool))
        found = []
        for row in kept_n[pick_rows(len(kept_n), MAX_COLOURS, 0)]:
            picture = self.open_kept(table, int(row), COLOUR_PX)
            if picture is not None:
                found.append(np.asarray(picture, np.float64).reshape(-1, 3).mean(axis=0))
        return np.array(found).reshape(-1, 3)

    def open_kept(self, table: "pa.Table", row: int, size_px: int) -> Any | None:
        """Return a kept image, made small; None where it is gone or damaged."""
        day, sha256 = table["time"][row].as_py().date(), table["image_sha256"][row].as_py()
        try:
            data = self.workspace.store.get(make_kept_key(self.workspace.name, day, sha256))
            picture = decode_image(data, "kept image", max_pixels=self.workspace.params.ingest.max_pixels)
        except VisionLoopError:
            return None
        picture = picture.convert("RGB")
        picture.thumbnail((size_px, size_px))
        return picture

    def compare_labels(self, end: datetime, classes: Sequence[str]) -> LabelledAccuracy:
        """Return the accuracy by the labels of the last days. A label may come any time after the answer."""
        import pyarrow as pa
        import pyarrow.compute as pc

        first = end - timedelta(days=self.section.quality_days)
        labels = read_feedback(self.workspace.store, self.workspace.name, first, None)
        said = labels.table["request_id"].combine_chunks()
        reader = DayReader(PREDICTIONS, self.workspace.store, self.workspace.name)
        parts = [  # of a month only what was kept, or what somebody said something of
            part.filter(pc.or_kleene(part["image_kept"], pc.is_in(part["request_id"], value_set=said)))
            for part in reader.read(first, end, COLUMNS)
        ]
        empty = PREDICTIONS.make_schema().empty_table().select(list(COLUMNS))
        table = filter_model(pa.concat_tables([empty, *parts]), self.digest)
        self.damaged.update(labels.damaged, reader.damaged)
        joined = join_feedback(table, labels.table)
        return compute_labelled_accuracy(
            _find_hits(joined, classes),
            np.array([one is not None for one in joined["feedback_labels"].to_pylist()], bool),
            np.where(get_flags(joined, "image_kept"), get_numbers(joined, "keep_probability"), np.nan),
            [one or "" for one in joined["keep_reason"].to_pylist()],
            number_blocks(joined, self.section.block_hours),
        )


def load_known(bundle: Bundle) -> Known:
    """Return what a bundle says of its model on the validation side. Raises BundleError."""
    card = bundle.card
    try:
        with np.load(bundle.folder / "reference.npz", allow_pickle=False) as arrays:
            embedding_nd, logits_nk = arrays["embedding_nd"], arrays["logits_nk"]
            truth = arrays["targets_nk"].astype(bool) if card.task == "multilabel" else arrays["label_n"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as exc:
        where, todo = f"bundle {bundle.digest[:12]}", "Train again with this version of visionloop."
        raise BundleError(where, "reference.npz is damaged or old", "answers of the validation side", todo) from exc
    probs_nk = compute_probs(logits_nk, card)
    chosen = choose_classes(probs_nk, card)
    confidence_n = compute_confidence(probs_nk, chosen).astype(np.float64)
    several, number_k = chosen.ndim == 2, len(card.classes)
    hit_n: BoolArray = np.equal(chosen, truth).reshape(len(truth), -1).all(axis=1)
    # With a rule about distance the log has more that were not answered than the confidence alone explains.
    abstained_n = find_abstained(confidence_n, None, card)
    validation = Sample(
        block_n=np.arange(len(truth)),
        chosen_nk=chosen.astype(bool) if several else np.eye(number_k, dtype=bool)[chosen],
        confidence_n=confidence_n,
        abstained_n=abstained_n if get_limit(card, "distance") is None else np.zeros(len(truth), bool),
        embedding_nd=embedding_nd.astype(np.float64),
    ).take(pick_rows(len(truth), MAX_VALIDATION, 0))
    confusion_kk = None if several else compute_confusion(truth.astype(np.int64), chosen.astype(np.int64), number_k)
    return Known(card.classes, validation, compute_wilson(int(hit_n.sum()), len(hit_n)), confusion_kk)


def filter_model(table: "pa.Table", digest: str) -> "pa.Table":
    import pyarrow.compute as pc

    return table.filter(pc.equal(table["model_digest"], digest))


def join_rows(several: Sequence[Rows]) -> Rows | None:
    import pyarrow as pa

    if not several:
        return None
    parts = [one.embedding_nd for one in several if len(one.table)]
    whole = all(part is not None for part in parts) and len({part.shape[1] for part in parts if part is not None}) == 1
    joined = np.concatenate([part for part in parts if part is not None]) if whole else None
    return Rows(pa.concat_tables([one.table for one in several]), joined)


def _find_hits(joined: "pa.Table", classes: Sequence[str]) -> BoolArray:
    """Say which answers are what was said of their image later; False where nothing was said."""
    chosen_nk = find_chosen(joined, classes)
    hits = []
    for row_k, labels in zip(chosen_nk, joined["feedback_labels"].to_pylist(), strict=True):
        answered = {classes[int(k)] for k in np.flatnonzero(row_k)}
        hits.append(labels is not None and answered == set(labels))
    return np.array(hits, bool)
