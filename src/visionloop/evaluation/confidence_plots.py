"""What is on a card about confidence, for people: in words, and as figures (PNG bytes).

The figures show the validation side, on which the limits were chosen, from the logits that a bundle keeps.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.bundle import Bundle
from visionloop.confidence import compute_probs, describe_limit
from visionloop.data.fonts import number_names
from visionloop.evaluation.answers import Answers
from visionloop.evaluation.calibration import FIGURES
from visionloop.evaluation.plots import BLUE, GREEN, INK, MUTED, RED, open_figure
from visionloop.evaluation.promises import BoolArray, FloatArray, compute_risk_curve
from visionloop.evaluation.thresholds import Sweep, sweep_thresholds
from visionloop.predictor import choose_classes, compute_confidence
from visionloop.records import Card, Interval

MAX_POINTS = 2000
MOST_FEWER = 0.1  # of the test images are answered than of the validation images; from here on it is told
MAX_SWEPT = 6  # classes of a multilabel model whose thresholds are drawn


def describe_confidence(card: Card) -> dict[str, str]:
    """Return what a card says of confidence and of not answering, in words, by its title."""
    tuning = card.tuning or {}
    words = {"Temperature": f"{card.temperature:.4g}"}
    if card.biases:
        words["Biases"] = ", ".join(f"{name} {value:+.2f}" for name, value in sorted(card.biases.items()))
    if tuning.get("why"):
        words["Tuned on"] = f"nothing: {tuning['why']}"
    elif tuning:
        words["Tuned on"] = f"{tuning['num_images']:,} validation images ({tuning['num_keys']:,} independent)"
        for name, value in tuning["before"].items():
            words[f"Held-out {FIGURES[name]}"] = f"{value:.4f} before, {tuning['after'][name]:.4f} after"
    if limits := describe_limits(card):
        words["Does not know"] = limits
    return words


def describe_limits(card: Card) -> str:
    """Say when a model does not know, or that what was wanted cannot be promised; nothing if nothing was wanted."""
    facts, rule = (card.tuning or {}).get("abstain"), card.abstain
    if rule is None:
        if facts is None or facts["wanted"]["error"] is None:
            return ""
        wanted = facts["wanted"]["error"]
        return (
            f"answers everything: at most {wanted:.2%} wrong cannot be promised; "
            f"the lowest bound on validation is {facts['best_bound']:.2%}"
        )
    parts = []
    if rule.get("confidence") is not None:
        parts.append(f"below confidence {describe_limit(rule['confidence'])}")
    if rule.get("distance") is not None:
        parts.append(f"beyond distance {rule['distance']:.4g} to the {rule['neighbours']}th nearest validation image")
    promised = (facts or {}).get("promised")
    return " or ".join(parts) + (f"; at most {promised:.2%} wrong is promised" if promised is not None else "")


def describe_answered(card: Card, metrics: dict[str, Interval]) -> str:
    """Say what not answering came to on the test side; nothing where no rule was wanted."""
    limits = describe_limits(card)
    if "answered" not in metrics:
        return f"LOOK: {limits}" if limits else ""
    line = f"answers {metrics['answered'].value:.1%} of the test images"
    validation = _get_answered(card)
    is_far = validation is not None and validation - metrics["answered"].value > MOST_FEWER
    if is_far:
        line += f", {validation:.1%} of the validation images"
    if "answered_accuracy" not in metrics:
        return f"LOOK: {line}"
    wrong = 1 - metrics["answered_accuracy"].value
    wanted = (card.abstain or {}).get("error")
    look = "LOOK: " if is_far or (wanted is not None and wrong > wanted) else ""
    return f"{look}{line}; {wrong:.2%} of these are wrong" + (f" (wanted: {wanted:.2%})" if wanted is not None else "")


def _get_answered(card: Card) -> float | None:
    """Return the share of independent validation images that is answered; None where no share was promised."""
    tuning = card.tuning or {}
    number = (tuning.get("abstain") or {}).get("num_answered")
    return number / tuning["num_keys"] if number and card.abstain and tuning.get("num_keys") else None


def draw_certainty(bundle: Bundle, answers: Answers) -> dict[str, bytes]:
    """Draw what thresholds give, and what not answering brings on validation and test side. None of an old bundle."""
    card = bundle.card
    with np.load(bundle.folder / "reference.npz", allow_pickle=False) as arrays:
        if "logits_nk" not in arrays:
            return {}
        probs_nk = compute_probs(arrays["logits_nk"], card)
        truth: Any = arrays["targets_nk"].astype(bool) if card.task == "multilabel" else arrays["label_n"]
    chosen = choose_classes(probs_nk, card)
    same = np.equal(truth, chosen)
    validation = (compute_confidence(probs_nk, chosen), np.asarray(same.all(axis=1) if same.ndim == 2 else same))
    rule = card.abstain or {}
    share = None if answers.abstained_n is None else float((~answers.abstained_n).mean())
    sides = [("validation", *validation), ("test", answers.confidence_n, answers.hits_n)]
    figures = {}
    if rule or not all(hits_n.all() for _, _, hits_n in sides):  # else its lines lie on the axis
        figures["risk"] = draw_risk_coverage(sides, error=rule.get("error"), share=share)
    shown = number_names(card.classes)
    if card.threshold is not None:
        sweep = sweep_thresholds(probs_nk[:, 1], truth == 1)
        figures["threshold"] = draw_sweeps([(shown[card.classes[1]], sweep, card.threshold)])
    elif card.thresholds is not None:
        rarest = np.argsort(truth.sum(axis=0), kind="stable")[:MAX_SWEPT]
        names = [card.classes[k] for k in rarest]
        sweeps = [
            (shown[name], sweep_thresholds(probs_nk[:, k], truth[:, k]), card.thresholds[name])
            for name, k in zip(names, rarest, strict=True)
        ]
        figures["threshold"] = draw_sweeps(sweeps)
    return figures


def draw_sweeps(sweeps: Sequence[tuple[str, Sweep, float]]) -> bytes:
    """Draw precision, recall and F1 of some classes against the threshold, and the one that is on the card."""
    rows = -(-len(sweeps) // 2) if len(sweeps) > 1 else 1
    with open_figure(9.6 if len(sweeps) > 1 else 6.4, 3.4 * rows + 0.6, [name for name, *_ in sweeps]) as (
        figure,
        sink,
    ):
        for place, (name, sweep, threshold) in enumerate(sweeps):
            axes = figure.add_subplot(rows, min(2, len(sweeps)), place + 1)
            keep_c = _thin(len(sweep.cut_c))
            lines = (("precision", sweep.precision_c, GREEN), ("recall", sweep.recall_c, BLUE), ("F1", sweep.f1_c, RED))
            for label, value_c, color in lines:
                axes.step(sweep.cut_c[keep_c], value_c[keep_c], where="post", color=color, linewidth=1.5, label=label)
            axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"threshold {threshold:.3g}")
            axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="answers yes from this probability on", ylabel="share")
            axes.set_title(name if len(name) <= 40 else f"{name[:39]}…")
            axes.grid()
            axes.legend(loc="lower left", frameon=False)
    return sink.getvalue()


def draw_risk_coverage(
    sides: Sequence[tuple[str, NDArray[np.floating], BoolArray]], *, error: float | None, share: float | None
) -> bytes:
    """Draw the share of wrong answers against the share of images that is answered, the surest first.

    `sides` are name, confidence and hits of each line. `error` is what was asked for, `share` what is answered by the
    rule on the card; None: there is none.
    """
    with open_figure(6.4, 4.0) as (figure, sink):
        axes = figure.add_subplot()
        top = 0.0
        for (name, confidence_n, hits_n), color in zip(sides, (BLUE, GREEN), strict=False):
            coverage_n, risk_n = compute_risk_curve(confidence_n, hits_n)
            keep_n = _thin(len(coverage_n))
            axes.plot(coverage_n[keep_n], risk_n[keep_n], color=color, linewidth=1.5, label=f"{name} ({len(hits_n):,})")
            top = max(top, _find_top(coverage_n, risk_n))
        if error is not None:
            axes.axhline(error, color=RED, linewidth=1, linestyle=(0, (4, 3)), label=f"wanted: at most {error:.1%}")
        if share is not None:
            label = f"answered by the rule: {share:.0%} of the test images"
            axes.axvline(share, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=label)
        axes.set(xlim=(0, 1), ylim=(0, max(1.25 * top, 2 * (error or 0), 0.02)))
        axes.set(xlabel="share of images that is answered, the surest first", ylabel="share of these that is wrong")
        axes.set_title("What not answering brings")
        axes.grid()
        axes.legend(loc="upper left", frameon=False)
    return sink.getvalue()


def _find_top(coverage_n: FloatArray, risk_n: FloatArray) -> float:
    """Return the highest risk that is worth showing: the first few images of a curve jump to and fro."""
    return float(risk_n[coverage_n >= 0.1].max(initial=0.0))


def _thin(number: int) -> Any:
    """Return at most MAX_POINTS places of a long line, the last among them."""
    return np.unique(np.linspace(0, max(number - 1, 0), min(number, MAX_POINTS)).round().astype(int))
