"""Nearest neighbours among embeddings, their votes, and whether these know anything. Pure: arrays in, arrays out.

They are exact; only all neighbours of all images of a large table are looked for in cells (`find_other_neighbours`).

Dimensions: m queries, n images of the table, d features, k neighbours, c classes (of a search in cells: cells),
p pairs of an image and a label that it has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visionloop.errors import DatasetError

Metric = Literal["cosine", "euclidean"]
Vote = Literal["uniform", "distance"]
FloatArray = NDArray[np.float32]
DoubleArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BLOCK = 4096
SCORE_BYTES = 64 * 1024 * 1024
MAX_QUERIES = 512
MARGIN = 8  # candidates beyond k
GROUP = 64
NUM_DEALS = 199
TABLE_BYTES = 64 * 1024 * 1024  # of a table that are scaled and searched at a time
CACHED_BYTES = 1024 * 1024  # of vectors that a processor has at hand
# A few queries to a large table: the rows of a step (they stay in the cache), what fp32 may be wrong by, and
# how many rows are compared exactly at most.
FEW, PASS_ROWS, ROUNDING, MOST_NEAR = 16, 1024, 1e-5, 16_384
# From so many images on, all pairs would take hours: a million of 512 numbers three hours at 100 GFLOP/s.
CELLS_FROM = 200_000
CELL_ROWS = 1000  # in the mean
NUM_PROBED = 16  # cells that are searched for the neighbours of the images of one
CELL_STEPS, CELL_SAMPLE = 8, 40  # of k-means: its steps, and so many images for each cell
MOST_ROWS = 32 * CELL_ROWS  # that images of a cell are compared with


def find_neighbours(
    query_md: FloatArray, table_nd: FloatArray, k: int, metric: Metric = "cosine"
) -> tuple[DoubleArray, IntArray]:
    """Return distances and rows of the table, (m, k) each, nearest first; ties in the order of rows. At most n.

    The cosine distance is 1 - cos, between 0 and 2. A vector of length 0 is at distance 1 from all. For vectors
    of length 1 it is half of the squared Euclidean distance, so both searches are one.

    Raises:
        DatasetError: the table is empty, the vectors differ in length, or hold values that are not finite.
    """
    most = max(1, TABLE_BYTES // (4 * max(1, *table_nd.shape[1:])))
    if len(table_nd) <= most or not len(query_md):
        return _find_neighbours(query_md, table_nd[:most], k, metric)
    are_few = metric == "cosine" and len(query_md) <= FEW
    if are_few and (rows := choose_near(query_md, table_nd, min(k, len(table_nd)))) is not None:
        distance_mk, place_mk = _find_neighbours(query_md, table_nd[rows], k, metric)
        return distance_mk, rows[place_mk]
    starts = range(0, len(table_nd), most)
    found = [_find_neighbours(query_md, table_nd[start : start + most], k + MARGIN, metric) for start in starts]
    distance_mk = np.hstack([distance for distance, _ in found])
    row_mk = np.hstack([row + start for (_, row), start in zip(found, starts, strict=True)])
    row_mk = np.take_along_axis(row_mk, np.lexsort((row_mk, distance_mk), axis=1)[:, : k + MARGIN], axis=1)
    # Once more among those that were found: rounding differs from piece to piece, and must not decide between equals.
    again: list[tuple[DoubleArray, IntArray]] = []
    for i in range(0, len(query_md), MAX_QUERIES):
        rows = np.unique(row_mk[i : i + MAX_QUERIES])
        distance, place = _find_neighbours(query_md[i : i + MAX_QUERIES], table_nd[rows], k, metric)
        again.append((distance, rows[place]))
    return np.concatenate([distance for distance, _ in again]), np.concatenate([row for _, row in again])


def choose_near(query_md: FloatArray, table_nd: FloatArray, k: int) -> IntArray | None:
    """Return, in order, the rows that may be among the k nearest of a few queries by cosine: one pass over the table.

    All are chosen that are as near as the k-th, but for what fp32 may be wrong by. None: these are very many, or some
    vectors are of length 0, not finite, or so long or short that their squares are not exact.
    """
    check_vectors(query_md, table_nd[:1])
    unit_md = scale(query_md)[0]
    cosine_mn = np.empty((len(query_md), len(table_nd)), np.float32)
    for start in range(0, len(table_nd), PASS_ROWS):
        some_nd = table_nd[start : start + PASS_ROWS]
        square_n = np.einsum("nd,nd->n", some_nd, some_nd)
        if not (square_n.min() > 1e-12 and square_n.max() < 1e12):  # also where it is not a number
            return None
        cosine_mn[:, start : start + PASS_ROWS] = (some_nd @ unit_md.T).T / np.sqrt(square_n)
    near = [np.flatnonzero(cosine_n >= np.partition(cosine_n, -k)[-k] - ROUNDING) for cosine_n in cosine_mn]
    rows = np.unique(np.concatenate(near))
    return rows if len(rows) <= MOST_NEAR else None


def _find_neighbours(
    query_md: FloatArray, table_nd: FloatArray, k: int, metric: Metric
) -> tuple[DoubleArray, IntArray]:
    check_vectors(query_md, table_nd)
    if k < 1:
        raise DatasetError("neighbours", f"got k = {k}", "1 or more")
    if metric == "cosine":
        query_md, table_nd = _to_spheres(query_md, table_nd)
    distance_mk, row_mk = _search(query_md, table_nd, min(k, len(table_nd)))
    if metric == "cosine":
        distance_mk = np.clip(distance_mk**2 / 2, 0.0, 2.0)
    return distance_mk, row_mk


def find_other_neighbours(
    table_nd: FloatArray,
    k: int,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[DoubleArray, IntArray]:
    """Return for each image of a table its k nearest others by cosine: distances and rows, (n, min(k, n - 1)) each.

    From `CELLS_FROM` images on those are found that lie in the 16 cells around an image's own; then
    `on_progress` is told how many images are done.

    Raises:
        DatasetError: as `find_neighbours`, or there is no other image.
    """
    number = len(table_nd)
    if number < 2:
        raise DatasetError("neighbours", f"{number} image has no other", "two or more", "Add images.")
    if number >= CELLS_FROM:
        return _search_cells(table_nd, k, on_progress)
    return _drop_self(*find_neighbours(table_nd, table_nd, k + 1), np.arange(number))


def _drop_self(distance_mk: DoubleArray, row_mk: IntArray, own_m: IntArray) -> tuple[DoubleArray, IntArray]:
    """Take each query itself, row `own_m` of the table, out of its neighbours.

    If several images are equal, a row may find itself later, or not at all. Then its last neighbour is dropped.
    """
    is_self = row_mk == own_m[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    shape = len(own_m), row_mk.shape[1] - 1
    return distance_mk[~is_self].reshape(shape), row_mk[~is_self].reshape(shape)


def _search_cells(
    table_nd: FloatArray, k: int, on_progress: Callable[[int, int], None]
) -> tuple[DoubleArray, IntArray]:
    """Return for each image its k nearest others among those of the cells around its own.

    An inverted file (Sivic and Zisserman, "Video Google", 2003) over cells of k-means, asked for a whole cell at once:
    a matrix product for each. Where so many images look alike that a cell is very large, they are compared with some
    of it by lot.
    """
    center_cd, cell_n = make_cells(table_nd, max(1, len(table_nd) // CELL_ROWS))
    order_n = np.argsort(cell_n, kind="stable")
    starts = np.searchsorted(cell_n[order_n], np.arange(len(center_cd) + 1))
    members_c = [order_n[a:b] for a, b in pairwise(starts)]
    near_cp = find_neighbours(center_cd, center_cd, min(4 * NUM_PROBED, len(center_cd)))[1]
    rng = np.random.default_rng(0)
    distance_nk, row_nk = np.empty((len(table_nd), k)), np.empty((len(table_nd), k), np.int64)
    for cell, members in enumerate(members_c):
        around = [members, *(members_c[other] for other in near_cp[cell] if other != cell)]
        num_cells = next((i for i in range(NUM_PROBED, len(around)) if sum(map(len, around[:i])) > k), len(around))
        rows = np.concatenate(around[:num_cells])
        if len(rows) <= k:
            rows = np.arange(len(table_nd))
        for start in range(0, len(members), BLOCK):
            own = members[start : start + BLOCK]
            some = rows if len(rows) <= MOST_ROWS else np.append(own, rng.choice(rows, MOST_ROWS, replace=False))
            some = np.unique(some)
            distance_mk, place_mk = find_neighbours(table_nd[own], table_nd[some], k + 1)
            distance_nk[own], row_nk[own] = _drop_self(distance_mk, some[place_mk], own)
        on_progress(int(starts[cell + 1]), len(table_nd))
    return distance_nk, row_nk


def make_cells(table_nd: FloatArray, number: int) -> tuple[FloatArray, IntArray]:
    """Divide vectors by their direction: spherical k-means on a sample. Return centers (c, d), and each one's cell."""
    rng = np.random.default_rng(0)
    sample = np.sort(rng.choice(len(table_nd), min(len(table_nd), CELL_SAMPLE * number), replace=False))
    unit_md = scale(table_nd[sample])[0]
    center_cd = unit_md[rng.choice(len(unit_md), number, replace=False)]
    for _ in range(CELL_STEPS):
        cell_m = _choose_cells(unit_md, center_cd)
        order = np.argsort(cell_m, kind="stable")
        filled, first = np.unique(cell_m[order], return_index=True)
        center_cd[filled] = scale(np.add.reduceat(unit_md[order], first, axis=0))[0]
    return center_cd, _choose_cells(table_nd, center_cd)


