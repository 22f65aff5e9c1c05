"""The images of a dataset that are most similar to a given one: a file, or an image of the dataset."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionloop.data.contact_sheet import Cell, draw_contact_sheet
from visionloop.data.images import UInt8Array, decode_image
from visionloop.errors import ImageError, SourceError
from visionloop.features.album import Album
from visionloop.features.kept import DamagedVectors
from visionloop.features.neighbours import find_neighbours
from visionloop.features.view import FloatArray
from visionloop.records import MAX_PIXELS

MIN_DIGITS = 8
MAX_BYTES = 200_000_000
CELL_PX = 150
MAX_DRAWN = 12  # queries in one picture


@dataclass(frozen=True)
class QueryImage:
    """The image that is looked for. An image of the dataset has a `row` in the album, a file an `image`: its pixels."""

    name: str
    sha256: str
    picture: UInt8Array
    row: int | None = None
    image: UInt8Array | None = None


@dataclass(frozen=True)
class SimilarImage:
    """An image of the dataset and its cosine distance (0 to 2) to the query. `is_same`: the files are equal."""

    row: int
    distance: float
    is_same: bool


@dataclass(frozen=True)
class Answered:
    """What was asked of an album, and for each question the images that were found, nearest first."""

    album: Album
    queries: list[QueryImage]
    found: list[list[SimilarImage]]


def ask(load: Callable[[], Album], images: Sequence[str], k: int, *, max_pixels: int = MAX_PIXELS) -> Answered:
    """Find the k images of an album that are nearest to each image. Kept vectors that are damaged are made anew.

    `load` opens the album. Raises as `read_query`, and as `load` does.
    """
    album = load()
    queries = [read_query(text, album, max_pixels=max_pixels) for text in images]
    try:
        return Answered(album, queries, find_similar(album, queries, k))
    except DamagedVectors:
        assert album.kept is not None
        album.kept.path.unlink(missing_ok=True)
    album = load()
    return Answered(album, queries, find_similar(album, queries, k))


def check_query(text: str, *, max_pixels: int = MAX_PIXELS) -> None:
    """Raise as `read_query` does of what is wrong whatever the dataset holds: no such file, no image in it."""
    path = Path(text).expanduser()
    if path.is_file():
        _load_file(path, max_pixels)
    elif not re.fullmatch(rf"[0-9a-fA-F]{{{MIN_DIGITS},64}}", text):
        found = "is a folder" if path.is_dir() else "does not exist"
        raise SourceError(text, found, f"an image file, or {MIN_DIGITS} digits or more of a sha256", "Check the path.")


def read_query(text: str, album: Album, *, max_pixels: int = MAX_PIXELS) -> QueryImage:
    """Read a file, or the sha256 of an image of the dataset (or its first eight digits or more).

    Raises:
        SourceError: there is no such file or image, or several images begin so.
        ImageError: the file is no image we read.
    """
    path = Path(text).expanduser()
    if path.is_file():
        data, picture = _load_file(path, max_pixels)
        picture.thumbnail((CELL_PX, CELL_PX))
        image = album.encoder.decode(data, path.name, max_pixels=max_pixels)
        return QueryImage(str(path), hashlib.sha256(data).hexdigest(), np.asarray(picture.convert("RGB")), image=image)
    check_query(text)
    rows = [row for row, sha256 in enumerate(album.prepared.sha256_n) if sha256.startswith(text.lower())]
    if len(rows) != 1:
        found = f"begins {len(rows)} images" if rows else "is no image of the prepared dataset, and no file"
        raise SourceError(text, found, "one image", "See `visionloop datasets show`; give more digits.")
    name = f"{album.prepared.sha256_n[rows[0]][:12]} {album.get_origin(rows[0])}"
    return QueryImage(name, album.prepared.sha256_n[rows[0]], album.load_picture(rows[0], CELL_PX), row=rows[0])


def find_similar(album: Album, queries: Sequence[QueryImage], k: int) -> list[list[SimilarImage]]:
    """Return the k nearest images of each query, nearest first. An image of the dataset does not find itself."""
    if not queries:
        return []
    query_md = np.stack([_embed(album, query) for query in queries])
    if album.kept is not None:
        distance_mk, row_mk = album.kept.find(query_md, min(k + 1, len(album.records)))
    else:
        distance_mk, row_mk = find_neighbours(query_md, album.embedding_nd, k + 1)
    found = []
    for query, distances, rows in zip(queries, distance_mk, row_mk, strict=True):
        sha256s = [album.prepared.sha256_n[row] for row in rows]
        matches = [
            SimilarImage(int(row), float(distance), sha256 == query.sha256)
            for row, distance, sha256 in zip(rows, distances, sha256s, strict=True)
            if row != query.row
        ]
        found.append(matches[:k])
    return found


def describe_for_machines(
    album: Album, queries: Sequence[QueryImage], found: Sequence[Sequence[SimilarImage]]
) -> dict[str, Any]:
    """Return what `similar --json` prints."""
    return {
        **album.describe_for_machines(),
        "queries": [
            {
                "image": query.name,
                "sha256": query.sha256,
                "matches": [{**album.describe_row(m.row), "distance": round(m.distance, 6)} for m in matches],
            }
            for query, matches in zip(queries, found, strict=True)
        ],
    }


def draw_similar(album: Album, queries: Sequence[QueryImage], found: Sequence[Sequence[SimilarImage]]) -> bytes:
    """Draw each query and its matches as one row, as PNG. Draws at most the first 12 queries."""
    cells: list[Cell] = []
    columns = 1 + max((len(matches) for matches in found), default=0)
    for query, matches in list(zip(queries, found, strict=True))[:MAX_DRAWN]:
        cells.append(Cell(query.picture, Path(query.name).name, "looked for"))
        for match in matches:
            note = "the same file" if match.is_same else f"{match.distance:.3f}  {album.records[match.row].side}"
            cells.append(Cell(album.load_picture(match.row, CELL_PX), album.describe_labels(match.row), note))
        blank = Cell(np.full((1, 1, 3), 255, np.uint8), "")
        cells += [blank] * (columns - 1 - len(matches))
    pin = album.prepared.pin
    title = f"nearest in {pin.name} version {pin.version}, by {album.encoder.facts.describe()}"
    return draw_contact_sheet(cells, title, columns=columns, cell_px=CELL_PX)


def _load_file(path: Path, max_pixels: int) -> tuple[bytes, Image.Image]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(path.name, "is too large", f"at most {MAX_BYTES:,} bytes", reason_code="too_large")
        data = path.read_bytes()
    except OSError as exc:
        raise SourceError(str(path), f"cannot be read ({exc.strerror})", "an image file", "Check the path.") from exc
    return data, decode_image(data, path.name, max_pixels=max_pixels)


def _embed(album: Album, query: QueryImage) -> FloatArray:
    if query.row is not None and album.kept is not None:
        return np.asarray(album.kept.read(np.asarray([query.row]))[0])
    if query.row is not None:
        return np.asarray(album.embedding_nd[query.row])
    assert query.image is not None
    return np.asarray(album.encoder.embed(query.image[None])[0])
