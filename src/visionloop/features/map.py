"""The map of a dataset: one self-contained HTML page, which loads nothing from the network. Makes text only.

Names of classes and files are never markup: they are JSON inside a script element, in which every `<` is escaped.
"""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visionloop.data.images import UInt8Array
from visionloop.features.album import Album
from visionloop.features.view import FloatArray

Progress = Callable[[int, int], None]

THUMBNAIL_PX = 64
ATLAS_CELLS = 32  # thumbnails across and down a picture that holds many of them
NO_LABEL = "(no label)"


@dataclass(frozen=True)
class Thumbnails:
    """Pictures that hold many thumbnails each, as data URIs.

    `boxes` says where each thumbnail is: picture, x, y, width, height. `thumb_n` is the thumbnail of each image, or -1.
    """

    atlases: list[str]
    boxes: list[tuple[int, int, int, int, int]]
    thumb_n: NDArray[np.int32]


def make_map(
    album: Album,
    place_n2: FloatArray,
    words: str,
    *,
    num_thumbnails: int,
    on_progress: Progress = lambda done, total: None,
) -> str:
    """Return the page. `place_n2`: coordinates between -1 and 1; `words`: how they were computed.

    At most `num_thumbnails` images, spread over the dataset, get a thumbnail. Each adds about 1.5 KB to the page.
    """
    prepared = album.prepared
    number = len(prepared.sha256_n)
    classes, class_n = _color_by(album)
    labels, label_n = np.unique([album.describe_labels(row) for row in range(number)], return_inverse=True)
    sides = [side for side in ("train", "val", "test") if (prepared.side_n == side).any()]
    thumbnails = make_thumbnails(album, choose_rows(number, num_thumbnails), on_progress)
    few = f", {len(thumbnails.boxes):,} with a thumbnail" if len(thumbnails.boxes) < number else ""
    pin = prepared.pin
    data = {
        "title": f"{pin.name} version {pin.version}",
        "facts": f"{number:,} images{few}. Near points look alike to {album.encoder.facts.describe()}; {words}.",
        "classes": classes,
        "sides": sides,
        "labels": labels.tolist(),
        "x": _encode(np.round((place_n2[:, 0] + 1) / 2 * 65535), np.uint16),
        "y": _encode(np.round((1 - place_n2[:, 1]) / 2 * 65535), np.uint16),
        "class_n": _encode(class_n, np.uint16),
        "label_n": _encode(label_n, np.uint32),
        "side_n": _encode(np.array([sides.index(side) for side in prepared.side_n.tolist()]), np.uint8),
        "thumb_n": _encode(thumbnails.thumb_n, np.int32),
        "thumbs": thumbnails.boxes,
        "atlases": thumbnails.atlases,
        "sha256_n": [sha256[:12] for sha256 in prepared.sha256_n],
        "origins": [album.get_origin(row) for row in range(number)],
    }
    return fill_page(f"{pin.name} version {pin.version}: map", data)


def fill_page(title: str, data: dict[str, Any]) -> str:
    """Put the title and the data (as JSON) into the page."""
    page = resources.files("visionloop.features").joinpath("map_page.html").read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    head, _, rest = page.partition("__TITLE__")
    middle, _, tail = rest.partition("__DATA__")
    return f"{head}{escape(title)}{middle}{text}{tail}"


def choose_rows(number: int, most: int) -> NDArray[np.int64]:
    """Return at most `most` rows, spread evenly. Rows are sorted by sha256, so this is a random sample."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(np.int64))


def make_thumbnails(
    album: Album, rows: NDArray[np.int64], on_progress: Progress = lambda done, total: None
) -> Thumbnails:
    """Draw thumbnails of some images, many in one WebP picture."""
    thumb_n = np.full(len(album.prepared.sha256_n), -1, np.int32)
    thumb_n[rows] = np.arange(len(rows))
    atlases: list[str] = []
    boxes: list[tuple[int, int, int, int, int]] = []
    per_atlas = ATLAS_CELLS * ATLAS_CELLS
    for start in range(0, len(rows), per_atlas):
        some = [album.make_thumbnail(int(row), THUMBNAIL_PX) for row in rows[start : start + per_atlas]]
        boxes += [(len(atlases), *_place(i), image.shape[1], image.shape[0]) for i, image in enumerate(some)]
        atlases.append(_draw_atlas(some))
        on_progress(len(boxes), len(rows))
    return Thumbnails(atlases, boxes, thumb_n)


def _place(cell: int) -> tuple[int, int]:
    row, column = divmod(cell, ATLAS_CELLS)
    return column * THUMBNAIL_PX, row * THUMBNAIL_PX


def _draw_atlas(images: list[UInt8Array]) -> str:
    across = min(len(images), ATLAS_CELLS)
    page = Image.new("RGB", (across * THUMBNAIL_PX, -(-len(images) // ATLAS_CELLS) * THUMBNAIL_PX))
    for i, image in enumerate(images):
        page.paste(Image.fromarray(image), _place(i))
    sink = io.BytesIO()
    page.save(sink, "WEBP", quality=72, method=3)
    return f"data:image/webp;base64,{base64.b64encode(sink.getvalue()).decode()}"


def _color_by(album: Album) -> tuple[list[str], NDArray[np.int64]]:
    """Return the class names and the class that colours each image, (n,): of several labels the first."""
    classes, label_n = list(album.prepared.classes), album.prepared.label_n
    if not (label_n < 0).any():
        return classes, label_n
    return [*classes, NO_LABEL], np.where(label_n < 0, len(classes), label_n)


def _encode(values: NDArray[Any], kind: type) -> str:
    """Return numbers as base64 of their bytes, little endian."""
    return base64.b64encode(np.asarray(values).astype(np.dtype(kind).newbyteorder("<")).tobytes()).decode()
