"""From served answers to the next version: the log, a batch, answers of people and of clients, what is accepted."""

import csv
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import make_image, write_photos
from pull_desk import PullDesk
from visionloop.data.answers import LOG, load_batches
from visionloop.data.manifest import latest_version, load_version_records
from visionloop.data.prediction_log import FEEDBACK, PREDICTIONS, make_kept_key, make_request_id
from visionloop.records import ImageRecord

NAME = "pets"
SOURCES = """  sources:
    - {kind: folder, path: ../photos, name: photos}
    - {kind: review}
    - {kind: feedback}
"""
SIZE = 16


class ReviewDesk(PullDesk):
    """A workspace with a dataset of cats and dogs, and a log of kept images, whose truth is by their number."""

    def serve(self, number: int, first: int = 5000, hours_ago: float = 1.0) -> list[dict[str, Any]]:
        """Log answers: the model says cat to all, and is unsure of every other one; half is kept by lot."""
        rng, now = np.random.default_rng(first), datetime.now(UTC) - timedelta(hours=hours_ago)
        rows = []
        for place in range(number):
            data, time = make_image(first + place), now + timedelta(seconds=place)
            sha256 = hashlib.sha256(data).hexdigest()
            self.store.put(make_kept_key(NAME, time.date(), sha256), data)
            rows.append(
                {
                    "request_id": make_request_id(time.timestamp()),
                    "time": time,
                    "client": "gate",
                    "image_sha256": sha256,
                    "model_name": NAME,
                    "model_digest": "d" * 64,
                    "task": "binary",
                    "classes": ["cat", "dog"],
                    "probs": [0.6, 0.4],
                    "prediction": "cat",
                    "confidence": 0.55 if place % 2 else 0.99,
                    "abstained": False,
                    "embedding": rng.normal(size=SIZE).tolist(),
                    "image_kept": True,
                    "keep_probability": 1.0 if place % 2 else 0.5,
                    "keep_reason": "confidence" if place % 2 else "random",
                }
            )
        part = f"part-{first}"
        self.store.put(PREDICTIONS.make_key(NAME, now.date(), part), PREDICTIONS.encode(rows))
        return rows

    def say(self, rows: list[dict[str, Any]], label: str, *, who: str | None, client: str = "gate") -> None:
        """Send feedback on answers."""
        now = datetime.now(UTC)
        given = [
            {
                "feedback_id": f"{place}",
                "request_id": row["request_id"],
                "time": now + timedelta(microseconds=place),
                "labels": [label],
                "is_new": False,
                "who": who,
                "client": client,
            }
            for place, row in enumerate(rows)
        ]
        key = FEEDBACK.make_key(NAME, now.date(), make_request_id(now.timestamp()))
        self.store.put(key, FEEDBACK.encode(given))

    def fill(self, path: Path, labels: dict[str, str]) -> None:
        """Write labels into a CSV, by sha256."""
        rows = [*csv.reader(path.open(newline=""))]
        for row in rows[1:]:
            row[5] = labels.get(row[0], "")
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    def by_sha256(self) -> dict[str, ImageRecord]:
        version = latest_version(self.store, NAME)
        assert version is not None
        return {row.sha256: row for row in load_version_records(self.store, version)}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ReviewDesk:
    desk = ReviewDesk(tmp_path, monkeypatch, capsys)
    write_photos(desk.photos, 20)
    desk.write(SOURCES)
    desk.run("ingest")
    return desk


def test_answers_of_a_csv_make_the_next_version_with_the_right_sides(desk: ReviewDesk) -> None:
    """Only what was drawn by lot may come into test; its probability, and who said it, stand in its origin."""
    desk.write(SOURCES + "review: {count: 40, random: 0.5}\n")
    desk.serve(120)
    told = desk.run("review", "--csv", "ask.csv")
    assert "batch 1 of" in told and "20 random" in told
    batch = load_batches(desk.store, NAME)[0]
    assert (batch.kind, len(batch.images), batch.classes) == (LOG, 40, ("cat", "dog"))
    asked = {one.sha256: one for one in batch.images}
    # 60 unsure images were kept for certain, 60 others with one half: all are drawn as 20 of 180 images of the traffic.
    assert {round(one.probability, 6) for one in batch.images if one.probability} == {round(20 / 180, 6)}
    assert len([*(desk.home / "ask").iterdir()]) == 40
    desk.fill(desk.home / "ask.csv", dict.fromkeys(asked, "dog"))
    assert "40 answers of ann are stored" in desk.run("review", "--take", "ask.csv", "--by", "ann")
    assert "0 answers of ann are stored, 40 were known" in desk.run("review", "--take", "ask.csv", "--by", "ann")
    before = desk.by_sha256()
    assert "no label is accepted yet" in desk.run("ingest")
    assert desk.by_sha256() == before

    assert "40 labels wait" in desk.run("review")
    assert "accepted: 40 labels (40 by ann)" in desk.run("review", "--accept")
    desk.run("ingest")
    new = {sha256: row for sha256, row in desk.by_sha256().items() if sha256 not in before}
    assert new.keys() == asked.keys() and {row.labels for row in new.values()} == {("dog",)}
    sides = {
        kind: {row.side for s, row in new.items() if (asked[s].reason == "random") == kind} for kind in (True, False)
    }
    assert sides[True] >= {"train", "test"} and sides[False] <= {"train", "val"}
    for sha256, row in new.items():
        one = asked[sha256]
        reason = f"random@{one.probability:.4g}" if one.reason == "random" else one.reason
        assert row.origins == (f"review:ann/{reason}/{sha256[:16]}",)
        assert row.sources == ("review",)
    assert "nothing" in desk.run("ingest")
