"""The gate's rules: what passes, is refused or cannot be told, how often by chance, and the messages."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from sklearn.metrics import f1_score

from visionloop.params import Gate
from visionloop.params.gate import Drop
from visionloop.promotion.gate import (
    approve_rules,
    check_difference,
    check_drops,
    check_min_images,
    compute_difference,
    compute_verdict,
    get_line,
    make_approval_rule,
    make_first_rule,
    make_looks_rule,
    make_removed_rule,
    make_same_rule,
    spend_alpha,
)
from visionloop.promotion.paired import Pair, count_hits
from visionloop.records import Decision, RuleResult

RUNS = 1000
ALPHA = 0.05
ALLOWED = ALPHA + 2.33 * np.sqrt(ALPHA * (1 - ALPHA) / RUNS)  # a level of 5 % is above this in one of 100 simulations
EQUAL = {"both": 0.05, "candidate_only": 0.05, "champion_only": 0.05}


def make_pair(num_images, *, both, candidate_only, champion_only, seed, num_classes=4):
    """Return both models' answers; the arguments are the rates of errors made by both or by one alone."""
    generator = np.random.default_rng(seed)
    labels_n, luck_n = np.arange(num_images) % num_classes, generator.random(num_images)
    wrong_n = (labels_n + generator.integers(1, num_classes, num_images)) % num_classes
    candidate_wrong_n = luck_n < both + candidate_only
    champion_wrong_n = (luck_n < both) | (
        (luck_n >= both + candidate_only) & (luck_n < both + candidate_only + champion_only)
    )
    chosen = (np.where(each, wrong_n, labels_n) for each in (candidate_wrong_n, champion_wrong_n))
    return Pair(labels_n, *chosen, np.arange(num_images), num_classes)


def compare(pair, section=None, *, alpha=ALPHA, resamples=400, seed=0):
    section = section or Gate()
    return compute_difference(pair, section.metric, get_line(section), alpha, resamples=resamples, seed=seed)


def simulate(section, runs=RUNS, number=256, num_classes=4, **rates):
    """Return how often the rule says True, False and None."""
    answers = []
    for seed in range(RUNS, RUNS + runs):  # another seed for the draws: the same one would repeat the images' numbers
        difference = compare(
            make_pair(number, seed=seed, num_classes=num_classes, **rates), section, seed=-seed % 10**6
        )
        answers.append(check_difference(difference, section.rule, section.alpha).passed)
    return tuple(answers.count(answer) / runs for answer in (True, False, None))


def test_better_raises_a_false_alarm_in_at_most_one_of_twenty():
    passed, refused, _ = simulate(Gate(), **EQUAL)
    assert 0.01 <= passed <= ALLOWED
    assert 0.01 <= refused <= ALLOWED


@pytest.mark.parametrize(
    ("number", "num_classes", "runs"),
    [(256, 4, 300), (100, 10, 200), pytest.param(1200, 120, 300, marks=pytest.mark.long)],
)
def test_better_by_macro_f1_raises_a_false_alarm_in_about_one_of_twenty(number, num_classes, runs):
    passed, refused, _ = simulate(Gate(metric="macro_f1"), runs, number, num_classes, **EQUAL)
    allowed = ALPHA + 2.33 * np.sqrt(ALPHA * (1 - ALPHA) / runs)
    assert max(passed, refused) <= allowed
    assert passed + refused > 0


def make_films(num_films, num_frames, alike, accuracy, seed):
    """Return two equally good models on films of one class each."""
    generator, factor = np.random.default_rng(seed), (1 - alike) / alike
    labels_n, chosen = np.repeat(np.arange(num_films) % 4, num_frames), []
    for _ in range(2):
        ease_n = np.repeat(generator.beta(accuracy * factor, (1 - accuracy) * factor, num_films), num_frames)
        wrong_n = (labels_n + generator.integers(1, 4, len(labels_n))) % 4
        chosen.append(np.where(generator.random(len(labels_n)) < ease_n, labels_n, wrong_n))
    return Pair(labels_n, *chosen, np.repeat(np.arange(num_films), num_frames), 4)


