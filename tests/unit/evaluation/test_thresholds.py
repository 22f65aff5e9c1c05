"""Thresholds: the best there is, or what is promised, with how often the promise holds."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from visionloop.evaluation.thresholds import Chosen, choose_threshold, sweep_thresholds
from visionloop.params.train import Threshold


def choose(score_n: np.ndarray, truth_n: np.ndarray, wanted: object) -> Chosen:
    return choose_threshold(
        score_n.astype(np.float32), truth_n, np.arange(len(truth_n)), Threshold.model_validate(wanted)
    )


def draw(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are true probabilities, 30 % of them of the class."""
    score_n = rng.beta(0.6, 1.4, number).astype(np.float32)
    return score_n, rng.random(number) < score_n


def test_a_number_is_taken_as_it_is() -> None:
    words = "as params.yaml says: 50.0% of the validation images right, 100.0% at 0.5"
    assert choose(np.array([0.2, 0.9]), np.array([False, True]), 0.99999) == Chosen(0.99999, words)


def test_sweep_counts_what_every_cut_gives() -> None:
    sweep = sweep_thresholds(np.float32([0.25, 0.75, 0.75, 0.25]), np.array([True, True, False, False]))
    assert sweep.cut_c.tolist() == [0.0, 0.5, 0.875]
    assert [one.tolist() for one in (sweep.found_c, sweep.extra_c, sweep.missed_c)] == [[2, 1, 0], [2, 1, 0], [0, 1, 2]]
    assert sweep.precision_c.tolist() == [0.5, 0.5, 1.0]
    assert sweep.recall_c.tolist() == [1.0, 0.5, 0.0]
    assert sweep.f1_c.tolist() == pytest.approx([2 / 3, 0.5, 0.0])


def test_best_f1_is_better_than_that_of_any_other_cut() -> None:
    score_n, truth_n = draw(np.random.default_rng(0), 800)
    chosen = choose(score_n, truth_n, "max_f1")
    best = f1_score(truth_n, score_n >= chosen.threshold)
    others = [f1_score(truth_n, score_n >= cut) for cut in np.linspace(0.01, 0.99, 99)]
    assert best >= max(others)
    assert 0.25 < chosen.threshold < 0.45, "true probabilities have their best F1 at half of it (Lipton et al. 2014)"
    assert chosen.words == f"F1 {best:.3f} on validation, {f1_score(truth_n, score_n >= 0.5):.3f} at 0.5"


def test_a_wide_valley_keeps_the_threshold_of_theory() -> None:
    score_n, truth_n = np.float32([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])
    assert choose(score_n, truth_n, "max_f1").threshold == 0.5
    costs = {"cost": {"false_positive": 1, "false_negative": 3}}
    assert choose(score_n, truth_n, costs).threshold == 0.25


def test_costs_lower_the_threshold_where_a_miss_is_dear() -> None:
    score_n, truth_n = draw(np.random.default_rng(1), 20_000)
    chosen = choose(score_n, truth_n, {"cost": {"false_positive": 1, "false_negative": 5}})
    assert chosen.threshold == pytest.approx(1 / 6, abs=0.03), "Elkan 2001"
    assert choose(score_n, truth_n, {"cost": {"false_positive": 5, "false_negative": 1}}).threshold > 0.75


@pytest.mark.parametrize("wanted", ["precision", "recall"])
def test_promised_share_holds_in_95_of_100_draws(wanted: str) -> None:
    rng = np.random.default_rng(2)
    everyone_n = rng.beta(0.2, 0.6, 200_000).astype(np.float32)
    everything_n = rng.random(200_000) < everyone_n
    held, kept, other = 0, 0, []
    for _ in range(400):
        picked_n = rng.choice(200_000, 1500, replace=False)
        chosen = choose(everyone_n[picked_n], everything_n[picked_n], {wanted: 0.8})
        given_n = everyone_n >= chosen.threshold
        precision, recall = everything_n[given_n].mean(), given_n[everything_n].mean()
        kept += chosen.is_kept
        held += {"precision": precision, "recall": recall}[wanted] >= 0.8
        other.append(recall if wanted == "precision" else precision)
    assert kept >= 0.98 * 400
    assert held >= 0.93 * 400
    assert np.mean(other) > {"precision": 0.3, "recall": 0.4}[wanted], "a promise that gives nothing is cheap"


