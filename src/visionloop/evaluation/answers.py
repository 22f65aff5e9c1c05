"""A model's answers compared with the truth, for one label an image and for several. Pure.

Dimensions in names: n images, k classes. One label: an index into the classes for each image (n,); several: which of
the classes, as booleans (n, k).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloop.data.shards import Prepared
from visionloop.evaluation.label_metrics import (
    BoolArray,
    compute_label_figures,
    compute_label_losses,
    compute_label_metrics,
    compute_swaps,
)
from visionloop.evaluation.metrics import (
    ClassFigures,
    compute_class_figures,
    compute_confusion,
    compute_metrics,
)
from visionloop.evaluation.resampling import FloatArray, IntArray, compute_share_interval, sum_keys
from visionloop.params import Evaluate
from visionloop.predictor import Choices, compute_confidence, name_choices
from visionloop.records import Interval

JOINED_CHARS = 24


@dataclass(frozen=True)
class Answers:
    """The answers for some images (`chosen`) and the truth (`labels`): both (n,), or both (n, k).

    `key_n` says which images belong together: equal numbers for equal keys (`resampling.code_keys`). `abstained_n` says
    for which the model does not know; None: it has no such rule.
    """

    labels: Choices
    probs_nk: NDArray[np.floating]
    chosen: Choices
    classes: tuple[str, ...]
    key_n: IntArray
    abstained_n: BoolArray | None = None

    @property
    def is_several(self) -> bool:
        return self.labels.ndim == 2

    @property
    def confidence_n(self) -> FloatArray:
        return compute_confidence(self.probs_nk, self.chosen).astype(np.float64)

    @property
    def hits_n(self) -> BoolArray:
        """Whether each answer is right, (n,). With several labels: exactly the true ones, none missing or extra."""
        same = np.equal(self.labels, self.chosen)
        return np.asarray(same.all(axis=1) if self.is_several else same, dtype=bool)

    @property
    def merit_n(self) -> FloatArray:
        """The probability that each answer gives to the truth, (n,); for several labels its logarithm."""
        if self.is_several:
            return np.asarray(-compute_label_losses(self.labels.astype(bool), self.probs_nk).sum(axis=1))
        return self.probs_nk[np.arange(len(self.labels)), self.labels].astype(np.float64)

    def name_labels(self) -> list[tuple[str, ...]]:
        """Return the true labels of each image."""
        return name_choices(self.labels, self.classes)

    def name_chosen(self) -> list[tuple[str, ...]]:
        """Return the answered labels of each image."""
        return name_choices(self.chosen, self.classes)


def compute_answered(answers: Answers) -> dict[str, Interval]:
    """Return the share of images that is answered, and the share of these that is right; nothing without a rule."""
    if answers.abstained_n is None:
        return {}
    answered_g = sum_keys(~answers.abstained_n, answers.key_n)
    figures = {"answered": compute_share_interval(answered_g, sum_keys(np.ones(len(answers.labels)), answers.key_n))}
    if answered_g.any():
        hits_g = sum_keys(answers.hits_n & ~answers.abstained_n, answers.key_n)
        figures["answered_accuracy"] = compute_share_interval(hits_g, answered_g)
    return figures


def compute_answer_metrics(answers: Answers, section: Evaluate) -> dict[str, Interval]:
    """Compute the figures of the answers' task, each with its interval over keys."""
    draw = {"resamples": section.resamples, "seed": section.seed}
    if answers.is_several:
        labels, chosen = answers.labels.astype(bool), answers.chosen.astype(bool)
        return compute_label_metrics(labels, answers.probs_nk, chosen, answers.key_n, **draw)
    labels_n, chosen_n = answers.labels.astype(np.int64), answers.chosen.astype(np.int64)
    return compute_metrics(labels_n, answers.probs_nk, chosen_n, answers.classes, answers.key_n, **draw)


def compute_tables(answers: Answers) -> tuple[IntArray, list[ClassFigures]]:
    """Return the confusion matrix (k, k) and the figures of each class. For several labels see `compute_swaps`."""
    if answers.is_several:
        labels, chosen = answers.labels.astype(bool), answers.chosen.astype(bool)
        figures = compute_label_figures(labels, answers.probs_nk, chosen, answers.classes, answers.key_n)
        return compute_swaps(labels, chosen), figures
    labels_n, chosen_n = answers.labels.astype(np.int64), answers.chosen.astype(np.int64)
    confusion_kk = compute_confusion(labels_n, chosen_n, len(answers.classes))
    return confusion_kk, compute_class_figures(labels_n, chosen_n, answers.classes, answers.key_n)


def get_truth(prepared: Prepared, rows_n: IntArray) -> Choices:
    """Return the true classes of some rows of prepared data: (n,), or for multilabel (n, k)."""
    if prepared.targets_nk is None:
        return prepared.label_n[rows_n]
    return prepared.targets_nk[rows_n].astype(bool)


def find_worst(answers: Answers, number: int) -> NDArray[np.int64]:
    """Return the wrong answers that gave the truth the least probability, worst first, at most `number`."""
    wrong_n = np.flatnonzero(~answers.hits_n)
    return wrong_n[np.argsort(answers.merit_n[wrong_n], kind="stable")][:number]


def join_names(names: Sequence[str]) -> str:
    """Join labels for people: as many as fit into 24 characters, then how many more. `nothing` without labels."""
    shown, kept = ", ".join(names) or "nothing", len(names)
    while len(shown) > JOINED_CHARS and kept > 1:
        kept -= 1
        shown = f"{', '.join(names[:kept])} +{len(names) - kept}"
    return shown
