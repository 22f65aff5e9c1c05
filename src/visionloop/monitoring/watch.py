"""Watches one window: reads the log, judges, and writes what came out. The only part here that touches store and disk.

    monitoring/NAME/20261128T0000/verdict.json      the record (judge.Verdict); written last: without it nothing counts
                                  checks.parquet    a row for each check
                                  classes.parquet   the shares of the classes, before and now
                                  images.parquet    the images least like the reference, the farthest first
                                  report.html
                                  accepted.json     who took an alarm for normal, and why

The first accepted windows of a model are its reference, and with them the newest. Before there are any it is the
validation side. A window that gave an alarm of drift or was broken is not accepted, unless a person accepts it.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionloop.bundle import Bundle, download_bundle
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
from visionloop.errors import BundleError, DatasetError, ObjectMissing, VisionLoopError
from visionloop.evaluation.metrics import compute_confusion
from visionloop.evaluation.resampling import compute_wilson
from visionloop.monitoring.drift import BoolArray, FloatArray, Sample
from visionloop.monitoring.health import Check, check_colours, check_model, check_traffic
from visionloop.monitoring.judge import Facts, Judged, Known, Verdict, judge_window
from visionloop.monitoring.quality import LabelledAccuracy, compute_labelled_accuracy
from visionloop.monitoring.report import Page, make_monitor_report
from visionloop.monitoring.window import (
    COLUMNS,
    Span,
    find_chosen,
    find_last_span,
    get_numbers,
    make_sample,
    make_traffic,
    number_blocks,
    pick_rows,
    read_embeddings,
    read_span,
)
from visionloop.predictor import choose_classes, compute_confidence
from visionloop.promotion.ledger import read_history, require_entry
from visionloop.records import LedgerEntry, canonical_json
from visionloop.workspace import Workspace

if TYPE_CHECKING:
    import pyarrow as pa

MAX_VALIDATION = 4000
MAX_COLOURS = 40  # kept images that are opened for their colours, of the window and of the reference
LOOK_BACK = 90  # windows before it whose verdicts are read at most, for the reference and the usual volume
VOLUMES = 14
COLOUR_PX, PICTURE_PX = 32, 200


def watch_window(
    workspace: Workspace, *, now: datetime, at: datetime | None = None, again: bool = False
) -> tuple[Verdict, bool]:
    """Judge the last window that is over, or the one that `at` lies in; return its stored verdict, and if it is new.

    A window that was judged already is not judged anew, unless `again`.

    Raises:
        PromotionError: there was no champion then.
        StoreError, BundleError: the store cannot be read, or the champion's bundle is damaged.
    """
    hours = workspace.params.monitor.window_hours
    span = find_last_span(now if at is None else at + timedelta(hours=hours), hours)
    if span.end > now:
        found, todo = f"ends at {span.end.isoformat()}, which is to come", "Wait, or name an earlier time."
        raise DatasetError(f"window {span.name}", found, "a window that is over", todo)
    if not again and (known := load_verdict(workspace, span.name)) is not None:
        return known, False
    return _Watch(workspace, span, now).run(), True


def load_verdict(workspace: Workspace, window: str) -> Verdict | None:
    """Return the verdict of a window; None: it was not judged. Raises DatasetError."""
    key = f"{_folder(workspace)}/{window}/verdict.json"
    try:
        return Verdict.from_json(json.loads(workspace.store.get(key)))
    except ObjectMissing:
        return None
    except (ValueError, TypeError, AttributeError) as exc:
        todo = "Remove it, and judge the window again."
        raise DatasetError(f"store object {key}", "is damaged", "a verdict", todo) from exc


def accept_window(workspace: Workspace, window: str, *, by: str, why: str, now: str) -> Verdict:
    """Take a window for normal: later ones are compared with it too. Raises DatasetError: it was not judged."""
    verdict = load_verdict(workspace, window)
    if verdict is None:
        raise DatasetError(f"window {window}", "was not judged", "a judged one", "Run `visionloop monitor` first.")
    record = canonical_json({"by": by, "why": why, "at": now})
    workspace.store.put(f"{_folder(workspace)}/{window}/accepted.json", record)
    return verdict


def _folder(workspace: Workspace) -> str:
    return f"monitoring/{workspace.name}"


@dataclass
class _Rows:
    """The sampled rows of one window that the champion answered, and their embeddings."""

    table: "pa.Table"
    embedding_nd: NDArray[np.float32] | None


class _Watch:
    """One window of one workspace, from the log to its verdict."""

    def __init__(self, workspace: Workspace, span: Span, now: datetime) -> None:
        self.workspace, self.span, self.now = workspace, span, now
        self.section = workspace.params.monitor
        self.entry = _find_champion(workspace, span)
        self.damaged: set[str] = set()

    def run(self) -> Verdict:
        bundle = download_bundle(
            self.workspace.store, self.entry.bundle, self.workspace.settings.hidden_dir / "bundles"
        )
        known = load_known(bundle)
        table = self._read(self.span)
        own = _filter(table, self.entry.bundle)
        before = self._load_past()
        windows = self._choose_reference(before)
        rows = self._sample(self.span, own)
        others = [self._sample(one) for one in windows]
        reference = _join(others)
        facts = Facts(
            num_images=len(own),
            sample=self._to_sample(rows, known),
            known=known,
            reference=self._to_sample(reference, known) if reference and len(reference.table) else None,
            checks=self._check(table, own, reference, before),
            labelled=self._compare_labels(known),
            seed=int(self.span.start.timestamp()) // 3600,
        )
        judged = judge_window(facts, self.section)
        verdict = self._make_verdict(judged, facts, [one.name for one in windows])
        self._write(verdict, judged, facts, rows)
        return verdict

    def _read(self, span: Span) -> "pa.Table":
        found = read_predictions(self.workspace.store, self.workspace.name, span.start, span.end, COLUMNS)
        self.damaged.update(found.damaged)
        return found.table

    def _load_past(self) -> list[Verdict]:
        """Return the verdicts of the windows before this one, the oldest first: those of this model, and the newest."""
        prefix = f"{_folder(self.workspace)}/"
        names = sorted({key.removeprefix(prefix).partition("/")[0] for key in self.workspace.store.list(prefix)})
        since = datetime.fromisoformat(self.entry.at)
        names = [name for name in names if name < self.span.name]
        first = [name for name in names if name >= Span(since, since).name][:LOOK_BACK]
        found = [load_verdict(self.workspace, name) for name in sorted({*first, *names[-LOOK_BACK:]})]
        return [one for one in found if one is not None]

    def _choose_reference(self, before: Sequence[Verdict]) -> list[Span]:
        """Return the first accepted windows of this model, and the newest: at most as many again."""
        accepted = [one for one in before if one.bundle == self.entry.bundle and self._is_accepted(one)]
        most = self.section.reference_windows
        chosen = accepted if len(accepted) <= 2 * most else [*accepted[:most], *accepted[-most:]]
        return [read_span(one.window, self.section.window_hours) for one in chosen]

    def _is_accepted(self, verdict: Verdict) -> bool:
        if verdict.verdict not in ("broken", "drift"):
            return verdict.num_looked_at >= self.section.min_images
        return self.workspace.store.exists(f"{_folder(self.workspace)}/{verdict.window}/accepted.json")

    def _sample(self, span: Span, own: "pa.Table | None" = None) -> _Rows:
        """Return so many rows of a window as are looked at, with their embeddings, in order of their blocks."""
        table = _filter(self._read(span), self.entry.bundle) if own is None else own
        rows = pick_rows(len(table), self.section.max_images, int(span.start.timestamp()) // 3600)
        table = table.take(rows)
        return _Rows(table, self._read_embeddings(span, table))

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
        found = pa.concat_tables(parts)
        place = pc.index_in(wanted, value_set=found["request_id"].combine_chunks())
        return read_embeddings(found["embedding"].take(place)) if not place.null_count else None

    def _to_sample(self, rows: _Rows, known: Known) -> Sample:
        sample = make_sample(rows.table, known.classes, self.section.block_hours, rows.embedding_nd)
        validation_nd = known.validation.embedding_nd
        if sample.embedding_nd is not None and validation_nd is not None:
            assert sample.embedding_nd.shape[1] == validation_nd.shape[1], "the same bundle gave both"
        return sample

    def _check(
        self, table: "pa.Table", own: "pa.Table", reference: _Rows | None, before: Sequence[Verdict]
    ) -> list[Check]:
        usual = make_traffic(reference.table) if reference and len(reference.table) else None
        checks = check_traffic(make_traffic(table), usual, [one.num_images for one in before][-VOLUMES:], self.section)
        if self.damaged:
            found = f"{len(self.damaged):,} parts of the log are damaged: {sorted(self.damaged)[0]}"
            checks.append(Check("log", "broken", "alert", found, "parts in Parquet"))
        if len(table):
            colours = [self._measure_colours(one) for one in (own, reference.table if reference else own.slice(0, 0))]
            checks.append(check_colours(colours[0], colours[1]))
        return [*checks, *self._check_model(len(own), len(table) - len(own))]

    def _check_model(self, served: int, others: int) -> list[Check]:
        alias, problem = None, ""
        try:
            alias = self.workspace.tracking.get_champion()
        except VisionLoopError as exc:
            problem = f"MLflow does not answer: {exc.found}"
        newest = require_entry(self.workspace.store, self.workspace.name)
        return check_model(
            age_days=(self.span.end - datetime.fromisoformat(self.entry.at)).total_seconds() / 86_400,
            max_age_days=self.section.max_model_age_days,
            served=served,
            others=others if datetime.fromisoformat(self.entry.at) < self.span.start else 0,
            version=newest.model_version,
            alias=alias,
            alias_problem=problem,
        )

    def _measure_colours(self, table: "pa.Table") -> FloatArray:
        """Return the mean colours (n, 3) of some images that were kept, from 0 to 255."""
        kept_n = np.flatnonzero(np.array([bool(one) for one in table["image_kept"].to_pylist()], bool))
        found = []
        for row in kept_n[pick_rows(len(kept_n), MAX_COLOURS, 0)]:
            picture = self._open_kept(table, int(row), COLOUR_PX)
            if picture is not None:
                found.append(np.asarray(picture, np.float64).reshape(-1, 3).mean(axis=0))
        return np.array(found).reshape(-1, 3)

    def _open_kept(self, table: "pa.Table", row: int, size_px: int) -> Any | None:
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

    def _compare_labels(self, known: Known) -> LabelledAccuracy:
        """Return the accuracy by the labels of the last days. A label may come any time after the answer."""
        first = self.span.end - timedelta(days=self.section.quality_days)
        table = _filter(self._read(Span(first, self.span.end)), self.entry.bundle)
        labels = read_feedback(self.workspace.store, self.workspace.name, first, None)
        self.damaged.update(labels.damaged)
        joined = join_feedback(table, labels.table)
        return compute_labelled_accuracy(
            _find_hits(joined, known.classes),
            np.array([one is not None for one in joined["feedback_labels"].to_pylist()], bool),
            get_numbers(joined, "keep_probability"),
            [one or "" for one in joined["keep_reason"].to_pylist()],
            number_blocks(joined, self.section.block_hours),
        )

    def _make_verdict(self, judged: Judged, facts: Facts, windows: Sequence[str]) -> Verdict:
        labelled = facts.labelled.accuracy
        return Verdict(
            name=self.workspace.name,
            window=self.span.name,
            start=self.span.start.isoformat(),
            end=self.span.end.isoformat(),
            verdict=judged.verdict,
            bundle=self.entry.bundle,
            entry=self.entry.number,
            num_images=facts.num_images,
            num_looked_at=len(facts.sample),
            reference=tuple(windows),
            p=judged.drift.p if judged.drift else None,
            level=self.section.level,
            expected_accuracy=judged.expected.value if judged.expected else None,
            expected_is_trusted=judged.trusted,
            labelled_accuracy=labelled.to_json() if labelled else None,
            num_labels=facts.labelled.num_labels,
            checks=tuple(asdict(check) for check in judged.checks),
            judged_at=self.now.isoformat(timespec="seconds"),
            damaged=tuple(sorted(self.damaged)),
        )

    def _write(self, verdict: Verdict, judged: Judged, facts: Facts, rows: _Rows) -> None:
        """Write all that came out; the verdict last."""
        farthest = [_tell_image(rows.table, row, distance) for row, distance in judged.farthest]
        pictures = {
            one["image_sha256"]: picture
            for one, (row, _) in zip(farthest, judged.farthest, strict=True)
            if (picture := self._open_kept(rows.table, row, PICTURE_PX)) is not None
        }
        shares = [
            {"name": one.name, "before": one.before, **{k: getattr(one.now, k) for k in ("value", "low", "high")}}
            for one in judged.shares
        ]
        page = Page(verdict, judged.shares, farthest, pictures, judged.expected, facts.labelled)
        folder, store = f"{_folder(self.workspace)}/{self.span.name}", self.workspace.store
        store.put(f"{folder}/checks.parquet", _encode(verdict.checks))
        store.put(f"{folder}/classes.parquet", _encode(shares))
        store.put(f"{folder}/images.parquet", _encode(farthest))
        store.put(f"{folder}/report.html", make_monitor_report(page).encode())
        store.put(f"{folder}/verdict.json", canonical_json(verdict.to_json()))


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


def _find_champion(workspace: Workspace, span: Span) -> LedgerEntry:
    """Return the entry that was the champion's when the window ended. Raises PromotionError: there was none."""
    before = [e for e in read_history(workspace.store, workspace.name) if datetime.fromisoformat(e.at) < span.end]
    return before[-1] if before else require_entry(workspace.store, workspace.name)