def _choose_cells(table_nd: FloatArray, center_cd: FloatArray) -> IntArray:
    """Return the nearest center of each vector; its length does not matter."""
    blocks = range(0, len(table_nd), BLOCK)
    return np.concatenate([(table_nd[i : i + BLOCK] @ center_cd.T).argmax(axis=1) for i in blocks])


def compute_votes(
    distance_mk: DoubleArray, target_mkc: NDArray[np.floating | np.uint8], vote: Vote = "uniform"
) -> DoubleArray:
    """Return the share of the votes for each class, (m, c). `target_mkc`: which classes each neighbour has (0 or 1).

    uniform: one vote each. distance: each vote weighs 1 / distance; if any neighbour has distance 0, only those vote.
    The same as scikit-learn's KNeighborsClassifier.
    """
    if vote == "uniform":
        return np.asarray(target_mkc.mean(axis=1, dtype=np.float64))
    return np.asarray(np.einsum("mk,mkc->mc", _weigh(distance_mk), target_mkc.astype(np.float64)))


def compute_votes_of_others(
    distance_nk: DoubleArray, row_nk: IntArray, target_nc: NDArray[np.uint8], *, vote: Vote = "distance"
) -> DoubleArray:
    """Return for each image what its nearest others vote, (n, c), from `find_other_neighbours`: leave-one-out."""
    blocks = [slice(i, i + BLOCK) for i in range(0, len(row_nk), BLOCK)]
    return np.concatenate([compute_votes(distance_nk[b], target_nc[row_nk[b]], vote) for b in blocks])


