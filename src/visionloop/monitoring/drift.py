"""Is a window of traffic like the reference? One test over many detectors, with one level of false alarms. Pure.

Images come in *blocks* (a client in an hour): the frames of one camera are alike, so they are drawn together or not at
all. If nothing has changed, the blocks of the window could as well have been in the reference. So all blocks are mixed
and dealt anew, some thousand times, and each detector says how far apart the two sides are then. This is what luck
does; the window is drifted if it is further apart than all but a share `level` of these (a permutation test of blocks:
Lehmann & Romano 2005, section 15.2; it holds exactly, whatever the blocks look like, and however few they are).

Several detectors look at once. The smallest of their p-values is dealt anew with them (Westfall & Young 1993, "min P"),
so the level is that of one false alarm by any of them.

    detectors        classifier  how well a linear classifier tells the sides apart, on blocks it has not seen
                     mmd         distance of the means of random Fourier features of the embeddings
                     classes     shares of the answers      abstained    share without an answer
                     confidence, brightness, contrast, sharpness             distributions

Dimensions: n images, g blocks, b deals (the first is the real one), d embedding size, c axes, f features, j detectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

MAX_AXES = 32  # of the embeddings, by their variance; what is beyond them counts by its length
NUM_FEATURES = 256
NUM_EDGES = 16
FOLDS = 5
RIDGE = 0.1  # of the mean variance, added to each axis of the classifier
MAX_WINDOW_BLOCKS = 50  # more are put together, neighbours first: they tell as much, and cost less
FIRST_DEALS = 199
CLEAR = 5.0  # after the first deals: a p-value of so many times the level needs no more of them
DEALS_BY_LEVEL, MAX_DEALS = 20, 19_999
CHUNK_CELLS = 4_000_000
EPSILON = 1e-12


@dataclass(frozen=True)
class Sample:
    """Some images as the model has seen them. Images of one block have one number in `block_n`.

    `embedding_nd` None: the log has none. `chosen_nk` says which classes were answered. `quality` holds measures by
    name, (n,), NaN where one is unknown. Blocks with neighbouring numbers are neighbours.
    """

    block_n: IntArray
    chosen_nk: BoolArray
    confidence_n: FloatArray
    abstained_n: BoolArray
    embedding_nd: FloatArray | None = None
    quality: Mapping[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.block_n)

    def take(self, rows: NDArray[Any]) -> "Sample":
        """Return some of the images."""
        return Sample(
            self.block_n[rows],
            self.chosen_nk[rows],
            self.confidence_n[rows],
            self.abstained_n[rows],
            None if self.embedding_nd is None else self.embedding_nd[rows],
            {name: value_n[rows] for name, value_n in self.quality.items()},
        )


@dataclass(frozen=True)
class Basis:
    """The axes that embeddings are looked at in. They come from images that are on neither side of a comparison."""

    mean_d: FloatArray
    axes_dc: FloatArray
    beyond: tuple[float, float]  # mean and spread of the length of what the axes leave out
    turn_cf: FloatArray
    phase_f: FloatArray

    @classmethod
    def fit(cls, embedding_nd: NDArray[np.floating], seed: int = 0) -> "Basis":
        """Return the principal axes of some embeddings, each scaled to variance 1, and random Fourier features.

        Rahimi & Recht, "Random features for large-scale kernel machines", 2007; the width of the Gaussian kernel is the
        median distance (Gretton et al., "A kernel two-sample test", 2012, section 8).
        """
        values_nd = np.asarray(embedding_nd, np.float64)
        mean_d = values_nd.mean(axis=0)
        _, length_c, axes_cd = np.linalg.svd(values_nd - mean_d, full_matrices=False)
        wide = int((length_c > 1e-6 * length_c.max(initial=0.0)).sum())
        most = max(1, min(MAX_AXES, len(values_nd) // 3, wide))
        spread_c = np.maximum(length_c[:most] / np.sqrt(max(1, len(values_nd) - 1)), EPSILON)
        plain = cls(mean_d, axes_cd[:most].T / spread_c, (0.0, 1.0), np.zeros((most + 1, 0)), np.zeros(0))
        beyond_n = plain.project(values_nd)[:, -1]
        scaled = replace(plain, beyond=(float(beyond_n.mean()), float(beyond_n.std()) or 1.0))
        generator = np.random.default_rng(seed)
        one_nc, other_nc = scaled.project(values_nd)[generator.integers(0, len(values_nd), (2, 500))]
        width = float(np.median(np.linalg.norm(one_nc - other_nc, axis=1))) or 1.0
        turn_cf = generator.normal(size=(most + 1, NUM_FEATURES)) / width
        return replace(scaled, turn_cf=turn_cf, phase_f=generator.uniform(0, 2 * np.pi, NUM_FEATURES))

    def project(self, embedding_nd: NDArray[np.floating]) -> FloatArray:
        """Return embeddings on the axes, and the logarithm of the length of the rest, (n, c + 1)."""
        centred_nd = np.asarray(embedding_nd, np.float64) - self.mean_d
        values_nc = centred_nd @ self.axes_dc
        inside_n = ((values_nc / np.maximum((self.axes_dc**2).sum(axis=0), EPSILON) ** 0.5) ** 2).sum(axis=1)
        rest_n = np.maximum((centred_nd**2).sum(axis=1) - inside_n, 0.0)
        beyond_n = (0.5 * np.log(rest_n + 1e-9) - self.beyond[0]) / self.beyond[1]
        return np.column_stack([values_nc, beyond_n])

    def expand(self, values_nc: FloatArray) -> FloatArray:
        """Return the random Fourier features of projected embeddings, (n, f)."""
        return np.asarray(np.sqrt(2 / NUM_FEATURES) * np.cos(values_nc @ self.turn_cf + self.phase_f))


@dataclass(frozen=True)
class Detector:
    """What one detector found: `value` above `limit` is an alarm. `p` is adjusted for the other detectors."""

    name: str
    value: float
    limit: float
    p: float
    alarmed: bool


@dataclass(frozen=True)
class Drift:
    """The result for a window. `p` is that of all detectors together; `can_tell` False: too few blocks for the level.

    `floor` is the smallest p that so few blocks can give. Each of `num_blocks` is `together` neighbours put together.
    """

    p: float
    level: float
    floor: float
    detectors: tuple[Detector, ...]
    num_blocks: tuple[int, int]
    together: int = 1

    @property
    def can_tell(self) -> bool:
        return self.floor <= self.level

    @property
    def found(self) -> bool:
        return self.p <= self.level


def find_drift(reference: Sample, window: Sample, basis: Basis | None, level: float, *, seed: int = 0) -> Drift:
    """Say whether a window differs from the reference, wrongly in a share `level` of windows that do not.

    Example, for one detector: a reference of 9 blocks and a window of 1, further from the rest than each of the 9 is.
    Of all ten ways to deal one block as the window, the real one is the most extreme: p = 1/10. With a level of 1 % so
    few blocks can never show drift: `can_tell` is False.
    """
    sums = _sum_blocks(reference, window, basis)
    number_g, num_window = len(sums.count_g), sums.num_window
    floor = 1 / comb(number_g, num_window)
    generator = np.random.default_rng(seed)
    real_g = np.arange(number_g) < num_window
    order_g = generator.permutation(number_g)  # folds go by this order: they are then a function of who is dealt where
    values_bj = _measure(sums, real_g[None], order_g)
    for deals in (FIRST_DEALS, min(MAX_DEALS, ceil(DEALS_BY_LEVEL / level) - 1) - FIRST_DEALS):
        if deals > 0:
            dealt_bg = generator.permuted(np.tile(real_g, (deals, 1)), axis=1)
            values_bj = np.concatenate([values_bj, _measure(sums, dealt_bg, order_g)])
        p, adjusted_j, limit_j = combine(values_bj, level)
        p, adjusted_j = max(p, floor), np.maximum(adjusted_j, floor)
        if p > CLEAR * level and p > CLEAR / FIRST_DEALS:
            break
    found = [
        Detector(name, float(values_bj[0, j]), float(limit_j[j]), float(adjusted_j[j]), bool(adjusted_j[j] <= level))
        for j, name in enumerate(sums.names)
    ]
    return Drift(p, level, floor, tuple(found), (number_g - num_window, num_window), sums.together)


def combine(values_bj: FloatArray, level: float) -> tuple[float, FloatArray, FloatArray]:
    """Return the p of all detectors together, that of each beside the others, and the limit of each, (j,).

    The first row is real, the others are dealt. Each value becomes the share of rows that are at least as large; a row
    is as extreme as its smallest share (Tippett 1931); what shares are left decides where two are equal. The p of the
    detector with the smallest share is that of all together: no detector has a smaller one.
    """
    number = len(values_bj)
    sorted_bj = np.sort(values_bj, axis=0)
    p_bj = (
        np.column_stack(
            [
                number - np.searchsorted(sorted_bj[:, j], values_bj[:, j] - EPSILON, side="left")
                for j in range(sorted_bj.shape[1])
            ]
        )
        / number
    )
    least_b = p_bj.min(axis=1)
    extreme_b = least_b * (1 + 1e-6 * np.log(p_bj).mean(axis=1))
    p = max(float((extreme_b <= extreme_b[0]).mean()), float(least_b[0]))
    adjusted_j = np.maximum((least_b[:, None] <= p_bj[0]).mean(axis=0), p)
    adjusted_j[p_bj[0] == least_b[0]] = p
    # The largest share that is still rare enough, and the value that a detector has there.
    rare = float(np.sort(least_b)[max(0, int(level * number) - 1)])
    limit_j = sorted_bj[number - max(1, round(rare * number))]
    return p, np.minimum(adjusted_j, 1.0), limit_j


@dataclass(frozen=True)
class _Sums:
    """Sums over the images of each block; those of the window come first. `parts` are the columns of each detector."""

    names: tuple[str, ...]
    parts: tuple[slice, ...]
    count_g: FloatArray
    feature_gf: FloatArray
    weigh_f: FloatArray
    first_gc: FloatArray | None
    second_gcc: FloatArray | None
    num_window: int
    together: int


def _sum_blocks(reference: Sample, window: Sample, basis: Basis | None) -> _Sums:
    block_n, num_window, together = _number_blocks(reference.block_n, window.block_n)
    number_g = int(block_n.max()) + 1
    features: dict[str, FloatArray] = {}
    first_gc = second_gcc = None
    if basis is not None and window.embedding_nd is not None and reference.embedding_nd is not None:
        values_nc = basis.project(np.concatenate([window.embedding_nd, reference.embedding_nd]))
        features["mmd"] = basis.expand(values_nc)
        if num_window > 1:
            first_gc = _add(values_nc, block_n, number_g)
            ends_g = np.bincount(block_n).cumsum()[:-1]
            parts = np.split(values_nc[np.argsort(block_n, kind="stable")], ends_g)
            second_gcc = np.stack([part_nc.T @ part_nc for part_nc in parts])
    features |= {
        "classes": np.concatenate([window.chosen_nk, reference.chosen_nk]).astype(np.float64),
        "abstained": np.concatenate([window.abstained_n, reference.abstained_n]).astype(np.float64)[:, None],
        "confidence": _cut(np.concatenate([window.confidence_n, reference.confidence_n])),
    }
    for name in window.quality:
        if name in reference.quality:
            features[name] = _cut(np.concatenate([window.quality[name], reference.quality[name]]))
    names = (*(["classifier"] if first_gc is not None else []), *features)
    ends = np.cumsum([0, *(part.shape[1] for part in features.values())])
    joined_nf = np.concatenate(list(features.values()), axis=1)
    mean_f = joined_nf.mean(axis=0)
    # Of an indicator: 1 / (p (1 - p)), as in the tests of Pearson and of Anderson and Darling. One that is all 0 or all
    # 1 says nothing.
    spread_f = mean_f * (1 - mean_f)
    weigh_f = np.where(spread_f > EPSILON, 1 / np.maximum(spread_f, EPSILON), 0.0)
    if "mmd" in features:
        weigh_f[:NUM_FEATURES] = 1.0
    return _Sums(
        names,
        tuple(slice(int(a), int(b)) for a, b in pairwise(ends)),
        np.bincount(block_n, minlength=number_g).astype(np.float64),
        _add(joined_nf, block_n, number_g),
        weigh_f,
        first_gc,
        second_gcc,
        num_window,
        together,
    )


def _number_blocks(reference_n: IntArray, window_n: IntArray) -> tuple[IntArray, int, int]:
    """Return a number for the block of each image, the window first; how many are its; how many are put together."""
    window_n = np.unique(window_n, return_inverse=True)[1]
    reference_n = np.unique(reference_n, return_inverse=True)[1]
    together = ceil((int(window_n.max()) + 1) / MAX_WINDOW_BLOCKS)
    window_n, reference_n = window_n // together, reference_n // together
    num_window = int(window_n.max()) + 1
    block_n = np.concatenate([window_n, reference_n + num_window]).astype(np.int64)
    return block_n, num_window, together


def _cut(value_n: FloatArray) -> FloatArray:
    """Return whether each value is at most each of some quantiles of all of them, (n, edges); NaN is above all."""
    known_n = value_n[np.isfinite(value_n)]
    if not len(known_n):
        return np.zeros((len(value_n), 1))
    edges = np.unique(np.quantile(known_n, np.linspace(0, 1, NUM_EDGES + 2)[1:-1]))
    return np.asarray(value_n[:, None] <= edges, dtype=np.float64)


def _add(value_nf: FloatArray, block_n: IntArray, number_g: int) -> FloatArray:
    out = np.zeros((number_g, value_nf.shape[1]))
    np.add.at(out, block_n, value_nf)
    return out


def _measure(sums: _Sums, dealt_bg: BoolArray, order_g: IntArray) -> FloatArray:
    """Return how far apart the sides of each deal are, by each detector, (b, j). `dealt_bg`: who is in the window."""
    size = max(
        1, CHUNK_CELLS // (sums.feature_gf.shape[1] + (0 if sums.first_gc is None else sums.first_gc.shape[1] ** 2))
    )
    parts = []
    for start in range(0, len(dealt_bg), size):
        dealt = dealt_bg[start : start + size].astype(np.float64)
        columns = _measure_shares(sums, dealt)
        if sums.first_gc is not None:
            columns = [_measure_classifier(sums, dealt, order_g), *columns]
        parts.append(np.column_stack(columns))
    return np.concatenate(parts)


def _measure_shares(sums: _Sums, dealt_bg: FloatArray) -> list[FloatArray]:
    """Return the weighted squared differences of means, times the number of images that such a difference stands on."""
    inside_b, total = dealt_bg @ sums.count_g, float(sums.count_g.sum())
    sum_bf = dealt_bg @ sums.feature_gf
    rest_bf = sums.feature_gf.sum(axis=0) - sum_bf
    gap_bf = sum_bf / inside_b[:, None] - rest_bf / (total - inside_b)[:, None]
    effective_b = inside_b * (total - inside_b) / total
    square_bf = gap_bf**2 * sums.weigh_f
    return [square_bf[:, part].sum(axis=1) * effective_b for part in sums.parts]


def _measure_classifier(sums: _Sums, dealt_bg: FloatArray, order_g: IntArray) -> FloatArray:
    """Return how far a linear classifier puts the sides apart on held-out blocks, in standard deviations, (b,).

    Fisher's discriminant, cross-fitted: the blocks of a side are dealt to folds in turn, and those of a fold are scored
    by a classifier fitted on the others. Lopez-Paz & Oquab, "Revisiting classifier two-sample tests", ICLR 2017.
    """
    assert sums.first_gc is not None and sums.second_gcc is not None
    folds = min(FOLDS, sums.num_window)
    number_c = sums.first_gc.shape[1]
    flat_gc = sums.second_gcc.reshape(len(sums.count_g), -1)
    sides = (dealt_bg, 1 - dealt_bg)
    fold_bg = np.empty(dealt_bg.shape, np.int64)
    placed = [np.cumsum(side[:, order_g], axis=1) - 1 for side in sides]
    fold_bg[:, order_g] = np.where(dealt_bg[:, order_g] > 0, *placed) % folds
    score_b = [np.zeros(len(dealt_bg)), np.zeros(len(dealt_bg))]
    for fold in range(folds):
        kept = fold_bg != fold
        means, counts = [], []
        for side in sides:
            learned = side * kept
            counts.append(np.maximum(learned @ sums.count_g, 1.0))
            means.append(learned @ sums.first_gc / counts[-1][:, None])
        second = (kept.astype(np.float64) @ flat_gc).reshape(-1, number_c, number_c)
        for mean_bc, count_b in zip(means, counts, strict=True):
            second -= count_b[:, None, None] * mean_bc[:, :, None] * mean_bc[:, None, :]
        spread = second / (counts[0] + counts[1])[:, None, None]
        ridge_b = RIDGE * np.trace(spread, axis1=1, axis2=2) / number_c + EPSILON
        spread += ridge_b[:, None, None] * np.eye(number_c)
        gap_bc = means[0] - means[1]
        weight_bc = np.linalg.solve(spread, gap_bc[:, :, None])[:, :, 0]
        length_b = np.sqrt(np.maximum((weight_bc * gap_bc).sum(axis=1), EPSILON))
        for number, side in enumerate(sides):
            held_bc = (side * ~kept) @ sums.first_gc - ((side * ~kept) @ sums.count_g)[:, None] * (
                means[0] + means[1]
            ) / 2
            score_b[number] += (held_bc * weight_bc).sum(axis=1) / length_b
    inside_b, total = dealt_bg @ sums.count_g, float(sums.count_g.sum())
    return np.asarray(
        (score_b[0] / inside_b - score_b[1] / (total - inside_b)) * np.sqrt(inside_b * (total - inside_b) / total)
    )


def keep_one_each(sample: Sample, seed: int = 0) -> Sample:
    """Return one image of each block, by lot: images that are independent, whatever their blocks are like."""
    order_n = np.random.default_rng(seed).permutation(len(sample))
    return sample.take(np.sort(order_n[np.unique(sample.block_n[order_n], return_index=True)[1]]))