def _filter(table: "pa.Table", digest: str) -> "pa.Table":
    import pyarrow.compute as pc

    return table.filter(pc.equal(table["model_digest"], digest))


def _join(several: Sequence[_Rows]) -> _Rows | None:
    import pyarrow as pa

    if not several:
        return None
    parts = [one.embedding_nd for one in several if len(one.table)]
    whole = all(part is not None for part in parts) and len({part.shape[1] for part in parts if part is not None}) == 1
    joined = np.concatenate([part for part in parts if part is not None]) if whole else None
    return _Rows(pa.concat_tables([one.table for one in several]), joined)


def _find_hits(joined: "pa.Table", classes: Sequence[str]) -> BoolArray:
    """Say which answers are what was said of their image later; False where nothing was said."""
    chosen_nk = find_chosen(joined, classes)
    hits = []
    for row_k, labels in zip(chosen_nk, joined["feedback_labels"].to_pylist(), strict=True):
        answered = {classes[int(k)] for k in np.flatnonzero(row_k)}
        hits.append(labels is not None and answered == set(labels))
    return np.array(hits, bool)


def _tell_image(table: "pa.Table", row: int, distance: float) -> dict[str, Any]:
    names = ("request_id", "time", "client", "image_sha256", "prediction", "confidence", "abstained")
    return {**{name: table[name][row].as_py() for name in names}, "distance": distance}


def _encode(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())