@dataclass(frozen=True)
class Agreement:
    """How often near images share their labels: the share of the votes that the given labels get, 0 to 1.

    It is the mean over the classes, so that a frequent class does not hide a rare one. `chance`: the mean share where
    the labels are dealt anew. `p_value`: how often such a deal has as large a share.
    """

    share: float
    chance: float
    p_value: float

    @property
    def is_weak(self) -> bool:
        """Whether the share is nearer to chance than to 1."""
        return self.share < (1 + self.chance) / 2

    def describe(self) -> str:
        """Return the two shares in words."""
        return f"neighbours agree with the labels in {self.share:.1%} of cases, by chance it would be {self.chance:.1%}"


def measure_agreement(distance_nk: DoubleArray, row_nk: IntArray, target_nc: NDArray[np.uint8]) -> Agreement | None:
    """Test whether the neighbours of images, `row_nk`, know more of their labels than chance does.

    A permutation test of the statistic of Schilling, "Multivariate two-sample tests based on nearest neighbors" (1986),
    here with weights and averaged over classes: its level is exact whatever the vectors are. Example: two classes, and
    all 10 neighbours of each image are of its class: the share is 1, chance about 0.5, the p-value 1 / 200.

    Returns None where nothing can be told: fewer than two classes have two images, or all images have the same labels.
    """
    target_nc = target_nc[:, target_nc.sum(axis=0) > 1]
    if not target_nc.shape[1] or (target_nc == target_nc[0]).all():
        return None
    owner_p, class_p = np.nonzero(target_nc)  # a pair for each label of each image
    size_c, weight_kn = np.bincount(class_p), np.ascontiguousarray(_weigh(distance_nk).T)
    rng = np.random.default_rng(0)

    def compute_share(order_n: IntArray) -> float:
        dealt_nc = np.empty_like(target_nc)
        dealt_nc[order_n] = target_nc
        vote_p = np.zeros(len(owner_p))
        place_p = order_n[owner_p]
        for weight_n, row_n in zip(weight_kn, row_nk.T, strict=True):
            vote_p += weight_n[place_p] * dealt_nc[row_n[place_p], class_p]
        return float((np.bincount(class_p, vote_p) / size_c).mean())

    share = compute_share(np.arange(len(target_nc)))
    dealt = [compute_share(rng.permutation(len(target_nc))) for _ in range(NUM_DEALS)]
    # Equal deals differ in rounding.
    num_reached = sum(other >= share - 1e-12 for other in dealt)
    return Agreement(share, float(np.mean(dealt)), (1 + num_reached) / (1 + NUM_DEALS))


