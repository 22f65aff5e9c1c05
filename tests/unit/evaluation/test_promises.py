"""Promises about mistakes hold as often as they say, and the numbers are those of scipy and of MAPIE."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from visionloop.evaluation.promises import (
    bound_errors,
    bound_share_above,
    choose_looks,
    choose_lower_looks,
    compute_risk_curve,
    count_flawless,
    find_promise,
    keep_one_of_a_key,
    list_promises,
)


def test_numbers_of_the_worked_example() -> None:
    looks_t = choose_looks(1000, 0.02, 0.05)
    assert (len(looks_t), looks_t[0], looks_t[-1]) == (10, 263, 1000)
    assert 1 - 0.005 ** (1 / 263) <= 0.02 < 1 - 0.005 ** (1 / 262)
    assert looks_t[6] == 754
    assert looks_t[8] == 918
    assert bound_errors(8, 918, 0.005) == pytest.approx(0.0201, abs=1e-4)
    assert bound_errors(4, 754, 0.005) == pytest.approx(0.0166, abs=1e-4)


def test_bound_is_that_of_clopper_and_pearson() -> None:
    for wrong, number in ((0, 10), (3, 50), (17, 400), (49, 50)):
        theirs = binomtest(wrong, number).proportion_ci(0.90, "exact").high  # two-sided: 5 % on each side
        assert bound_errors(wrong, number, 0.05) == pytest.approx(theirs, abs=1e-9)
    assert bound_errors(5, 5, 0.05) == bound_errors(0, 0, 0.05) == 1.0


def test_looks_are_fewer_where_images_are_few() -> None:
    assert count_flawless(0.02, 0.05) == 149
    assert choose_looks(149, 0.02, 0.05).tolist() == [149]
    assert choose_looks(154, 0.02, 0.05).tolist() == [149], "the surest 149: a mistake in 154 would be too many"
    assert choose_looks(250, 0.02, 0.05).tolist() == [149], "six looks would need 237 without a mistake"
    assert choose_looks(400, 0.02, 0.05).tolist() == [183, 400]
    assert choose_looks(20, 0.02, 0.05).tolist() == [20], "none can keep it; one tells how near it comes"
    assert choose_looks(1, 0.5, 0.05).tolist() == [1]


def test_promise_holds_in_95_of_100_splits_and_answers_most_images() -> None:
    rng = np.random.default_rng(0)
    # 8 % of all are wrong, most of them where the confidence is low.
    held, shares, kept = 0, [], 0
    confidence_n = 1 - rng.beta(0.5, 6, 60_000).astype(np.float32)
    hits_n = rng.random(60_000) < confidence_n
    for _ in range(400):
        picked_n = rng.choice(60_000, 3000, replace=False)
        promise = find_promise(confidence_n[picked_n], hits_n[picked_n], 0.02, 0.05)
        answered_n = confidence_n >= promise.limit
        kept += promise.kept
        held += not promise.kept or (~hits_n[answered_n]).mean() <= 0.02
        shares.append(answered_n.mean() if promise.kept else 0.0)
    assert held >= 0.93 * 400
    assert kept >= 0.9 * 400
    assert np.mean(shares) > 0.3, "a promise that answers nothing is cheap"


def test_many_looks_are_not_as_many_chances() -> None:
    # 2.01 % are wrong wherever one looks, so every promise of 2 % is false. With 0.05 for each look 12 % are made.
    rng, made = np.random.default_rng(3), 0
    for _ in range(1000):
        score_n, hits_n = rng.random(1000, np.float32), rng.random(1000) >= 0.0201
        made += find_promise(score_n, hits_n, 0.02, 0.05).kept
    assert made <= 0.05 * 1000


def test_ties_count_only_what_a_limit_can_divide() -> None:
    score_n = np.repeat(np.float32([1.0, 0.5]), [300, 300])
    hits_n = np.repeat([True, False], [300, 300])
    promise = find_promise(score_n, hits_n, 0.02, 0.05)
    assert (promise.kept, promise.num_answered, promise.num_wrong) == (True, 300, 0)
    assert 0.5 < promise.limit < 0.500001
    assert not find_promise(np.ones(600, np.float32), hits_n, 0.02, 0.05).kept


def test_a_tie_across_the_only_look_is_taken_whole() -> None:
    # Seen on horses-or-humans: 168 flawless images, many at the same confidence of 0.99999994 around the 149th.
    score_n = np.float32([1.0] * 148 + [0.9999999] * 10 + [0.99] * 10)
    promise = find_promise(score_n, np.ones(168, bool), 0.02, 0.05)
    assert (promise.kept, promise.num_answered) == (True, 158)
    assert 0.99 < promise.limit < 0.9999999


def test_limit_is_0_where_everything_may_be_answered() -> None:
    promise = find_promise(np.linspace(0.1, 1, 500, dtype=np.float32), np.ones(500, bool), 0.02, 0.05)
    assert (promise.kept, promise.limit, promise.num_answered) == (True, 0.0, 500)


def test_what_can_be_promised_is_told_where_the_wish_cannot() -> None:
    score_n, hits_n = np.linspace(0, 1, 60, dtype=np.float32), np.arange(60) != 3
    promise = find_promise(score_n, hits_n, 0.02, 0.05)
    assert (promise.kept, promise.num_images, promise.least) == (False, 60, 149)
    assert promise.bound == pytest.approx(binomtest(1, 60).proportion_ci(0.95, "exact").high), "half of delta"
    nothing = find_promise(np.full(5, -np.inf, np.float32), np.ones(5, bool), 0.02, 0.05)
    assert (nothing.kept, nothing.limit, nothing.bound) == (False, math.inf, 1.0)
    assert not find_promise(np.zeros(0, np.float32), np.zeros(0, bool), 0.02, 0.05).kept


def test_fewer_images_are_looked_at_where_the_wish_cannot_be_promised() -> None:
    # 68 images, 23 of them wrong, all below the surest 45: the 59 that the wish takes have 14.
    assert choose_lower_looks(59).tolist() == [7, 14, 29]
    assert [choose_lower_looks(first).tolist() for first in (0, 1, 7, 8)] == [[], [], [], [4]]
    score_n, hits_n = np.linspace(1, 0, 68, dtype=np.float32), np.arange(68) < 45
    promise = find_promise(score_n, hits_n, 0.05, 0.05)
    assert (promise.kept, promise.num_answered, promise.num_wrong) == (False, 29, 0)
    assert promise.bound == pytest.approx(1 - (0.025 / 3) ** (1 / 29))


def test_further_looks_never_keep_what_the_first_ones_did_not() -> None:
    for delta in (0.001, 0.05, 0.49):
        for error in (0.02, 0.3, 0.8):
            for number in (1, 3, 40, 700):
                hits_n = np.arange(number) < number // 2
                least = choose_looks(number, error, delta)[0]
                for one in list_promises(np.linspace(1, 0, number), hits_n, error, delta):
                    assert not one.kept or one.num_answered >= least


def test_images_that_are_never_answered_do_not_count() -> None:
    score_n = np.concatenate([np.linspace(0.2, 1, 400), np.full(100, -np.inf)]).astype(np.float32)
    hits_n = np.concatenate([np.ones(400, bool), np.zeros(100, bool)])
    promise = find_promise(score_n, hits_n, 0.02, 0.05)
    assert (promise.kept, promise.num_answered, promise.num_images) == (True, 400, 400)


def test_share_above_is_wilks_limit() -> None:
    # 59 draws: the lowest is below 95 % of all with 95 % (0.95^59 = 0.0485), that of 58 is not.
    assert (bound_share_above(59, 0.95, 0.05), bound_share_above(58, 0.95, 0.05)) == (1, 0)
    # The 93 of (93, 95 %, 95 %) is the known number for the second lowest.
    assert (bound_share_above(93, 0.95, 0.05), bound_share_above(92, 0.95, 0.05)) == (2, 1)
    assert bound_share_above(0, 0.9, 0.05) == 0


def test_share_above_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        place = bound_share_above(120, 0.9, 0.05)
        held += 1 - np.sort(rng.random(120))[place - 1] >= 0.9
    assert 0.93 * 1000 <= held <= 0.99 * 1000


def test_frames_of_a_film_are_one_draw() -> None:
    # 30 films of 20 frames, right or wrong as a whole, 10 % of them wrong: frames alone would promise far too much.
    rng = np.random.default_rng(2)
    key_n = rng.permutation(np.repeat(np.arange(30), 20))
    single_n = keep_one_of_a_key(key_n)
    assert sorted(key_n[single_n]) == list(range(30))
    held = {"frames": 0, "films": 0}
    for _ in range(300):
        right_g, score_g = rng.random(30) < 0.9, rng.random(30).astype(np.float32)
        score_n, hits_n = score_g[key_n] + rng.random(600).astype(np.float32) * 1e-3, right_g[key_n]
        held["frames"] += not find_promise(score_n, hits_n, 0.08, 0.05).kept
        held["films"] += not find_promise(score_n[single_n], hits_n[single_n], 0.08, 0.05).kept
    assert held["films"] >= 0.95 * 300
    assert held["frames"] < 0.6 * 300


def test_risk_curve_of_a_worked_example() -> None:
    coverage_n, risk_n = compute_risk_curve(np.array([0.9, 0.6, 0.9, 0.7]), np.array([True, False, True, False]))
    assert coverage_n.tolist() == [0.5, 0.75, 1.0]
    assert risk_n.tolist() == pytest.approx([0.0, 1 / 3, 0.5])
    assert [len(one) for one in compute_risk_curve(np.zeros(0), np.zeros(0, bool))] == [0, 0]


def test_looks_keep_what_mapie_keeps() -> None:
    """Numbers of MAPIE 1.6.0: BinaryClassificationController(precision, 0.8, confidence_level=0.95, "bonferroni")."""
    rng = np.random.default_rng(11)
    score_n = rng.beta(0.2, 0.6, 2000).astype(np.float32)
    hits_n = rng.random(2000) < score_n
    looks_t = choose_looks(2000, 0.2, 0.05)
    assert looks_t.tolist() == [25, 222, 420, 618, 815, 1012, 1210, 1408, 1605, 1802, 2000]
    wrong_n = np.cumsum(~hits_n[np.argsort(-score_n, kind="stable")])
    p_values = [binomtest(int(wrong_n[m - 1]), int(m), 0.2, alternative="less").pvalue for m in looks_t[:4]]
    assert p_values[:2] == pytest.approx([0.0037778931862957137, 2.9306468522555352e-08], rel=1e-9)
    # Where it is not small, theirs is the Hoeffding-Bentkus bound, which is a little larger than the exact value.
    assert p_values[2:] == pytest.approx([0.12229981579756431, 0.9999999999721824], rel=0.25)
    assert p_values[2] < 0.12229981579756431
    promise = find_promise(score_n, hits_n, 0.2, 0.05)
    assert promise.limit == pytest.approx(0.8078070282936096, rel=1e-9), "their best_predict_param"
    assert (promise.num_answered, promise.num_wrong) == (222, 15)
