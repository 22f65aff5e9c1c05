"""The map of a dataset: embeddings to points in the plane, and one self-contained HTML page of them. Pure.

The same input gives the same points. The page loads nothing from the network. Names of classes and files are
never markup: they are JSON inside a script element, in which every `<` is escaped.

Dimensions: n images, d features.
"""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visionloop.data.images import UInt8Array
from visionloop.features.album import Album
from visionloop.features.neighbours import FloatArray, check_vectors, find_neighbours

Method = Literal["auto", "pca", "tsne"]

# t-SNE of so many images takes about half a minute. The other images are placed between their nearest of these.
MAX_TSNE = 2000
MIN_TSNE = 8
NUM_COMPONENTS = 50
PERPLEXITY = 30.0
NUM_NEAREST = 3


def project(embedding_nd: FloatArray, method: Method = "auto") -> tuple[FloatArray, str]:
    """Return points (n, 2) between -1 and 1, and how they were computed, in words. `auto`: t-SNE from 8 images on.

    Vectors are scaled to length 1 first, so near points have a small cosine distance. Raises DatasetError.
    """
    check_vectors(embedding_nd, embedding_nd)
    unit_nd = embedding_nd / np.maximum(np.linalg.norm(embedding_nd, axis=1, keepdims=True), 1e-12)
    if method == "pca" or len(unit_nd) < MIN_TSNE:
        return _to_square(compute_pca(unit_nd, 2)), "principal components"
    number = len(unit_nd)
    sample = np.unique(np.linspace(0, number - 1, min(number, MAX_TSNE)).round().astype(np.int64))
    place_s2 = compute_tsne(unit_nd[sample])
    if len(sample) == number:
        return _to_square(place_s2), "t-SNE"
    others = np.setdiff1d(np.arange(number), sample)
    distance_mk, row_mk = find_neighbours(unit_nd[others], unit_nd[sample], NUM_NEAREST)
    weight_mk = 1 / (distance_mk + 1e-6)
    weight_mk /= weight_mk.sum(axis=1, keepdims=True)
    place_n2 = np.empty((number, 2), np.float32)
    place_n2[sample] = place_s2
    place_n2[others] = (weight_mk[:, :, None] * place_s2[row_mk]).sum(axis=1)
    words = f"t-SNE of {len(sample):,} images, the other {len(others):,} among their nearest of these"
    return _to_square(place_n2), words


def compute_pca(unit_nd: FloatArray, num_components: int) -> FloatArray:
    """Return the first principal components (n, num_components); zeros where there are fewer."""
    from sklearn.decomposition import PCA

    number = min(num_components, *unit_nd.shape)
    out = np.zeros((len(unit_nd), num_components), np.float32)
    if len(unit_nd) > 1 and (unit_nd != unit_nd[0]).any():  # if all vectors are equal, the zeros stay
        solver = "covariance_eigh" if len(unit_nd) > unit_nd.shape[1] else "full"
        out[:, :number] = PCA(number, svd_solver=solver).fit_transform(unit_nd)
    return out


def compute_tsne(unit_nd: FloatArray) -> FloatArray:
    """Return the t-SNE (van der Maaten and Hinton, 2008) of some vectors, started from their principal components."""
    from sklearn.manifold import TSNE

    reduced = compute_pca(unit_nd, min(NUM_COMPONENTS, unit_nd.shape[1]))
    if not reduced.std():
        return np.zeros((len(unit_nd), 2), np.float32)
    perplexity = min(PERPLEXITY, (len(unit_nd) - 1) / 3)
    model = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    return np.asarray(model.fit_transform(reduced), np.float32)


def _to_square(place_n2: FloatArray) -> FloatArray:
    """Centre points and scale both axes alike, so that the longer one goes from -1 to 1."""
    low, high = place_n2.min(axis=0), place_n2.max(axis=0)
    span = float((high - low).max()) / 2
    return np.asarray((place_n2 - (low + high) / 2) / (span or 1.0), np.float32)


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