def check_vectors(query_md: FloatArray, table_nd: FloatArray) -> None:
    """Raise DatasetError unless both are finite and of one length, and the table is not empty."""
    if not len(table_nd):
        raise DatasetError("neighbours", "there is no image to search in", "one or more", "Run `visionloop ingest`.")
    if query_md.ndim != 2 or table_nd.ndim != 2 or query_md.shape[1] != table_nd.shape[1]:
        found = f"got queries of shape {query_md.shape} for a table of shape {table_nd.shape}"
        raise DatasetError("neighbours", found, "vectors of one length", "Embed both with the same encoder.")
    for name, vectors in (("queries", query_md), ("vectors of the table", table_nd)):
        if not np.isfinite(vectors).all():
            number = int((~np.isfinite(vectors).all(axis=1)).sum())
            raise DatasetError("neighbours", f"{number} {name} are not finite", "numbers", "Embed them again.")


def to_targets(label_n: IntArray, num_classes: int) -> NDArray[np.uint8]:
    """Return labels as 0 and 1, (n, c)."""
    return np.asarray(label_n[:, None] == np.arange(num_classes), np.uint8)


def _weigh(distance_mk: DoubleArray) -> DoubleArray:
    """Return the weight of each neighbour's vote, 1 / distance; those of a query sum to 1."""
    is_same = distance_mk == 0
    with np.errstate(divide="ignore"):
        weight_mk = np.where(is_same.any(axis=1, keepdims=True), is_same, 1 / distance_mk).astype(np.float64)
    return np.asarray(weight_mk / weight_mk.sum(axis=1, keepdims=True))