@pytest.mark.parametrize(("num_films", "num_frames", "alike"), [(16, 16, 0.5), (40, 8, 0.2)])
def test_macro_f1_on_films_raises_a_false_alarm_in_about_one_of_twenty(num_films, num_frames, alike):
    section, runs = Gate(metric="macro_f1"), 300
    pairs = (make_films(num_films, num_frames, alike, 0.9, seed) for seed in range(runs))
    assert np.mean([compare(pair, section).p_above <= ALPHA for pair in pairs]) <= 0.05 + 2.33 * 0.0126


def test_better_finds_a_difference_as_often_as_theory_says():
    # Difference 5 points, answered differently 9 %: the power of the exact test is 0.826.
    passed, refused, _ = simulate(Gate(), both=0.03, candidate_only=0.02, champion_only=0.07)
    assert 0.79 <= passed <= 0.86
    assert refused == 0


def test_no_worse_passes_equal_models_more_often_with_a_wider_margin():
    shares = [simulate(Gate(rule="no_worse", margin=margin), 300, **EQUAL)[0] for margin in (0.0, 0.02, 0.08)]
    assert shares[0] < 0.1 < shares[1] < 0.6
    assert shares[2] > 0.95


def test_accuracy_has_no_seed_in_it():
    pair = make_pair(120, seed=1, **EQUAL)
    found = {check_difference(compare(pair, seed=seed), "better", ALPHA).found for seed in range(5)}
    assert len(found) == 1


def test_same_seed_gives_the_same_macro_f1():
    pair, section = make_pair(100, seed=1, **EQUAL), Gate(metric="macro_f1")
    found = [compare(pair, section, seed=seed) for seed in (3, 3, 4)]
    assert found[0] == found[1]
    assert found[0] != found[2]
    expected = [f1_score(pair.labels, chosen, average="macro") for chosen in (pair.candidate, pair.champion)]
    assert [found[0].candidate, found[0].champion] == pytest.approx(expected)


def test_interval_is_of_paired_answers():
    pair = make_pair(200, both=0.3, candidate_only=0.0, champion_only=0.0, seed=0)
    same = compare(pair)
    assert (same.value, check_difference(same, "better", ALPHA).passed) == (0.0, None)
    assert -0.02 < same.low < 0 < same.high < 0.02, "far narrower than 0.08, that of two samples"
    section = Gate(rule="no_worse", margin=0.02)
    assert check_difference(compare(pair, section), "no_worse", ALPHA).passed is True


@pytest.mark.parametrize(
    ("only_candidate", "only_champion", "better", "no_worse"),
    [
        (5, 0, True, True),
        (4, 0, None, True),
        (0, 1, None, True),
        (0, 5, False, None),
        (4, 4, None, None),
        (0, 40, False, False),
    ],
)
def test_the_line_lies_below_inside_or_above(only_candidate, only_champion, better, no_worse):
    labels_n = np.zeros(250, int)
    candidate_n, champion_n = labels_n.copy(), labels_n.copy()
    champion_n[:only_candidate] = 1
    candidate_n[only_candidate : only_candidate + only_champion] = 1
    pair = Pair(labels_n, candidate_n, champion_n, np.arange(250), 2)
    assert check_difference(compare(pair), "better", ALPHA).passed is better
    section = Gate(rule="no_worse", margin=0.02)
    assert check_difference(compare(pair, section), "no_worse", ALPHA).passed is no_worse


def make_difference(wins, losses, number, section=None, keys=None):
    labels_n = np.zeros(number, int)
    candidate_n, champion_n = labels_n.copy(), labels_n.copy()
    champion_n[:wins] = 1
    candidate_n[wins : wins + losses] = 1
    key_n = np.arange(number) if keys is None else np.arange(number) % keys
    return compare(Pair(labels_n, candidate_n, champion_n, key_n, 2), section)


