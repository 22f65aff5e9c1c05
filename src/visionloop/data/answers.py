"""What people are asked about images, and what they say, for all machines of a store.

review/NAME/batches/000001.json      images that people are asked about (Batch)
answers/NAME/date=.../*.parquet      a row for each answer (ANSWERS); the newest of a person on an image counts

What is said is no label by itself: see `acceptance.py`.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, Self

from visionloop.data.day_table import IMAGE, DayReader, DayTable
from visionloop.data.manifest import make_image_key
from visionloop.data.prediction_log import PREDICTIONS, read_feedback, read_kept_image, read_request_time
from visionloop.errors import DatasetError, StoreError
from visionloop.records import Record, canonical_json
from visionloop.store import ObjectStore
from visionloop.store.keys import make_number_key, split_numbers

ANSWERS = DayTable(
    "answers",
    {
        "answer_id": "text",
        "time": "time",
        "batch": "int",
        IMAGE: "text",
        "verdict": "text",  # label, skip, not_ours, or undo: the person takes the answer before back
        "labels": "texts",  # of the verdict `label`
        "who": "text",
        "via": "text",  # page or csv
    },
)
LABEL, SKIP, NOT_OURS, UNDO = "label", "skip", "not_ours", "undo"
VERDICTS = (LABEL, SKIP, NOT_OURS, UNDO)
LOG, SUSPECTS, FEEDBACK_KIND = "log", "suspects", "feedback"
RANDOM = "random"
MAX_WHO_CHARS = 100
ANSWERED_AFTER = timedelta(hours=1)  # no request takes longer
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Asked(Record):
    """An image that people are asked about. `model`: what the model answered; of a suspect the label that it has.

    The server kept it under `day`; "": the dataset has it. `reason`: uncertain, novel, spread, random, or
    suspect.
    `probability`: with which an image of the traffic comes into the random share; None for the others. `proposed`: what
    the neighbours of a suspect say. `similar`: labelled images that are like it, the nearest first.
    """

    sha256: str
    day: str
    request_id: str
    model: Labels
    confidence: float
    reason: str
    probability: float | None = None
    proposed: Labels = ()
    similar: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Batch(Record):
    """Images that people are asked about. `kind`: log, or suspects. `until`: the log was looked at so far."""

    number: int
    kind: str
    at: str
    by: str
    task: str
    classes: Labels
    images: tuple[Asked, ...]
    until: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build a batch from a decoded JSON object."""
        batch = super().from_json(value)
        return replace(batch, images=tuple(Asked.from_json(one) for one in value["images"]))


@dataclass(frozen=True)
class Opinion:
    """What one giver says of an image, the newest. `who` is "" for feedback without a name; `client` its key."""

    asked: Asked
    verdict: str
    labels: Labels
    who: str
    kind: str
    time: datetime
    client: str | None = None

    @property
    def is_echo(self) -> bool:
        """It repeats the model's answer, and nobody stands for it."""
        return not self.who and self.labels == self.asked.model

    @property
    def giver(self) -> str:
        """Who says it, in words."""
        return self.who if self.kind != FEEDBACK_KIND else f"{self.who or 'nobody'} by {self.client or 'no key'}"


def load_batches(store: ObjectStore, name: str) -> list[Batch]:
    """Return all batches, the oldest first. Raises DatasetError, StoreError."""
    return [Batch.from_json(value) for value in load_numbered(store, f"review/{name}/batches", Batch.from_json)]


def create_batch(store: ObjectStore, name: str, batch: Batch) -> bool:
    """Write a batch under its number; False if another one has it. Raises StoreError."""
    key = make_number_key(f"review/{name}/batches", batch.number)
    return store.create(key, canonical_json(batch.to_json()))


def write_answers(
    store: ObjectStore, name: str, batch: Batch, answers: Mapping[str, tuple[str, Labels]], *, by: str, via: str
) -> None:
    """Write answers, sha256 -> verdict and labels; when it returns they are in the store, and their images stay.

    Raises:
        ObjectMissing: an image is gone, so that a label would be of nothing.
        StoreError: the store cannot be written.
    """
    now, asked = datetime.now(UTC), {one.sha256: one for one in batch.images}
    for sha256, (verdict, _) in answers.items():
        if verdict == LABEL:
            keep_image(store, name, asked[sha256])
    rows = [
        {
            "answer_id": secrets.token_hex(8),
            "time": now,
            "batch": batch.number,
            IMAGE: sha256,
            "verdict": verdict,
            "labels": list(labels),
            "who": by,
            "via": via,
        }
        for sha256, (verdict, labels) in answers.items()
    ]
    key = ANSWERS.make_key(name, now.date(), f"{now:%H%M%S}-{secrets.token_hex(6)}")
    if rows and not store.create(key, ANSWERS.encode(rows)):
        raise StoreError("store", f"has another {key}", "a free key", "Send it again.")


def keep_image(store: ObjectStore, name: str, asked: Asked) -> None:
    """Put an image that a server kept among those of the datasets, where it does not expire. Raises ObjectMissing."""
    key = make_image_key(asked.sha256)
    if not store.exists(key):
        store.add(key, read_asked(store, name, asked))


