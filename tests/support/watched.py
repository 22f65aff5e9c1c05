"""A workspace whose champion answers traffic, and its prediction log, day by day: for tests of monitoring.

Embeddings are drawn, not computed: what a network makes of photos is in `traffic.py`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from fakes import make_bundle, make_image
from memory_tracking import MemoryTracking
from visionloop.bundle import load_bundle, seal_bundle, upload_bundle
from visionloop.data.answers import Batch, create_batch, make_asked
from visionloop.data.prediction_log import FEEDBACK, PREDICTIONS, make_kept_key
from visionloop.monitoring.judge import Verdict
from visionloop.monitoring.triggers import TriggerDecision
from visionloop.monitoring.watch import watch_window
from visionloop.params import make_params
from visionloop.promotion.ledger import store_decision
from visionloop.records import Decision, LedgerEntry, RuleResult, canonical_json
from visionloop.store import LocalStore
from visionloop.store.lease import Claim
from visionloop.workspace import Workspace, connect
from workspaces import build, make_settings, store_image

FIRST = date(2026, 3, 2)
CLASSES = ("ant", "bee", "<b>cat</b>")
SIZE = 48
HOURS, PER_HOUR = 24, 8
CLIENTS = ("gate", "yard", "roof")


@dataclass
class Watched:
    """The place, its bundle's digest, and the days that were written."""

    place: Workspace
    digest: str
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def write_day(self, number: int, **change: Any) -> list[dict[str, Any]]:
        """Log a day of traffic; `change` replaces columns (a value, or a list), `shift` moves the embeddings."""
        shift, per_hour = change.pop("shift", 0.0), change.pop("per_hour", PER_HOUR)
        rows, day = [], FIRST + timedelta(days=number)
        for hour in range(HOURS):
            centre_d = self.rng.normal(0, 0.3, SIZE) + shift
            for place in range(per_hour):
                embedding_d = centre_d + self.rng.normal(size=SIZE)
                time = datetime(day.year, day.month, day.day, hour, place % 60, tzinfo=UTC)
                rows.append(self._make_row(f"{number:03d}-{hour:02d}-{place:03d}", time, embedding_d))
        for name, value in change.items():
            for place, row in enumerate(rows):
                row[name] = value[place] if isinstance(value, list) else value
        self.write_rows(day, rows)
        return rows

    def _make_row(self, request_id: str, time: datetime, embedding_d: np.ndarray) -> dict[str, Any]:
        logits_k = 2 * embedding_d[: len(CLASSES)]
        probs_k = np.exp(logits_k) / np.exp(logits_k).sum()
        return {
            "request_id": request_id,
            "time": time,
            "client": CLIENTS[int(self.rng.integers(len(CLIENTS)))],
            "image_sha256": hashlib.sha256(request_id.encode()).hexdigest(),
            "model_name": "fake",
            "model_version": "1",
            "model_digest": self.digest,
            "task": "multiclass",
            "classes": list(CLASSES),
            "probs": probs_k.tolist(),
            "prediction": CLASSES[int(probs_k.argmax())],
            "confidence": float(probs_k.max()),
            "abstained": bool(probs_k.max() < 0.4),
            "embedding": embedding_d.tolist(),
            "total_ms": 20.0,
            "cached": False,
            "brightness": 0.5 + 0.05 * embedding_d[5],
            "contrast": 0.2 + 0.01 * embedding_d[6],
            "sharpness": 0.01 + 0.001 * embedding_d[7],
            "width": 640,
            "height": 480,
            "num_bytes": 1000,
            "image_kept": False,
        }

    def write_rows(self, day: date, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put rows into the log as one part of a day, in place of the one there."""
        self.place.store.put(PREDICTIONS.make_key("fake", day, "part"), PREDICTIONS.encode(rows))

    def keep(self, number: int, rows: Sequence[dict[str, Any]], probability: float, *, swap: bool = False) -> None:
        """Keep the images of some rows of a day, reddish ones, or with red and blue swapped."""
        day = FIRST + timedelta(days=number)
        for place, row in enumerate(rows):
            data = _make_reddish(place, swap=swap)
            row |= {"image_kept": True, "keep_probability": probability, "keep_reason": "random"}
            row["image_sha256"] = hashlib.sha256(data).hexdigest()
            self.place.store.put(make_kept_key("fake", day, row["image_sha256"]), data)

    def label(self, number: int, answers: Mapping[str, str]) -> None:
        """Log feedback of a day: request id -> label."""
        day = FIRST + timedelta(days=number)
        time = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
        rows = [
            {"feedback_id": f"f-{one}", "request_id": one, "time": time, "labels": [label], "is_new": False}
            for one, label in answers.items()
        ]
        self.place.store.put(FEEDBACK.make_key("fake", day, "part"), FEEDBACK.encode(rows))


def at_end_of(number: int) -> datetime:
    """Return a time shortly after a day is over."""
    return datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC) + timedelta(days=number + 1, hours=1)


def watch(watched: Watched, number: int, *, again: bool = False) -> Verdict:
    """Judge a day shortly after it is over."""
    return watch_window(watched.place, now=at_end_of(number), again=again)[0]


def find_check(verdict: Verdict, name: str) -> dict[str, Any]:
    return next(check for check in verdict.checks if check["name"] == name)


def make_watched(home: Path, **monitor: Any) -> Watched:
    """Make a workspace with a champion, promoted before the first day, and no traffic."""
    settings, store, tracking = make_settings(home), LocalStore(home / "store"), MemoryTracking()
    params = make_params({"name": "fake", "monitor": {"false_alarm_days": 100, **monitor}})
    digest = _make_champion(home / "bundle", store)
    entry = LedgerEntry("fake", 1, "promote", digest, None, "1", None, {}, None, "ann", "first", "2026-03-01T00:00:00Z")
    store.create("ledger/fake/000001.json", canonical_json(entry.to_json()))
    tracking.champion = "1"
    return Watched(connect(settings, params, store=store, tracking=tracking), digest)


def _make_champion(folder: Path, store: LocalStore) -> str:
    make_bundle(folder, classes=CLASSES)
    rng, number = np.random.default_rng(1), 240
    embedding_nd = rng.normal(0, np.sqrt(1.09), (number, SIZE)).astype(np.float32)
    logits_nk = 2 * embedding_nd[:, : len(CLASSES)]
    right_n = rng.random(number) < 0.9
    label_n = np.where(right_n, logits_nk.argmax(axis=1), (logits_nk.argmax(axis=1) + 1) % len(CLASSES))
    np.savez(folder / "reference.npz", embedding_nd=embedding_nd, logits_nk=logits_nk, label_n=label_n)
    seal_bundle(folder)
    bundle = load_bundle(folder)
    upload_bundle(store, bundle)
    return bundle.digest


def _make_reddish(seed: int, *, swap: bool) -> bytes:
    import io

    from PIL import Image

    picture = np.asarray(Image.open(io.BytesIO(make_image(seed)))).astype(np.float64) * np.array([1.0, 0.8, 0.6])
    picture = picture[..., ::-1] if swap else picture
    sink = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def make_whole_loop(home: Path) -> Watched:
    """Make a loop in which all has happened: a dataset, two decisions, a day whose labels say that the model is bad,
    an alert that nobody took, images that wait for a label, a retrain that the triggers want and one under way.
    """
    watched = make_watched(home, webhook={"url": "http://127.0.0.1:9/hook", "tries": 1, "timeout_s": 0.1})
    place, store, at = watched.place, watched.place.store, datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC)
    records = [store_image(store, seed, labels=(CLASSES[seed % 3],)) for seed in range(12)]
    watched.place = replace(
        build(place.settings, place.params, store, records, prepared=False), tracking=place.tracking
    )
    for number, verdict in ((1, "passed"), (2, "refused")):
        store_decision(store, make_decision(number, verdict, (at + timedelta(hours=number)).isoformat()))
    rows = watched.write_day(0)
    watched.keep(0, rows[:150], 0.5)
    watched.write_rows(FIRST, rows)
    wrong = {row["request_id"]: CLASSES[0] if row["prediction"] != CLASSES[0] else CLASSES[1] for row in rows[:40]}
    watched.label(0, wrong | {row["request_id"]: row["prediction"] for row in rows[40:80]})
    watch(watched, 0)
    asked = tuple(make_asked({**row, "labels": None}, "spread") for row in rows[:5])
    batch = Batch(1, "log", (at + timedelta(days=1)).isoformat(), "ann", "multiclass", CLASSES, asked)
    assert create_batch(store, "fake", batch)
    wanted = TriggerDecision("fake", 1, (at + timedelta(days=1)).isoformat(), "retrain", "quality", (), 1, 2, "flow")
    store.put("triggers/fake/000001.json", canonical_json(wanted.to_json()))
    claim = Claim(1, "t", "ann", "box", 7, machine="another", started_at=(at + timedelta(days=1)).isoformat())
    store.put("leases/fake/000001.json", canonical_json(claim.to_json()))
    return watched


def make_decision(number: int, verdict: str, at: str) -> Decision:
    metrics: dict[str, dict[str, float | None]] = {"accuracy": {"value": 0.9 - number / 100, "low": 0.8, "high": 0.95}}
    return Decision(
        name="fake",
        number=number,
        verdict=verdict,
        candidate=str(number) * 64,
        champion=None,
        test_digest="t",
        num_test=40,
        rules=(RuleResult("better", verdict == "passed", "equal to the champion", "a gain"),),
        metrics=metrics,
        champion_metrics={},
        state={"try": str(number)},
        dataset={"version": 1},
        run_id=None,
        decided_at=at,
    )