def _to_spheres(query_md: FloatArray, table_nd: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Scale vectors to length 1. Those of length 0 get a new dimension, perpendicular to all other vectors."""
    (unit_md, empty_m), (unit_nd, empty_n) = scale(query_md), scale(table_nd)
    if empty_m.any() or empty_n.any():
        none_m, none_n = np.zeros_like(empty_m), np.zeros_like(empty_n)
        unit_md = np.hstack([unit_md, np.stack([empty_m, none_m], axis=1).astype(np.float32)])
        unit_nd = np.hstack([unit_nd, np.stack([none_n, empty_n], axis=1).astype(np.float32)])
    return unit_md, unit_nd


def scale(vectors: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Return vectors of length 1, and which of them have no length."""
    unit, is_empty = np.empty(vectors.shape, np.float32), np.empty(len(vectors), np.bool_)
    step = max(1, CACHED_BYTES // (4 * max(1, vectors.shape[1])))  # ten times as fast as all at once
    for start in range(0, len(vectors), step):
        some = vectors[start : start + step]
        largest = np.abs(some).max(axis=1, keepdims=True, initial=0.0)  # squares of large numbers overflow
        scaled = some / np.where(largest > 0, largest, 1)
        length = np.linalg.norm(scaled, axis=1, keepdims=True)
        unit[start : start + step] = scaled / np.where(length > 0, length, 1)
        is_empty[start : start + step] = length[:, 0] == 0
    return unit, is_empty


def _search(query_md: FloatArray, table_nd: FloatArray, k: int) -> tuple[DoubleArray, IntArray]:
    """Return Euclidean distances and rows, (m, k) each, computed in blocks of limited memory.

    A matrix product in fp32 finds k + 8 candidates. Their distances are then computed in double precision. If more
    images than that are equally near in fp32, it is not defined which of them are found.
    """
    if not len(query_md):
        return np.zeros((0, k)), np.zeros((0, k), np.int64)
    center_d = table_nd.mean(axis=0)  # the same distances, with less rounding
    query_md, table_nd = query_md - center_d, table_nd - center_d
    size = min(MAX_QUERIES, max(1, SCORE_BYTES // (4 * len(table_nd))))
    half_n = np.einsum("nd,nd->n", table_nd, table_nd) / 2
    found = [_search_block(query_md[i : i + size], table_nd, half_n, k) for i in range(0, len(query_md), size)]
    return np.concatenate([d for d, _ in found]), np.concatenate([r for _, r in found])


def _search_block(
    query_md: FloatArray, table_nd: FloatArray, half_n: FloatArray, k: int
) -> tuple[DoubleArray, IntArray]:
    # |q - t|^2 / 2 = |q|^2 / 2 - (q t - |t|^2 / 2): the nearest has the largest of the last term.
    score_mn = query_md @ table_nd.T
    score_mn -= half_n
    row_mk = _choose_largest(score_mn, min(k + MARGIN, len(table_nd)))
    difference_mkd = query_md[:, None].astype(np.float64) - table_nd[row_mk]
    distance_mk = np.sqrt(np.einsum("mkd,mkd->mk", difference_mkd, difference_mkd))
    order = np.lexsort((row_mk, distance_mk), axis=1)[:, :k]
    return np.take_along_axis(distance_mk, order, axis=1), np.take_along_axis(row_mk, order, axis=1)


def _choose_largest(score_mn: FloatArray, number: int) -> IntArray:
    """Return the columns of the largest scores of each row, (m, number), in any order.

    The columns are cut into groups of 64. The `number` largest scores are all in the `number` groups with the largest
    maxima (or in the rest behind the last group), so only these are searched.
    """
    num_groups = score_mn.shape[1] // GROUP
    if num_groups <= number:
        return _partition(score_mn, number)
    grouped = score_mn[:, : num_groups * GROUP].reshape(len(score_mn), num_groups, GROUP)
    group_mg = _partition(grouped.max(axis=2), number)
    rest = np.arange(num_groups * GROUP, score_mn.shape[1])
    column = (group_mg[:, :, None] * GROUP + np.arange(GROUP)).reshape(len(score_mn), -1)
    column = np.hstack([column, np.broadcast_to(rest, (len(score_mn), len(rest)))])
    chosen = _partition(np.take_along_axis(score_mn, column, axis=1), number)
    return np.asarray(np.take_along_axis(column, chosen, axis=1))


def _partition(score_mn: FloatArray, number: int) -> IntArray:
    return np.argpartition(score_mn, -number, axis=1)[:, -number:]
