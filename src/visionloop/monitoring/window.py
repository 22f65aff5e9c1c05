"""A window of the prediction log: its times, its rows as arrays, and the sample of them that is compared. Pure.

Dimensions: n images, k classes, d embedding size.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionloop.monitoring.drift import BoolArray, FloatArray, IntArray, Sample

if TYPE_CHECKING:
    import pyarrow as pa

MEASURES = ("brightness", "contrast", "sharpness")
# Without embeddings, which are nine tenths of the bytes.
COLUMNS = (
    *("request_id", "time", "client", "image_sha256", "model_digest", "prediction", "labels", "confidence"),
    *("abstained", "total_ms", *MEASURES, "width", "height", "image_kept", "keep_probability", "keep_reason"),
)
SAME_DIGITS = 4  # of the measures of two images that are taken for the same picture
START = datetime(1970, 1, 5, tzinfo=UTC)  # a Monday: windows of a week begin with it


@dataclass(frozen=True)
class Span:
    """The time of a window, `end` not with it."""

    start: datetime
    end: datetime

    @property
    def name(self) -> str:
        """The name of the window, which sorts by time: `20261128T0000`."""
        return f"{self.start:%Y%m%dT%H%M}"

    @property
    def length(self) -> timedelta:
        return self.end - self.start


def find_last_span(now: datetime, hours: int) -> Span:
    """Return the last window that is over: windows follow each other without a gap, from a Monday at midnight UTC."""
    length = timedelta(hours=hours)
    end = START + (now - START) // length * length
    return Span(end - length, end)


def is_window(name: str) -> bool:
    """Say whether a text is the name of a window, and not that of a copy of one."""
    return re.fullmatch(r"[0-9]{8}T[0-9]{4}", name) is not None


def pick_rows(number: int, most: int, seed: int) -> IntArray:
    """Return all rows, or `most` of them by lot, in order."""
    if number <= most:
        return np.arange(number)
    return np.sort(np.random.default_rng(seed).choice(number, most, replace=False))


def number_blocks(table: "pa.Table", block_hours: int) -> IntArray:
    """Return the block of each row: one client in so many hours; 0 hours: each image. In order of client and time."""
    if block_hours == 0:
        return np.arange(len(table))
    hour_n = _get_seconds(table) // (3600 * block_hours)
    client_n = np.unique(_get_texts(table, "client"), return_inverse=True)[1]
    return np.unique(np.column_stack([client_n, hour_n]), axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def make_sample(table: "pa.Table", classes: Sequence[str], block_hours: int, embedding_nd: Any = None) -> Sample:
    """Return rows of the log as a sample, in the order of the rows."""
    return Sample(
        block_n=number_blocks(table, block_hours),
        chosen_nk=find_chosen(table, classes),
        confidence_n=np.nan_to_num(np.clip(get_numbers(table, "confidence"), 0.0, 1.0)),
        abstained_n=get_flags(table, "abstained"),
        embedding_nd=embedding_nd,
        quality={name: get_numbers(table, name) for name in MEASURES},
    )


def find_chosen(table: "pa.Table", classes: Sequence[str]) -> BoolArray:
    """Return which classes each row was answered with, (n, k). A name that is no class of the model is none of them."""
    place = {name: k for k, name in enumerate(classes)}
    chosen_nk = np.zeros((len(table), len(classes)), bool)
    for row, (answer, labels) in enumerate(
        zip(table["prediction"].to_pylist(), table["labels"].to_pylist(), strict=True)
    ):
        for name in [answer] if labels is None else labels:
            if name in place:
                chosen_nk[row, place[name]] = True
    return chosen_nk


def read_embeddings(column: Any) -> NDArray[np.float32] | None:
    """Return a column of embeddings as (n, d); None where a row has none, or one of another length or not finite."""
    column = column.combine_chunks()
    lengths = set(column.value_lengths().to_pylist())
    if len(lengths) != 1 or None in lengths or lengths == {0} or column.flatten().null_count:
        return None
    embedding_nd = np.asarray(column.flatten()).reshape(len(column), -1)
    return embedding_nd if np.isfinite(embedding_nd).all() else None


def get_numbers(table: "pa.Table", name: str) -> FloatArray:
    """Return a column as float64; null is NaN."""
    return np.asarray(table[name].cast("float64").fill_null(np.nan).to_numpy(), np.float64)


def get_flags(table: "pa.Table", name: str) -> BoolArray:
    """Return a column as bool; null is False."""
    return np.asarray(table[name].fill_null(False).to_numpy(), bool)


@dataclass(frozen=True)
class Traffic:
    """The rows of a window as the checks for broken data want them, all (n,). Clients without a name are ""."""

    client_n: NDArray[np.str_]
    picture_n: NDArray[np.str_]
    size_n: NDArray[np.str_]
    contrast_n: FloatArray
    latency_n: FloatArray

    def __len__(self) -> int:
        return len(self.client_n)


def make_traffic(table: "pa.Table") -> Traffic:
    """Return what the checks look at. Two images with the same measures are one picture, whatever their bytes."""
    measures = [get_numbers(table, name) for name in MEASURES]
    joined = ["/".join(f"{one:.{SAME_DIGITS}g}" for one in row) for row in zip(*measures, strict=True)]
    known = np.isfinite(np.column_stack(measures)).all(axis=1) if len(table) else np.zeros(0, bool)
    picture_n = np.where(known, np.asarray(joined, np.str_), _get_texts(table, "image_sha256"))
    sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
    return Traffic(
        client_n=_get_texts(table, "client"),
        picture_n=picture_n,
        size_n=np.array(["" if None in pair else f"{pair[0]} x {pair[1]}" for pair in sizes], np.str_),
        contrast_n=measures[1],
        latency_n=get_numbers(table, "total_ms"),
    )


def _get_texts(table: "pa.Table", name: str) -> NDArray[np.str_]:
    return np.asarray(table[name].fill_null("").to_numpy(zero_copy_only=False), np.str_)


def _get_seconds(table: "pa.Table") -> IntArray:
    return np.asarray(table["time"].cast("int64").to_numpy(), np.int64) // 1_000_000