def read_asked(store: ObjectStore, name: str, asked: Asked) -> bytes:
    """Return the bytes of an image that people are asked about. Raises ObjectMissing: it expired, or was forgotten."""
    if not asked.day:
        return store.get(make_image_key(asked.sha256))
    return read_kept_image(store, name, date.fromisoformat(asked.day), asked.sha256)


def load_opinions(store: ObjectStore, name: str, batches: Sequence[Batch] | None = None) -> list[Opinion]:
    """Return the newest answer of each person on each image, the oldest first: of those who were asked.

    Raises:
        StoreError, DatasetError: the store cannot be read, or a batch is damaged.
    """
    import pyarrow as pa

    batches = load_batches(store, name) if batches is None else batches
    facts = {(batch.number, one.sha256): (one, batch.kind) for batch in batches for one in batch.images}
    parts = [*DayReader(ANSWERS, store, name).read()]
    rows = pa.concat_tables([ANSWERS.make_schema().empty_table(), *parts])
    newest: dict[tuple[str, str], Opinion] = {}
    for row in rows.sort_by([("time", "ascending"), ("answer_id", "ascending")]).to_pylist():
        asked, kind = facts.get((row["batch"], row[IMAGE]), (None, ""))
        if asked is None or not row["who"] or row["verdict"] not in VERDICTS:
            continue  # forgotten since, or nothing of ours
        labels = tuple(sorted(row["labels"] or ()))
        newest.pop((asked.sha256, row["who"]), None)
        newest[asked.sha256, row["who"]] = Opinion(asked, row["verdict"], labels, row["who"], kind, row["time"])
    return [*newest.values()]


def load_feedback_opinions(store: ObjectStore, name: str, since: datetime | None = None) -> list[Opinion]:
    """Return what clients say of images that a server kept: the newest of each name and key, the oldest first.

    `since`: of that which came later alone.

    Raises:
        StoreError: the store cannot be read.
    """
    said = read_feedback(store, name, since).table.to_pylist()
    answers = _find_answered(store, name, {row["request_id"] for row in said})
    newest: dict[tuple[str, str, str], Opinion] = {}
    for row in said:
        asked = answers.get(row["request_id"])
        if asked is None or not row["labels"]:
            continue
        who, client = row["who"] or "", row["client"]
        key = (asked.sha256, client or "", who)
        newest.pop(key, None)
        labels = tuple(sorted(row["labels"]))
        newest[key] = Opinion(asked, LABEL, labels, who, FEEDBACK_KIND, row["time"], client)
    return [*newest.values()]


def _find_answered(store: ObjectStore, name: str, request_ids: set[str]) -> dict[str, Asked]:
    """Return the answers with these ids whose images were kept."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not request_ids:
        return {}
    wanted = pa.array(sorted(request_ids), pa.string())
    columns = ["request_id", "time", IMAGE, "prediction", "labels", "confidence", "image_kept"]
    times = [time for one in request_ids if (time := read_request_time(one))]
    days = {(time + late).date() for time in times for late in (timedelta(), ANSWERED_AFTER)}
    found = {}
    for day in sorted(days):  # a part is read whole, and most days have no feedback
        start = datetime(day.year, day.month, day.day, tzinfo=UTC)
        for part in DayReader(PREDICTIONS, store, name).read(start, start + timedelta(days=1), columns):
            is_wanted = pc.and_kleene(part["image_kept"], pc.is_in(part["request_id"], value_set=wanted))
            for row in part.filter(is_wanted).to_pylist():
                found[row["request_id"]] = make_asked(row, FEEDBACK_KIND)
    return found


def make_asked(row: Mapping[str, Any], reason: str, probability: float | None = None) -> Asked:
    """Return a row of the prediction log as an image that people are asked about."""
    model = [row["prediction"]] if row["labels"] is None else row["labels"]
    return Asked(
        sha256=row[IMAGE],
        day=row["time"].date().isoformat(),
        request_id=row["request_id"],
        model=tuple(sorted(one for one in model if one)),
        confidence=round(float(row["confidence"] or 0.0), 4),
        reason=reason,
        probability=probability,
    )


def load_numbered(store: ObjectStore, folder: str, read: Callable[[Mapping[str, Any]], object]) -> Iterator[Any]:
    """Yield the numbered objects of a folder, decoded, the oldest first. Raises DatasetError for a damaged one."""
    for number in split_numbers(store.list(f"{folder}/"), folder)[0]:
        key = make_number_key(folder, number)
        try:
            value = json.loads(store.get(key))
            read(value)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            todo = "Restore it from the store's backup, or remove it."
            raise DatasetError(f"store object {key}", "is damaged", "what `visionloop review` writes", todo) from exc
        yield value


def drop_asked(value: Any, sha256s: frozenset[str]) -> Any:
    """Return a decoded batch or acceptance without some images. For `forget`."""
    if isinstance(value, dict):
        return {name: drop_asked(one, sha256s) for name, one in value.items()}
    if isinstance(value, list):
        kept = [one for one in value if not (isinstance(one, dict) and one.get("sha256") in sha256s)]
        return [drop_asked(one, sha256s) for one in kept]
    return value
