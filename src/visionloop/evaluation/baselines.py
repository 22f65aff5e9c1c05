"""What answers cost little, and whether the network beats them: the majority class, and simple heads on embeddings.

The heads see what the network itself makes of some training images: neighbours that vote, and a linear head. Reads the
prepared images it is asked for; writes nothing. Dimensions in names: m test images, n training images, d, k classes.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloop.data.shards import Prepared
from visionloop.evaluation.answers import Answers
from visionloop.evaluation.metrics import compute_share
from visionloop.evaluation.resampling import IntArray, compute_key_interval, compute_wilson, count_keys, sum_keys
from visionloop.features.neighbours import compute_votes, find_neighbours, to_targets
from visionloop.predictor import FloatArray, Predictor, choose_batch_size
from visionloop.records import Interval

NEIGHBOURS = 10
MAJORITY = "majority class"  # of the training side
BoolArray = NDArray[np.bool_]
Head = Callable[[FloatArray, NDArray[np.uint8], FloatArray], NDArray[np.floating]]


@dataclass(frozen=True)
class Baseline:
    """How often a baseline is right, and how much oftener the network is (`gain`), each with its interval over keys."""

    name: str
    accuracy: Interval
    gain: Interval

    @property
    def verdict(self) -> str:
        """`beaten` if the whole interval of the gain is above 0, `better` if all of it is below, else `unclear`."""
        if self.gain.low is None or self.gain.high is None:
            return "unclear"
        return "beaten" if self.gain.low > 0 else "better" if self.gain.high < 0 else "unclear"


def compute_baselines(
    predictor: Predictor, prepared: Prepared, answers: Answers, embedding_md: FloatArray, *, limit: int
) -> list[Baseline]:
    """Judge each baseline on the test images. `limit` bounds the training images to embed; 0: the majority alone.

    Without a training image there is no baseline.
    """
    rows_n = prepared.rows("train")
    if not len(rows_n):
        return []
    counts_k = prepared.count_classes(rows_n)
    said_mk = np.zeros((len(embedding_md), len(prepared.classes)), bool)
    if answers.is_several:
        said_mk[:, counts_k > len(rows_n) / 2] = True
    else:
        said_mk[:, int(counts_k.argmax())] = True
    found = [make_baseline(MAJORITY, said_mk, answers)]
    chosen_n = choose_train_rows(prepared, limit)
    if not len(chosen_n):
        return found
    table_nd, targets_nk = _embed(predictor, prepared, chosen_n), _get_targets(prepared, chosen_n)
    if not (np.isfinite(table_nd).all() and np.isfinite(embedding_md).all()):
        return found
    for name, head in (("neighbours", vote), ("linear head", fit_linear)):
        probs_mk = head(table_nd, targets_nk, embedding_md)
        top_mk = np.arange(probs_mk.shape[1]) == probs_mk.argmax(axis=1)[:, None]
        found.append(make_baseline(name, probs_mk >= 0.5 if answers.is_several else top_mk, answers))
    return found


def make_baseline(name: str, said_mk: BoolArray, answers: Answers) -> Baseline:
    """Compare some answers, as sets of classes, with those of the network on the same images.

    What is the same for every image has no luck of its own: its share is a plain number, against which the interval of
    the network's accuracy is held. So `evaluate` and the gate (`check_baseline`) say the same.
    """
    truth = answers.labels
    truth_mk = truth.astype(bool) if answers.is_several else np.arange(said_mk.shape[1]) == truth[:, None]
    hits_m = (said_mk == truth_mk).all(axis=1)
    gain_m = answers.hits_n.astype(np.float64) - hits_m
    key_m = answers.key_n
    right = compute_share(hits_m, key_m)
    if name == MAJORITY:
        bounds = compute_share(answers.hits_n, key_m)
        low, high = (None if bound is None else bound - right.value for bound in (bounds.low, bounds.high))
        return Baseline(name, right, Interval(bounds.value - right.value, low, high))
    gain = compute_key_interval(sum_keys(gain_m, key_m), sum_keys(np.ones(len(key_m)), key_m))
    if not gain_m.any():  # where all answers are equally right, that many keys could still hide a difference
        number = count_keys(key_m)
        room = compute_wilson(0, number).high
        gain = Interval(0.0, -(room or 0.0), room)
    return Baseline(name, right, gain)


def choose_train_rows(prepared: Prepared, limit: int) -> IntArray:
    """Return about `limit` rows of the training side, ascending: of each class the first by sha256, at least two."""
    rows_n = prepared.rows("train")
    if len(rows_n) <= limit or limit <= 0:
        return rows_n if limit > 0 else rows_n[:0]
    label_n = prepared.label_n[rows_n]
    parts = []
    for label in np.unique(label_n):
        mine = rows_n[label_n == label]
        parts.append(mine[: max(2, round(limit * len(mine) / len(rows_n)))])
    return np.sort(np.concatenate(parts))


def vote(table_nd: FloatArray, targets_nk: NDArray[np.uint8], query_md: FloatArray) -> NDArray[np.floating]:
    """Return what the 10 nearest training images vote, (m, k): by cosine, weighed by 1 / distance."""
    distance_mk, row_mk = find_neighbours(query_md, table_nd, NEIGHBOURS)
    return compute_votes(distance_mk, targets_nk[row_mk], "distance")


def fit_linear(table_nd: FloatArray, targets_nk: NDArray[np.uint8], query_md: FloatArray) -> NDArray[np.floating]:
    """Return the probabilities of logistic regressions on scaled embeddings, (m, k), each class against the rest."""
    from sklearn.linear_model import LogisticRegression

    center_d, scale_d = table_nd.mean(axis=0), table_nd.std(axis=0)
    scale_d = np.where(scale_d > 0, scale_d, 1)
    probs_mk = np.tile(targets_nk.mean(axis=0, dtype=np.float64), (len(query_md), 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a head that has not converged is still a baseline
        for k in range(targets_nk.shape[1]):
            if 0 < targets_nk[:, k].sum() < len(targets_nk):
                head = LogisticRegression(max_iter=100).fit((table_nd - center_d) / scale_d, targets_nk[:, k])
                probs_mk[:, k] = head.predict_proba((query_md - center_d) / scale_d)[:, 1]
    return probs_mk


def describe_baseline(baseline: Baseline, accuracy: float) -> str:
    """Return a line if the network is not clearly better than a baseline; else nothing."""
    against = f"{100 * accuracy:.1f} % against {100 * baseline.accuracy.value:.1f} %"
    if baseline.name == MAJORITY and baseline.verdict != "beaten":
        so = "too few test images to say that it has learned" if baseline.gain.value > 0 else "nothing was learned"
        return f"LOOK: not clearly better than the training side's most frequent class for every image: {against}; {so}"
    if baseline.verdict == "better":
        return f"LOOK: a simple head ({baseline.name}) on the network's own embeddings is better: {against}"
    if baseline.gain.value < 0:
        return f"a simple head ({baseline.name}) on the network's own embeddings is as good: {against}"
    return ""


def _embed(predictor: Predictor, prepared: Prepared, rows_n: IntArray) -> FloatArray:
    size = choose_batch_size(prepared.size_hw)
    batches = [rows_n[i : i + size] for i in range(0, len(rows_n), size)]
    return np.concatenate([predictor.run(prepared.read(batch)).embedding_nd for batch in batches])


def _get_targets(prepared: Prepared, rows_n: IntArray) -> NDArray[np.uint8]:
    if prepared.targets_nk is None:
        return to_targets(prepared.label_n[rows_n], len(prepared.classes))
    return prepared.targets_nk[rows_n]
