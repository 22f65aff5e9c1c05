"""A workspace, the log of its server with kept images, and feedback on it: for tests of `visionloop review`."""

import csv
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import make_image, write_photos
from pull_desk import PullDesk
from visionloop.data.manifest import latest_version
from visionloop.data.parts import load_version_records
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

    def serve(
        self, number: int, first: int = 5000, hours_ago: float = 1.0, images: Sequence[bytes] = ()
    ) -> list[dict[str, Any]]:
        """Log answers: the model says cat to all, and is unsure of every other one; half is kept by lot."""
        rng, now = np.random.default_rng(first), datetime.now(UTC) - timedelta(hours=hours_ago)
        rows = []
        for place in range(number):
            data = images[place] if images else make_image(first + place)
            time = now + timedelta(seconds=place)
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

    def say(
        self, rows: list[dict[str, Any]], label: str, *, who: str | None, client: str = "gate", days_ago: int = 0
    ) -> None:
        """Send feedback on answers."""
        now = datetime.now(UTC) - timedelta(days=days_ago)
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


def make_review_desk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ReviewDesk:
    """Make it with 40 photos in its dataset."""
    desk = ReviewDesk(folder, monkeypatch, capsys)
    write_photos(desk.photos, 20)
    desk.write(SOURCES)
    desk.run("ingest")
    return desk
