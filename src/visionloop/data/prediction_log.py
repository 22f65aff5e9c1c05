"""What servers write down: each answer, what people said of it, and the images that were kept. Read by monitoring.

predictions/NAME/date=.../*.parquet    one row for each answered image (PREDICTIONS)
feedback/NAME/date=.../*.parquet       one row for each label that somebody gave an answer (FEEDBACK)
requests/NAME/date=.../*.parquet       how many requests a server had in some minutes, and refused (REQUESTS)
kept/NAME/date=.../<sha256>            the bytes of the images that the server kept, under the day of the answer
shadow/NAME/current.json               a second model that answers a share of the same requests for itself alone, since
                                       when (Order): all servers of the name follow it
shadow/NAME/date=.../*.parquet         one row for each image that it answered (SHADOW)

Rows are joined by `request_id`, which begins with the time of the request. Days are those of UTC.
"""

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from visionloop.data.day_table import IMAGE, DayReader, DayTable, drop_images, encode_table, expire
from visionloop.data.manifest import make_image_key
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import DatasetError, ObjectMissing

if TYPE_CHECKING:
    import pyarrow as pa

    from visionloop.store import ObjectStore


SHADOW = DayTable(
    "shadow",
    {
        "request_id": "text",  # of the answer that the client got
        "time": "time",  # of that answer
        "model_digest": "text",  # of the shadow
        "prediction": "text",  # null: it failed
        "confidence": "double",
        "network_ms": "double",  # for this image alone
        "problem": "text",  # why it failed
    },
)


@dataclass(frozen=True)
class Order:
    """What somebody asked for: the bundle, the share of the answered images, when, who, and the address they typed."""

    bundle: str
    share: float
    started_at: str
    by: str
    model: str
    stopped_at: str | None = None


def read_order(store: "ObjectStore", name: str) -> Order | None:
    """Return the newest order, also a stopped one; None: there was none. Raises DatasetError, StoreError."""
    key = _make_key(name)
    try:
        order = Order(**json.loads(store.get(key)))
        datetime.fromisoformat(order.started_at)
        if not isinstance(order.bundle, str) or not 0 < order.share <= 1:
            raise ValueError(f"share {order.share}")
    except ObjectMissing:
        return None
    except (ValueError, TypeError) as exc:
        raise DatasetError(key, "is damaged", "an order for a shadow", "Run `visionloop shadow start` anew.") from exc
    return order


def write_order(store: "ObjectStore", name: str, order: Order) -> None:
    """Put an order in the place of the one before. Raises StoreError."""
    store.put(_make_key(name), json.dumps(asdict(order), sort_keys=True).encode())