def test_a_wish_that_cannot_be_promised_gets_the_best_there_is() -> None:
    score_n = np.linspace(0.02, 0.98, 40)
    truth_n = score_n > 0.5
    chosen = choose(score_n, truth_n, {"precision": 0.99})
    assert (chosen.is_kept, chosen.threshold) == (False, 0.5)
    assert chosen.promised == pytest.approx(0.005 ** (1 / 20))
    words = "a precision of 0.99 cannot be promised; the best there is: 20 of 20 right, 76.7% promised; "
    words += "it takes 309 without a mistake"
    assert chosen.words == words
    chosen = choose(score_n, truth_n, {"recall": 0.95})
    assert (chosen.is_kept, chosen.threshold) == (False, 0.5), "of a valley from 0.488 to 0.512"
    assert chosen.promised == pytest.approx(0.05 ** (1 / 20))
    assert chosen.words == "a recall of 0.95 cannot be promised by 20 images of it; 86.1% can; it takes 59"


def test_a_perfect_model_stays_perfect_where_its_few_images_cannot_promise() -> None:
    # Seen on horses-or-humans: 68 independent images, 36 of the class; 59 were looked at, so 0.0000044 was taken.
    rng = np.random.default_rng(0)
    score_n = np.concatenate([rng.uniform(0.97, 1, 36), rng.uniform(0, 1e-5, 32)])
    truth_n = np.arange(68) < 36
    chosen = choose(score_n, truth_n, {"precision": 0.95})
    assert (chosen.threshold, chosen.is_kept) == (0.5, False)
    assert chosen.promised == pytest.approx(0.005 ** (1 / 36)), "a tenth of 0.05 is for the plain threshold"
    assert chosen.words.endswith("the best there is: 36 of 36 right, 86.3% promised; it takes 61 without a mistake")
    assert choose(score_n, truth_n, {"recall": 0.95}).threshold == 0.5


def test_a_wish_for_recall_does_not_cost_all_precision() -> None:
    rng = np.random.default_rng(0)
    truth_n = np.arange(200) < 100
    score_n = np.where(truth_n, rng.uniform(0.6, 1, 200), rng.uniform(0, 0.4, 200))
    score_n[:10] = 0.0001  # a tenth of the class is below everything else
    score_n[100:] += 0.001
    chosen = choose(score_n, truth_n, {"recall": 0.9})
    assert (chosen.threshold, chosen.is_kept) == (0.5, False)
    assert chosen.words == "a recall of 0.9 is kept only by saying yes to all 200 images; not tuned"
    score_n[:9] = rng.uniform(0.6, 1, 9)
    chosen = choose(score_n, truth_n, {"recall": 0.99})
    assert (chosen.threshold, chosen.is_kept) == (0.5, False)
    assert chosen.words == (
        "a recall of 0.99 cannot be promised by 100 images of it, and coming nearer costs more wrong answers than it "
        "finds; not tuned"
    )
    kept = choose(score_n, truth_n, {"recall": 0.9})
    assert kept.is_kept and kept.threshold > 0.5


def test_a_class_of_few_images_keeps_the_plain_threshold() -> None:
    score_n, truth_n = np.linspace(0, 0.4, 500), np.zeros(500, bool)
    score_n[:5], truth_n[:5] = [0.7, 0.8, 0.9, 0.95, 0.99], True
    chosen = choose(score_n, truth_n, {"precision": 0.9})
    assert (chosen.threshold, chosen.is_kept, chosen.promised) == (0.5, False, pytest.approx(0.005 ** (1 / 5)))
    assert choose(score_n, truth_n, {"recall": 0.9}).threshold == 0.5


