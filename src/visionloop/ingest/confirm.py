"""Near duplicates among the images of a pull and of the versions before: hashes first, then a look at the pixels.

Only images whose hash is near another's are read from the store again. Dimensions in names: n rows, p pairs.
"""

from collections.abc import Sequence

import numpy as np

from visionloop.data.duplicates import THUMB_PX, Pairs, compute_difference, find_near_pairs
from visionloop.data.families import Pair
from visionloop.data.images import UInt8Array, load_array
from visionloop.data.manifest import make_image_key
from visionloop.errors import ImageError, ObjectMissing
from visionloop.parallel import map_parallel
from visionloop.store import ObjectStore

_CHUNK = 4096  # pairs; their thumbnails are 25 MB at most
# Decoded larger and averaged: a JPEG that is decoded at an eighth of its size is not quite what a PNG is when resized.
_DECODED_PX = 4 * THUMB_PX


def find_duplicates(
    store: ObjectStore,
    sha256_n: Sequence[str],
    phash_n: Sequence[str],
    kind_n: Sequence[int],
    first_new: int,
    *,
    max_pixels: int,
) -> list[Pair]:
    """Return the confirmed pairs of rows with at least one at or after `first_new`; earlier rows come first.

    `kind_n` says on which side a row is (see `find_near_pairs`). An image that is gone from the store, or cannot be
    decoded, is near nothing. Raises StoreError.
    """
    row_of = [i for i, phash in enumerate(phash_n) if phash]
    hashes = np.array([int(phash_n[i], 16) for i in row_of], np.uint64)
    kinds = np.array([kind_n[i] for i in row_of], np.int64)
    near = find_near_pairs(hashes, kinds, sum(i < first_new for i in row_of))
    order = np.lexsort((near.later_p, near.earlier_p))
    near = Pairs(near.later_p[order], near.earlier_p[order], near.distance_p[order])
    found: list[Pair] = []
    thumbs: dict[int, UInt8Array | None] = {}
    for start in range(0, len(order), _CHUNK):
        some = slice(start, start + _CHUNK)
        later_p, earlier_p = near.later_p[some].tolist(), near.earlier_p[some].tolist()
        wanted = {*later_p, *earlier_p}
        missing = sorted(wanted - thumbs.keys())
        names = [sha256_n[row_of[i]] for i in missing]
        thumbs = {i: thumb for i, thumb in thumbs.items() if i in wanted}
        thumbs.update(zip(missing, _load_thumbs(store, names, max_pixels), strict=True))
        usable = [p for p, (a, b) in enumerate(zip(later_p, earlier_p, strict=True)) if _has(thumbs, a, b)]
        if not usable:
            continue
        a, b = (np.stack([thumbs[side[p]] for p in usable]) for side in (later_p, earlier_p))  # type: ignore[misc]
        for p, difference in zip(usable, compute_difference(a, b).tolist(), strict=True):
            if difference <= 1:
                distance = int(near.distance_p[start + p])
                found.append(Pair(row_of[later_p[p]], row_of[earlier_p[p]], distance, round(difference, 4)))
    return found


def make_thumb(image_hwc: UInt8Array) -> UInt8Array:
    """Average an image of 128 x 128 to 32 x 32."""
    means = image_hwc.reshape(THUMB_PX, 4, THUMB_PX, 4, 3).mean((1, 3))
    return np.asarray(means.round(), np.uint8)


def _load_thumbs(store: ObjectStore, names: Sequence[str], max_pixels: int) -> list[UInt8Array | None]:
    def load(sha256: str) -> UInt8Array | None:
        try:
            data = store.get(make_image_key(sha256))
            size_hw = (_DECODED_PX, _DECODED_PX)
            return make_thumb(load_array(data, sha256[:12], size_hw=size_hw, resize="squash", max_pixels=max_pixels))
        except (ObjectMissing, ImageError):
            return None

    return list(map_parallel(load, names)) if names else []


def _has(thumbs: dict[int, UInt8Array | None], *rows: int) -> bool:
    return all(thumbs[row] is not None for row in rows)