def read_shadow(store: "ObjectStore", name: str, order: Order) -> "pa.Table":
    """Return what the shadow of an order answered since its start. Raises StoreError."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = DayReader(SHADOW, store, name).read(datetime.fromisoformat(order.started_at))
    rows = pa.concat_tables([SHADOW.make_schema().empty_table(), *parts])
    return rows.filter(pc.equal(rows["model_digest"], order.bundle))


def _make_key(name: str) -> str:
    return f"{SHADOW.kind}/{name}/current.json"


PREDICTIONS = DayTable(
    "predictions",
    {
        "request_id": "text",  # of this image; in a request of several files the so-many-th ends with .0, .1, ...
        "time": "time",  # of the answer
        "client_request_id": "text",  # the client's own X-Request-ID
        "client": "text",  # the name of its key; null where the server has no keys
        "image_sha256": "text",
        "model_name": "text",
        "model_version": "text",  # null for a bundle that is served by its path
        "model_digest": "text",
        "model_engine": "text",  # a runtime and a precision; null in parts from before it was noted
        "task": "text",  # binary, multiclass or multilabel
        "classes": "texts",  # the likeliest, the likeliest first: at most `serve.log_top_k`
        "probs": "floats",  # theirs
        "prediction": "text",  # several labels are joined by |
        "labels": "texts",  # the labels given, of a multilabel model; else null
        "confidence": "float",
        "abstained": "bool",
        "abstain_reason": "text",
        "distance": "float",  # to the validation images; null where the card has no rule for it
        "embedding": "floats",  # rounded to 11 significant bits; null where `serve.log_embeddings` left it out
        "queue_ms": "float",
        "decode_ms": "float",
        "network_ms": "float",
        "total_ms": "float",  # of the whole request
        "cached": "bool",  # the answer was known from the same image
        "brightness": "float",  # mean of the grey values, 0 to 1, at the size that the network sees
        "contrast": "float",  # their standard deviation
        "sharpness": "float",  # the variance of their Laplacian
        "width": "int",
        "height": "int",
        "num_bytes": "int",
        "image_kept": "bool",
        "keep_probability": "double",  # with which it was kept, 0 to 1; null: it was to be kept, and was lost
        "keep_reason": "text",  # which of confidence, novel, random speak for it, joined by |; null: none
    },
)
FEEDBACK = DayTable(
    "feedback",
    {
        "feedback_id": "text",
        "request_id": "text",
        "time": "time",  # when the server took it
        "labels": "texts",  # what the image shows; one, but for multilabel
        "is_new": "bool",  # one of them is no class of the model that served then
        "who": "text",  # who labelled it, as the client says
        "client": "text",  # the name of its key
    },
)
REQUESTS = DayTable(
    "requests",
    {
        "time": "time",  # when it was written: the end of what is counted
        "server": "text",  # a process
        "requests": "int",  # for an answer, whatever came of them
        "refused": "int",  # by 429 or 503
        "errors": "int",  # by another 5xx
    },
)
KEPT = "kept"
TIME_DIGITS, RANDOM_DIGITS = 11, 13
_REQUEST_ID = re.compile(rf"([0-9a-f]{{{TIME_DIGITS}}})[0-9a-f]{{{RANDOM_DIGITS}}}(\.[0-9]{{1,5}})?")
KEPT_BITS = np.uint32(0xFFFFE000)  # of a float32: 10 bits of the mantissa behind its leading one


def make_request_id(now_s: float) -> str:
    """Return a new id: 11 hex digits of the time in milliseconds, then 52 random bits."""
    return f"{int(now_s * 1000):0{TIME_DIGITS}x}{secrets.token_hex(7)[:RANDOM_DIGITS]}"


def read_request_time(request_id: str) -> datetime | None:
    """Return when the request of this id came; None if it is no id of ours."""
    match = _REQUEST_ID.fullmatch(request_id)
    return datetime.fromtimestamp(int(match[1], 16) / 1000, UTC) if match else None


def make_kept_key(name: str, day: date, sha256: str) -> str:
    """Return the store key of an image that a server kept."""
    return f"{KEPT}/{name}/date={day.isoformat()}/{sha256}"


def read_kept_image(store: "ObjectStore", name: str, day: date, sha256: str) -> bytes:
    """Return the bytes of an image whose row says that it was kept: of its day, or those that a dataset has.

    Raises:
        ObjectMissing: it is not there any more.
    """
    try:
        return store.get(make_kept_key(name, day, sha256))
    except ObjectMissing:
        return store.get(make_image_key(sha256))


def round_embedding(embedding_d: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32 numbers of which only 11 significant bits are left: they take half of the space in a file."""
    bits = np.ascontiguousarray(embedding_d, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & KEPT_BITS).view(np.float32)
    return np.where(np.isfinite(rounded), rounded, embedding_d)


@dataclass(frozen=True)
class Rows:
    """What was read: the rows, and the keys of the parts that are damaged and were passed over."""

    table: "pa.Table"
    damaged: tuple[str, ...]


def read_predictions(
    store: "ObjectStore",
    name: str,
    since: datetime | None = None,
    until: datetime | None = None,
    columns: Sequence[str] | None = None,
) -> Rows:
    """Return the answers of a window of time, `until` not with it, in the order of the parts.

    Ask for the columns that you need: embeddings are nine tenths of the bytes.

    Raises:
        StoreError: the store cannot be read.
    """
    return _read(DayReader(PREDICTIONS, store, name), since, until, columns)


def read_feedback(
    store: "ObjectStore", name: str, since: datetime | None = None, until: datetime | None = None
) -> Rows:
    """Return all feedback that came in a window of time, the oldest first: a correction is a row of its own.

    Raises:
        StoreError: the store cannot be read.
    """
    rows = _read(DayReader(FEEDBACK, store, name), since, until, None)
    return Rows(rows.table.sort_by([("time", "ascending"), ("feedback_id", "ascending")]), rows.damaged)