def test_the_numbers_are_said_in_words_and_kept():
    rule = check_difference(make_difference(12, 3, 250), "better", ALPHA)
    assert rule.found == (
        "accuracy 98.80 % against 95.20 % on 250 images: difference +3.60 points, "
        "90 % interval +1.16 ... +6.51, p 0.018"
    )
    assert rule.expected == "a difference above 0"
    assert (rule.passed, rule.value, rule.line, rule.mode) == (True, pytest.approx(0.036), 0.0, "on")
    assert (rule.low, rule.high) == (pytest.approx(0.0116, abs=1e-4), pytest.approx(0.0651, abs=1e-4))
    section = Gate(rule="no_worse", margin=0.015, alpha=0.025)
    rule = check_difference(make_difference(3, 3, 250, section), "no_worse", 0.025)
    assert "difference +0.00 points, 95 % interval" in rule.found
    assert rule.expected == "a difference above -1.50 points"


def test_what_cannot_be_told_says_how_many_images_would():
    rule = check_difference(make_difference(6, 2, 250), "better", ALPHA)
    assert rule.passed is None
    assert rule.found.endswith("p 0.14; about 610 more test images would tell")
    rule = check_difference(make_difference(2, 2, 250), "better", ALPHA)
    assert rule.found.endswith("; the candidate is not ahead: more test images would hardly help it")


def test_one_image_tells_nothing_not_even_how_many_would():
    section = Gate(rule="no_worse", margin=0.02)
    rule = check_difference(make_difference(0, 0, 1, section), "no_worse", ALPHA)
    assert rule.passed is None
    assert rule.found.endswith("; too few images to say how many would tell")


def test_groups_are_said():
    rule = check_difference(make_difference(12, 3, 256, keys=16), "better", ALPHA)
    assert " on 256 images in 16 groups: " in rule.found


def test_few_images_of_all_or_of_a_class_are_named():
    pair = make_pair(99, seed=0, **EQUAL)
    section = Gate(min_images={"all": 100, "per_class": 30})
    rule = check_min_images(pair, ("ant", "bee", "cat", "dog"), range(4), section)
    assert (rule.rule, rule.passed, rule.value, rule.line) == ("min_images", None, 99.0, 100.0)
    assert rule.found == "99 test images to compare on, of them 24 dog, 25 ant, 25 bee, 25 cat"
    assert rule.expected == "at least 100 and 30 of each class: about 21 more test images"
    rule = check_min_images(pair, ("ant", "bee", "cat", "dog"), range(4), section, is_shown=True)
    assert rule.expected.endswith(
        ": about 21 more test images, or a lower gate.min_images and gate.min_images.per_class"
    )
    one = check_min_images(pair, "abcd", range(4), Gate(min_images={"all": 99, "per_class": 25}), is_shown=True)
    assert one.expected.endswith(": about 1 more test images, or a lower gate.min_images.per_class")
    assert check_min_images(pair, "abcd", range(4), Gate(min_images={"all": 99})) is None
    few = replace(make_pair(200, seed=0, **EQUAL), key_n=np.arange(200) % 5)
    grouped = check_min_images(few, "abcd", range(4), Gate(min_images={"all": 300}), is_shown=True)
    assert grouped.expected.endswith(", at least 6 groups: about 100 more test images"), "a lower number adds no group"
    rule = check_min_images(few, "abcd", range(4), Gate())
    assert rule.found == "200 test images in 5 groups to compare on"
    assert rule.expected == "at least 100 and 10 of each class, at least 6 groups"
    assert check_min_images(few.take(np.zeros(0, int)), "abcd", range(4), Gate()).passed is None


def draw_classes(generator, number, *, drop, nested):
    """Hits of five classes: the champion finds 90 %; the candidate 95 %, but 70 % of the one that drops."""
    parts = {}
    for k in range(5):
        share = 0.9 if not drop else 0.7 if k == 3 else 0.95
        champion_n, luck_n = generator.random(number) < 0.9, generator.random(number)
        if nested:
            worse_n, better_n = champion_n & (luck_n < share / 0.9), champion_n | (luck_n < (share - 0.9) / 0.1)
            candidate_n = worse_n if share <= 0.9 else better_n
        else:
            candidate_n = luck_n < share
        parts[f"class {k}"] = count_hits(candidate_n, champion_n, np.arange(number))
    return parts


