"""The leak report of a dataset version: near duplicates and groups that are on two sides, and what was done about them.

leaks/NAME/<digest>.json    one list per version, cumulative; the digest is in the version's commit object

kind       sha256                            other
across     an image whose near duplicate     ... is on another side, because the sources said so: it stays, it leaks
excluded   an image that is not used         ... the image it would have linked to another side
conflict   an image that has a side          None: a later source gives it another one (`other_side`), without effect
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from visionloop.data.contact_sheet import Cell, draw_pairs
from visionloop.data.images import decode_image
from visionloop.errors import ImageError, ObjectMissing
from visionloop.records import DatasetVersion, Record, canonical_json, compute_digest
from visionloop.store import ObjectStore

CELL_PX = 320
KINDS = ("across", "excluded", "conflict")


@dataclass(frozen=True)
class Leak(Record):
    """One row of the report. `distance` is the Hamming distance of the hashes (0 to 64), None for groups and conflicts.

    `difference` is that of the pixels (see `duplicates.compute_difference`); `reason` is the row in words.
    """

    kind: str
    sha256: str
    origins: tuple[str, ...]
    side: str
    other: str | None
    other_origins: tuple[str, ...]
    other_side: str
    distance: int | None
    difference: float | None
    reason: str


@dataclass(frozen=True)
class Leaks:
    """The leaks of one version, the worst first: `across`, `excluded`, `conflict`; in each the most similar first."""

    rows: tuple[Leak, ...] = ()

    def count(self, kind: str) -> int:
        """Return how many rows are of a kind."""
        return sum(row.kind == kind for row in self.rows)


def make_leaks(rows: Sequence[Leak]) -> Leaks:
    """Return the report of some rows, in its order."""
    return Leaks(tuple(sorted(rows, key=lambda r: (KINDS.index(r.kind), _or(r.difference), r.sha256, r.other or ""))))


def write_leaks(store: ObjectStore, name: str, leaks: Leaks) -> str | None:
    """Keep a report in the store; return its digest, None for an empty one."""
    if not leaks.rows:
        return None
    rows = [row.to_json() for row in leaks.rows]
    digest = compute_digest(rows)
    store.add(f"leaks/{name}/{digest}.json", canonical_json(rows))
    return digest


def load_leaks(store: ObjectStore, version: DatasetVersion) -> Leaks:
    """Return the leak report of a version. Raises ObjectMissing."""
    if version.leaks is None:
        return Leaks()
    rows = json.loads(store.get(f"leaks/{version.name}/{version.leaks}.json"))
    return Leaks(tuple(Leak.from_json(row) for row in rows))


def _or(difference: float | None) -> float:
    return 1e9 if difference is None else difference


def make_leak_picture(leaks: Leaks, load_bytes: Callable[[str], bytes], *, shown: int = 20) -> bytes:
    """Draw the worst pairs side by side, as PNG. `load_bytes` gives an image's bytes by its sha256.

    A pair is left out if one of its images is missing from the store or damaged.
    """
    pairs: list[tuple[Cell, Cell, str]] = []
    for leak in leaks.rows:
        if leak.other is None or len(pairs) == shown:
            continue
        try:
            one = _make_cell(load_bytes(leak.sha256), leak.origins, leak.side)
            other = _make_cell(load_bytes(leak.other), leak.other_origins, leak.other_side)
        except (ObjectMissing, ImageError):
            continue
        pairs.append((one, other, leak.reason))
    return draw_pairs(pairs, f"{len(pairs)} of {len(leaks.rows)} leaks, the worst first")


def _make_cell(data: bytes, origins: tuple[str, ...], side: str) -> Cell:
    image = decode_image(data, origins[0], max_pixels=None)
    image.thumbnail((CELL_PX, CELL_PX))
    return Cell(np.asarray(image), side, origins[0])