def join_feedback(predictions: "pa.Table", feedback: "pa.Table") -> "pa.Table":
    """Return the predictions with the newest feedback on each: `feedback_labels`, `feedback_time`, `feedback_who`.

    They are null where nobody said anything. Feedback on an answer that is not among the predictions is left out.
    """
    import pyarrow as pa

    newest: dict[str, int] = {}
    for row, request_id in enumerate(feedback["request_id"].to_pylist()):
        newest[request_id] = row
    rows = pa.array([newest.get(one) for one in predictions["request_id"].to_pylist()], pa.int64())
    for column in ("labels", "time", "who"):
        predictions = predictions.append_column(f"feedback_{column}", feedback[column].take(rows))
    return predictions


def is_logged(store: "ObjectStore", name: str, sha256: str) -> bool:
    """Say whether a row of the log is of this image."""
    parts = DayReader(PREDICTIONS, store, name).read(columns=[IMAGE])
    return any(len(drop_images(rows, frozenset({sha256}))) < len(rows) for rows in parts)


def find_log_parts(store: "ObjectStore", name: str, sha256s: frozenset[str]) -> list[str]:
    """Return the keys of the parts of the log that hold one of the images, or cannot be read. For `forget`."""
    return DayReader(PREDICTIONS, store, name).find_parts(sha256s)


def remove_from_log(store: "ObjectStore", name: str, parts: Iterable[str], sha256s: frozenset[str]) -> None:
    """Take images out of parts of the log for good. For `forget`. Raises StoreError."""
    DayReader(PREDICTIONS, store, name).remove_rows(parts, sha256s)


def drop_forgotten(data: bytes, sha256s: frozenset[str]) -> tuple[bytes, int]:
    """Return a part of the log without the rows of forgotten images, and how many rows it has.

    Raises:
        DatasetError: it is damaged.
    """
    where = "part of the prediction log"
    images = PREDICTIONS.decode(data, where, [IMAGE])[IMAGE].to_pylist()  # one column: the others are large
    if sha256s.isdisjoint(images):
        return data, len(images)
    kept = drop_images(PREDICTIONS.decode(data, where), sha256s)
    return encode_table(kept), len(kept)


@dataclass(frozen=True)
class RequestCounts:
    """Requests for an answer that servers had in a window of time."""

    total: int
    refused: int
    errors: int


def read_requests(store: "ObjectStore", name: str, since: datetime, until: datetime) -> RequestCounts | None:
    """Return how many requests there were; None: no server has written counts. Raises StoreError."""
    rows = _read(DayReader(REQUESTS, store, name), since, until, None).table
    counts = [sum(one or 0 for one in rows[column].to_pylist()) for column in ("requests", "refused", "errors")]
    return RequestCounts(*counts) if len(rows) else None


@dataclass(frozen=True)
class Tidied:
    """What `tidy` did: objects that were too old and removed, and small parts that were merged."""

    num_expired: int
    num_merged: int


def tidy(store: "ObjectStore", name: str, *, now: datetime, keep_days: int | None) -> Tidied:
    """Remove what is older than `keep_days` days (None: nothing), and merge the small parts of finished days.

    Any number of processes may do this at once, also while servers write.

    Raises:
        StoreError: the store cannot be read or written.
    """
    today = now.astimezone(UTC).date()
    expired = expire_log(store, name, now=now, keep_days=keep_days) if keep_days is not None else 0
    merged = DayReader(PREDICTIONS, store, name).merge(today, partial(load_tombstones, store, name))
    merged += sum(DayReader(table, store, name).merge(today) for table in (FEEDBACK, REQUESTS, SHADOW))
    return Tidied(expired, merged)


def expire_log(store: "ObjectStore", name: str, *, now: datetime, keep_days: int) -> int:
    """Remove what was written down more than `keep_days` days ago; return how many objects that were."""
    before = now.astimezone(UTC).date() - timedelta(days=keep_days)
    kinds = (PREDICTIONS.kind, FEEDBACK.kind, REQUESTS.kind, SHADOW.kind, KEPT)
    return sum(expire(store, f"{kind}/{name}", before) for kind in kinds)


def _read(reader: DayReader, since: datetime | None, until: datetime | None, columns: Sequence[str] | None) -> Rows:
    import pyarrow as pa

    names = list(reader.table.columns if columns is None else columns)
    empty = reader.table.make_schema().empty_table().select(names)
    return Rows(pa.concat_tables([empty, *reader.read(since, until, names)]), tuple(sorted(reader.damaged)))