@pytest.mark.parametrize(("number", "nested"), [(140, False), (60, True)])
def test_a_class_that_falls_under_a_better_mean_is_refused(number, nested):
    # The number of test images of the class from which 90 -> 70 % is refused in 95 %: 140 where the two models err on
    # different images, 60 where the candidate loses images and gains none.
    generator, answers = np.random.default_rng(0), []
    for _ in range(RUNS):
        parts = draw_classes(generator, number, drop=True, nested=nested)
        rule = check_drops("class_drop", parts, Drop(), ALPHA)
        answers.append(rule.passed is False and "worse: class 3 " in rule.found)
    assert np.mean(answers) >= 0.95


@pytest.mark.parametrize("number", [20, 140])
def test_where_no_class_falls_at_most_one_of_twenty_is_refused(number):
    generator = np.random.default_rng(0)
    parts = (draw_classes(generator, number, drop=False, nested=False) for _ in range(RUNS))
    assert np.mean([check_drops("class_drop", each, Drop(), ALPHA).passed is False for each in parts]) <= ALLOWED


def test_a_drop_is_said_with_its_numbers():
    champion_n, candidate_n = np.arange(100) < 90, np.arange(100) < 70
    parts = {"cat": count_hits(candidate_n, champion_n, np.arange(100))}
    parts["dog"] = count_hits(champion_n, champion_n, np.arange(100))
    rule = check_drops("class_drop", parts, Drop(), ALPHA)
    assert rule.found.startswith("worse: cat 70.00 % against 90.00 % on 100 images, difference -20.00 points, 95 % ")
    assert rule.expected == "no class worse (2 classes, 5 % in all)"
    assert (rule.passed, rule.line) == (False, 0.0)
    assert rule.value == pytest.approx(-0.2)
    assert rule.low < -0.2 < rule.high < 0
    allowed = check_drops("slice_drop", {"source=cam1": parts["cat"]}, Drop(most=0.25, mode="dry_run"), ALPHA)
    assert (allowed.passed, allowed.mode) == (True, "dry_run")
    assert allowed.expected == "no slice worse by more than 25 points (1 slice, 5 % in all)"
    assert check_drops("class_drop", {}, Drop(), ALPHA) is None
    assert check_drops("class_drop", parts, Drop(mode="off"), ALPHA) is None


def test_several_classes_that_fall_are_all_named():
    right_n, wrong_n = np.ones(60, bool), np.zeros(60, bool)
    parts = {name: count_hits(wrong_n, right_n, np.arange(60)) for name in ("ant", "bee")}
    assert check_drops("class_drop", parts, Drop(), ALPHA).found.endswith("; also bee")


def test_thirty_equal_candidates_pass_in_at_most_one_of_twenty_champions_if_alpha_is_spent():
    generator, passed, images_n = np.random.default_rng(0), {"tell": 0, "spend": 0}, np.arange(256)

    @cache
    def compute_p(wins, losses):
        return count_hits(images_n < wins, (images_n >= wins) & (images_n < wins + losses), images_n).compute_p_above()

    for _ in range(RUNS):
        champion_n, nights_n = generator.random(256) < 0.9, generator.random((30, 256)) < 0.9
        wins, losses = ((a & ~b).sum(axis=-1) for a, b in ((nights_n, champion_n), (champion_n, nights_n)))
        ps = [compute_p(int(one), int(other)) for one, other in zip(wins, losses, strict=True)]
        passed["tell"] += any(p <= ALPHA for p in ps)
        passed["spend"] += any(p <= spend_alpha(ALPHA, look) for look, p in enumerate(ps, 1))
    assert passed["spend"] / RUNS <= ALLOWED
    assert passed["tell"] / RUNS > 0.3


def test_alpha_is_spent_over_any_number_of_nights():
    assert [round(spend_alpha(0.05, look), 5) for look in (1, 2, 3)] == [0.025, 0.00833, 0.00417]
    assert sum(spend_alpha(0.05, look) for look in range(1, 10_000)) < 0.05


