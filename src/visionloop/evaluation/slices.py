"""Parts of a test side by what the manifest says of the images (source, group, size, time ...) and by their look. Pure.

What a picture is like is measured the same for an evaluation and for the log of a server.

Dimensions in names: n images, h rows, w columns.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloop.data.images import UInt8Array
from visionloop.evaluation.metrics import compute_share
from visionloop.evaluation.resampling import FloatArray, IntArray, count_keys
from visionloop.records import ImageRecord, Interval, make_natural_key


def measure_images(images_nhwc: UInt8Array) -> dict[str, NDArray[np.float64]]:
    """Return the brightness, the contrast and the sharpness of images, (n,) each.

    Brightness is the mean of the grey values, 0 to 1, and contrast their standard deviation. Sharpness is the variance
    of the Laplacian of the grey values (Pech-Pacheco 2000), at the size the model sees.
    """
    grey_nhw = images_nhwc @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    edges = grey_nhw[:, 1:-1, 1:-1] * -4
    for rows, columns in ((slice(2, None), slice(1, -1)), (slice(-2), slice(1, -1))):
        edges = edges + grey_nhw[:, rows, columns] + grey_nhw[:, columns, rows]
    return {
        "brightness": grey_nhw.mean(axis=(1, 2)).astype(np.float64),
        "contrast": grey_nhw.std(axis=(1, 2)).astype(np.float64),
        "sharpness": edges.var(axis=(1, 2)).astype(np.float64),
    }


MIN_SUPPORT = 30
THIRDS = ("low", "middle", "high")
MEASURES = ("brightness", "sharpness")  # of what `measure_images` returns


@dataclass(frozen=True)
class Slice:
    """The images (`rows_n`, ascending places among the given ones) that share a property, such as `source=cam1`."""

    name: str
    rows_n: IntArray


@dataclass(frozen=True)
class SliceFigures:
    """How many images and keys a slice has, and the share of right answers in it."""

    name: str
    num_images: int
    num_keys: int
    accuracy: Interval


def make_slices(
    records: Sequence[ImageRecord],
    measures: Mapping[str, FloatArray] | None = None,
    *,
    min_support: int = MIN_SUPPORT,
) -> list[Slice]:
    """Return the slices of some images with at least `min_support` of them, sorted by name.

    An image is in no slice of a property it has no value of, and in one for each of its sources. `measures` are figures
    of the images (n,) by name, such as brightness: each is cut at the terciles, equal values together. A slice that
    holds all images is left out: it says nothing.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, record in enumerate(records):
        for name in _name_slices(record):
            rows[name].append(row)
    numbers: dict[str, FloatArray] = {
        "size": np.array([r.width * r.height for r in records], np.float64),
        "bytes": np.array([r.num_bytes for r in records], np.float64),
        **(measures or {}),
    }
    for name, values_n in numbers.items():
        for third, places in zip(THIRDS, _cut_thirds(values_n), strict=True):
            rows[f"{name}={third}"] = places.tolist()
    return [
        Slice(name, np.array(places, np.int64))
        for name, places in sorted(rows.items(), key=lambda row: make_natural_key(row[0]))
        if min_support <= len(places) < len(records)
    ]


def _name_slices(record: ImageRecord) -> Iterator[str]:
    yield from sorted({f"source={source}" for source in record.sources})
    kind = "group" if record.group else "single" if record.key == record.sha256 else "near duplicates"
    yield f"kind={kind}"
    yield f"format={record.format}"
    shape = "square" if record.width == record.height else "wide" if record.width > record.height else "tall"
    yield f"shape={shape}"
    if record.captured_at:
        yield f"month={record.captured_at[:7]}"
        if hour := re.match(r".{10}[T ](\d\d)", record.captured_at):
            yield f"hour={hour[1]}"


def _cut_thirds(values_n: FloatArray) -> list[IntArray]:
    """Return the places of the lowest, the middle and the highest third. Equal values stay in one third."""
    low, high = np.quantile(values_n, [1 / 3, 2 / 3]) if len(values_n) else (0.0, 0.0)
    third_n = (values_n > low).astype(np.int64) + (values_n > high)
    return [np.flatnonzero(third_n == third) for third in range(3)]


def compute_slice_figures(slices: Sequence[Slice], hits_n: NDArray[np.bool_], key_n: IntArray) -> list[SliceFigures]:
    """Return the figures of each slice, the lowest accuracy first. Of many slices some look bad by chance."""
    figures = []
    for one in slices:
        hits, keys = hits_n[one.rows_n], key_n[one.rows_n]
        figures.append(SliceFigures(one.name, len(one.rows_n), count_keys(keys), compute_share(hits, keys)))
    return sorted(figures, key=lambda row: (row.accuracy.value, make_natural_key(row.name)))
