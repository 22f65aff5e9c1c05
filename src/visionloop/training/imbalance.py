"""What is done about classes of very different size, and why. Pure.

    ratio (largest class : smallest)    below 3    3 to 20    20 and more
    `auto` for one label an image       none       weights    sampler
    `auto` for several labels           none       weights    focal

Below 3 a reweighting changes little but makes probabilities wrong. Weights (each class counts alike in the loss) keep
every image in every epoch. From 20 on a rare image would come seldom and with a great weight: such steps are noisy, so
rare images are drawn more often instead (Buda, Maki and Mazurowski, 2018, found that best over ratios of 10 to 5000).
An image with several labels cannot be drawn for one of them alone: there the focal loss (Lin et al., 2017, made for
1 : 1000) takes over. For several labels the ratio is that of images without a class to images with it, the worst class.

Dimensions: n training images, k classes, u units (1 for binary, else k), 2 the answers no and yes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visionloop.data.shards import IntArray
from visionloop.training.job import Job

WEIGHTS_FROM = 3.0
MORE_FROM = 20.0
FOCAL_GAMMA = 2.0
MAX_NAMED = 5

Kind = Literal["none", "weights", "sampler", "focal"]
Weights = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class ImbalancePlan:
    """What is done about imbalance.

    `weights_2u` are for `losses.Objective`; `row_weights_n` says how often each training image is to be drawn, in the
    order of the training rows; `gamma` is that of the focal loss, 0 for none. `sentence` tells it all.
    """

    kind: Kind
    counts: dict[str, int]
    ratio: float
    sentence: str
    gamma: float = 0.0
    weights_2u: Weights | None = None
    row_weights_n: NDArray[np.float64] | None = None

    def to_tags(self) -> dict[str, str]:
        """Return the tags of a run that say what was chosen, and on what."""
        counts = json.dumps(self.counts, sort_keys=True, ensure_ascii=False)
        return {
            "imbalance.chosen": self.kind,
            "imbalance.ratio": f"{self.ratio:.3g}",
            "imbalance.counts": counts if len(counts) <= 5000 else counts[:4999] + "…",
        }


def plan_imbalance(job: Job) -> ImbalancePlan:
    """Choose what is done for the training rows of a job."""
    prepared, rows = job.prepared, job.train_rows
    targets = prepared.label_n if prepared.targets_nk is None else prepared.targets_nk
    return choose_imbalance(targets[rows], prepared.classes, prepared.task, job.params.train.imbalance)


def choose_imbalance(
    targets: NDArray[np.integer], classes: Sequence[str], task: str, wanted: Literal["auto"] | Kind
) -> ImbalancePlan:
    """Choose by the counts of the classes, unless a kind is wanted. `targets`: classes (n), or 0 and 1 (n, k)."""
    several = targets.ndim == 2
    counts_k = targets.sum(axis=0, dtype=np.int64) if several else np.bincount(targets, minlength=len(classes))
    ratio = _compute_ratio(counts_k, len(targets), several=several)
    kind = _choose(ratio, several=several) if wanted == "auto" else wanted
    counts = {name: int(count) for name, count in zip(classes, counts_k, strict=True)}
    return ImbalancePlan(
        kind=kind,
        counts=counts,
        ratio=ratio,
        sentence=_describe(kind, counts, len(targets), ratio, chosen=wanted == "auto"),
        gamma=FOCAL_GAMMA if kind == "focal" else 0.0,
        weights_2u=compute_weights(counts_k, len(targets), task) if kind == "weights" else None,
        row_weights_n=compute_row_weights(targets, counts_k) if kind == "sampler" else None,
    )


def compute_weights(counts_k: IntArray, num_images: int, task: str) -> Weights:
    """Return the weights (no, yes) of each unit: inverse to the counts.

    One label an image: n / (k count), so that the mean weight of a training image is 1 (scikit-learn's "balanced").
    Several: yes weighs (images without the class) / (images with it), no weighs 1 (`pos_weight` in torch).
    """
    counts = np.maximum(counts_k, 1).astype(np.float64)
    if task == "multilabel":
        return (1.0,) * len(counts), tuple(float(v) for v in np.maximum(num_images - counts, 1) / counts)
    weights = tuple(float(v) for v in num_images / (len(counts) * counts))
    return (weights[:1], weights[1:]) if task == "binary" else ((1.0,) * len(weights), weights)


def compute_row_weights(targets: NDArray[np.integer], counts_k: IntArray) -> NDArray[np.float64]:
    """Return how often each image is drawn, mean 1: inverse to the count of its class, of several to its rarest's."""
    rarity_k = 1.0 / np.maximum(counts_k, 1)
    if targets.ndim == 1:
        weight_n = rarity_k[targets]
    else:
        # An image without any label stands for "no" to all: as common as the commonest.
        weight_n = np.maximum((targets > 0) * rarity_k, rarity_k.min()).max(axis=1)
    return np.asarray(weight_n / weight_n.mean(), dtype=np.float64)


def _compute_ratio(counts_k: IntArray, num_images: int, *, several: bool) -> float:
    counts = np.maximum(counts_k, 1)
    if several:
        return float(max(1.0, ((num_images - counts_k) / counts).max()))
    return float(counts.max() / counts.min())


def _choose(ratio: float, *, several: bool) -> Kind:
    if ratio < WEIGHTS_FROM:
        return "none"
    if ratio < MORE_FROM:
        return "weights"
    return "focal" if several else "sampler"


DOES = {
    "none": "nothing is done about it",
    "weights": "the loss weighs each class alike",
    "sampler": "images of rare classes are drawn more often",
    "focal": f"the focal loss (gamma {FOCAL_GAMMA:g}) lets easy answers count less",
}


def _describe(kind: Kind, counts: dict[str, int], num_images: int, ratio: float, *, chosen: bool) -> str:
    """Return the sentence for people: the largest and the smallest classes with their counts, and what is done."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) > MAX_NAMED:
        ordered = [*ordered[:2], *ordered[-2:]]
    named = ", ".join(f"{name} {count:,}" for name, count in ordered)
    more = f" ({len(counts)} classes)" if len(counts) > MAX_NAMED else ""
    by = "auto chose" if chosen else "as asked for:"
    return f"imbalance: {by} {kind}, {DOES[kind]} ({num_images:,} images: {named}{more}; ratio {ratio:.1f})"