def test_the_risk_of_many_looks_is_told():
    rule = make_looks_rule(7, 7, Gate())
    assert rule.found == "7th candidate against this champion on these images: an equal one passes by luck with 30 %"
    assert rule.expected == "a verdict read with that in mind; `gate.looks: spend` keeps the risk at 5 %"
    assert make_looks_rule(1, 1, Gate()) is None
    assert make_looks_rule(22, 3, Gate(rule="no_worse")).found == (
        "22nd candidate against this champion (3 of them on these images): one that is 2 points worse passes by luck "
        "with 68 %"
    )
    spent = make_looks_rule(1, 1, Gate(looks="spend"))
    assert spent.expected == "a risk of at most 5 % over all of them: this one is judged at 2.5 %"
    assert [make_looks_rule(n, n, Gate()).found[:4] for n in (11, 12, 13, 21, 103)] == [
        "11th",
        "12th",
        "13th",
        "21st",
        "103r",
    ]


def test_verdict_is_that_of_the_strictest_rule():
    passed, refused, unclear = (RuleResult("r", answer, "", "") for answer in (True, False, None))
    waits = make_approval_rule()
    assert compute_verdict([passed, make_first_rule()]) == "passed"
    assert compute_verdict([passed, unclear, waits]) == "inconclusive"
    assert compute_verdict([unclear, refused, passed, waits]) == "refused"
    assert compute_verdict([passed, waits]) == "waiting"
    assert compute_verdict([passed, replace(refused, mode="dry_run"), replace(unclear, mode="dry_run")]) == "passed"
    assert make_same_rule(Gate()).passed is None


def test_a_person_may_allow_only_what_waits_for_a_person():
    rules = [make_approval_rule(), RuleResult("better", None, "", ""), RuleResult("removed_class", False, "", "")]
    approved = approve_rules(rules, "ann", "looked at it")
    assert [rule.passed for rule in approved] == [True, None, False]
    assert approved[0].found == "approved by ann: looked at it", "who has said yes does not wait"
    (removed,) = approve_rules([make_removed_rule(["ant"])], "ann", "sold")
    assert removed.found == "the candidate no longer knows ant: approved by ann: sold"


def test_decisions_of_before_are_still_read():
    rule = {"rule": "better", "passed": None, "found": "x", "expected": "y"}
    facts = dict.fromkeys(("name", "verdict", "candidate", "champion", "test_digest", "run_id", "decided_at"), "a")
    facts |= {"number": 1, "num_test": 2, "metrics": {}, "champion_metrics": {}, "state": {}, "dataset": {}}
    decision = Decision.from_json({**facts, "rules": [rule]})
    assert (decision.entry, decision.num_keys, decision.looks) == (None, None, 0)
    assert decision.rules == (RuleResult("better", None, "x", "y"),)
    assert decision.rules[0].holds_back


def test_sets_of_one_label_compare_as_the_labels_do():
    pair = make_pair(150, seed=2, **EQUAL)
    sets = Pair(*(np.eye(4, dtype=bool)[each] for each in (pair.labels, pair.candidate, pair.champion)), pair.key_n, 4)
    for metric in ("accuracy", "macro_f1"):
        single, several = (compare(each, Gate(metric=metric), resamples=150) for each in (pair, sets))
        assert (several.candidate, several.champion) == pytest.approx((single.candidate, single.champion))
        assert (several.low, several.high) == pytest.approx((single.low, single.high), abs=1e-9)


def test_accuracy_of_sets_is_the_exact_match():
    labels_nk = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], bool)
    candidate_nk = np.array([[1, 1], [0, 1], [0, 0], [1, 1]], bool)
    champion_nk = np.array([[1, 0], [0, 1], [0, 1], [0, 0]], bool)
    pair = Pair(labels_nk, candidate_nk, champion_nk, np.arange(4), 2)
    found = compare(pair)
    assert (found.candidate, found.champion) == (0.75, 0.25)
    f1 = compare(pair, Gate(metric="macro_f1"))
    expected = [f1_score(labels_nk, each, average="macro") for each in (candidate_nk, champion_nk)]
    assert (f1.candidate, f1.champion) == pytest.approx(tuple(expected))
    recalls = [pair.count_class_hits(k) for k in range(2)]
    assert [(hits.num_images, hits.value) for hits in recalls] == [(2, 0.5), (2, 0.5)]