def test_fewer_and_surer_answers_come_nearer_than_the_plain_threshold() -> None:
    # From 0.5 on 60 of 100 are right, of the surest 40 all. A look at 74, a further one at half of that.
    score_n = np.concatenate([np.linspace(0.99, 0.9, 40), np.linspace(0.8, 0.51, 60), np.linspace(0.4, 0.1, 50)])
    truth_n = np.concatenate([np.ones(40, bool), np.arange(60) % 3 == 0, np.zeros(50, bool)])
    chosen = choose(score_n, truth_n, {"precision": 0.95})
    assert not chosen.is_kept
    words = "a precision of 0.95 cannot be promised; the best there is: 37 of 37 right, 86.9% promised; "
    words += "it takes 61 without a mistake"
    assert chosen.words == words
    assert score_n[37] < chosen.threshold < score_n[36]
    recall = choose(score_n, truth_n, {"recall": 0.999})
    assert recall.words == "a recall of 0.999 cannot be promised by 60 images of it; 95.1% can; it takes 2,995"
    assert recall.threshold == pytest.approx((score_n[98] + score_n[97]) / 2), "0.5 would give two more, both wrong"


def test_a_lower_threshold_is_taken_only_where_it_makes_no_more_mistakes() -> None:
    # Three right answers from 0.5 on promise 17 %; 40 of 60 promise more, but are right less often.
    score_n = np.concatenate([[0.9, 0.8, 0.7], np.linspace(0.4, 0.3, 57)])
    truth_n = np.concatenate([np.ones(3, bool), np.arange(57) < 37])
    mixed_n = np.concatenate([truth_n[:3], np.random.default_rng(0).permutation(truth_n[3:])])
    assert choose(score_n, mixed_n, {"precision": 0.95}).threshold == 0.5
    flawless = np.concatenate([np.ones(30, bool), np.zeros(30, bool)])
    chosen = choose(score_n, flawless, {"precision": 0.95})
    assert 0.3 < chosen.threshold < 0.4, "as right as from 0.5 on, and more of it"
    # From 0.5 on nothing is given: as if the class was not there. 21 of 59 would be worse than that.
    assert choose(score_n / 2, np.arange(60) % 3 == 0, {"precision": 0.95}).threshold == 0.5


def test_no_wish_makes_a_model_less_precise_and_what_is_told_holds() -> None:
    rng = np.random.default_rng(4)
    everyone_n = rng.beta(0.2, 0.6, 100_000).astype(np.float32)
    everything_n = rng.random(100_000) < everyone_n
    held = tuned = 0
    for _ in range(400):
        picked_n = rng.choice(100_000, 80, replace=False)
        score_n, truth_n = everyone_n[picked_n], everything_n[picked_n]
        chosen = choose(score_n, truth_n, {"precision": 0.95})
        assert not chosen.is_kept or chosen.promised >= 0.95
        assert chosen.is_kept or chosen.promised < 0.95
        assert truth_n[score_n >= chosen.threshold].mean() >= truth_n[score_n >= 0.5].mean()
        held += everything_n[everyone_n >= chosen.threshold].mean() >= chosen.promised
        tuned += chosen.threshold != 0.5
    assert held >= 0.95 * 400
    assert tuned >= 0.2 * 400


@pytest.mark.parametrize("wanted", ["max_f1", {"precision": 0.9}, {"recall": 0.9}])
def test_a_class_that_does_not_occur_is_not_tuned(wanted: object) -> None:
    chosen = choose(np.array([0.2, 0.9]), np.array([False, False]), wanted)
    assert chosen == Chosen(0.5, "no validation image of it: not tuned", is_kept=False)
    assert choose(np.array([0.2, 0.9]), np.array([True, True]), wanted).threshold == 0.5


def test_only_independent_images_count_for_a_promise() -> None:
    rng = np.random.default_rng(3)
    score_n, truth_n = draw(rng, 60)
    many_n, same_n = np.repeat(score_n, 30), np.repeat(truth_n, 30)
    wanted = Threshold.model_validate({"recall": 0.97})
    one = choose_threshold(many_n, same_n, np.arange(0, 1800, 30), wanted)
    assert not one.is_kept
    assert choose_threshold(many_n, same_n, np.arange(1800), wanted).is_kept, "as if each frame were a film"
