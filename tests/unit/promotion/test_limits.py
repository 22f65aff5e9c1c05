"""Rules that hold a figure against a line: floors, new classes, log loss, size and time."""

import numpy as np
import pytest
from scipy.stats import binomtest

from visionloop.errors import ParamsError
from visionloop.evaluation.answers import Answers
from visionloop.evaluation.baselines import Baseline, make_baseline
from visionloop.params import Floor, Gate, make_params
from visionloop.params.gate import Latency
from visionloop.promotion.limits import (
    check_answered,
    check_baseline,
    check_floors,
    check_latency,
    check_limit,
    check_log_loss,
    check_new_classes,
    check_simple_heads,
)
from visionloop.promotion.paired import count_hits
from visionloop.records import Interval, RuleResult

RUNS = 1000


def compute_wilson(hits, number):
    bounds = binomtest(hits, number).proportion_ci(method="wilson")
    return Interval(hits / number, bounds.low, bounds.high)


ALLOWED = 0.05 + 2.33 * np.sqrt(0.05 * 0.95 / RUNS)  # a level of 5 % is above this in one of 100 simulations


def test_floors_hold_from_the_floor_upwards():
    metrics = {"accuracy": Interval(0.9, 0.8, 0.95), "macro_f1": Interval(0.85, 0.8, 0.9)}
    rules = check_floors({"macro_f1": Floor(line=0.86), "accuracy": Floor(line=0.9)}, metrics)
    assert rules == [
        RuleResult("floor accuracy", True, "accuracy 90.00 %", "at least 90.00 %", 0.9, 0.8, 0.95, 0.9),
        RuleResult("floor macro_f1", False, "macro_f1 85.00 %", "at least 86.00 %", 0.85, 0.8, 0.9, 0.86),
    ]


def test_a_floor_of_the_interval_takes_its_worse_end():
    metrics = {"accuracy": Interval(0.9, 0.84, 0.95), "log_loss": Interval(0.3, 0.2, 0.4)}
    metrics["macro_f1"] = Interval(0.9, None, None)
    floors = {name: Floor(line=0.85, bound="interval") for name in ("accuracy", "macro_f1")}
    floors |= {"log_loss": Floor(line=0.41, bound="interval", mode="dry_run"), "auc": Floor(line=0.5)}
    accuracy, auc, log_loss, macro_f1 = check_floors(floors, metrics)
    assert (accuracy.passed, accuracy.found) == (False, "accuracy 90.00 %, its 95 % interval from 84.00 %")
    assert (log_loss.passed, log_loss.mode, log_loss.expected) == (True, "dry_run", "at most 0.4100")
    assert log_loss.found == "log_loss 0.3000, its 95 % interval up to 0.4000"
    assert (macro_f1.passed, macro_f1.found) == (
        None,
        "macro_f1 90.00 %, its 95 % interval cannot be told: too few images",
    )
    assert (auc.passed, auc.found) == (None, "these answers have no auc")
    assert check_floors({"log_loss": Floor(line=0.25)}, metrics)[0].passed is False
    assert check_floors({"accuracy": Floor(line=0.25, mode="off")}, metrics) == []


def test_the_baseline_lies_below_above_or_inside_the_interval():
    rule = check_baseline(compute_wilson(36, 36), 0.5, "always 'cat'", Gate())
    assert (rule.passed, rule.value, rule.line) == (True, 1.0, 0.5)
    assert rule.found == "accuracy 100.00 %, its 95 % interval 90.36 % ... 100.00 %"
    assert rule.expected == "an interval above 50.00 %, the answer always 'cat'"
    for hits, number, share, passed in (
        (6, 6, 0.5, True),
        (5, 5, 0.6, None),
        (40, 40, 1.0, None),
        (10, 40, 0.5, False),
    ):
        assert check_baseline(compute_wilson(hits, number), share, "x", Gate()).passed is passed, (hits, number)
    assert "more test images" in check_baseline(compute_wilson(5, 5), 0.6, "x", Gate()).expected
    behind = check_baseline(compute_wilson(2, 5), 0.6, "x", Gate())
    assert (behind.passed, "more test images" in behind.expected) == (None, False), "they would only show that"
    few = check_baseline(Interval(1.0, None, None), 0.5, "x", Gate(baseline={"mode": "dry_run"}))
    assert (few.passed, few.mode, few.found.endswith("interval cannot be told")) == (None, "dry_run", True)


def test_the_calibration_error_may_have_a_ceiling():
    metrics = {"ece": Interval(0.08, None, None)}
    rules = [check_floors({"ece": Floor(line=line)}, metrics)[0] for line in (0.1, 0.05)]
    assert [(rule.rule, rule.passed, rule.expected) for rule in rules] == [
        ("floor ece", True, "at most 0.1000"),
        ("floor ece", False, "at most 0.0500"),
    ]
    with pytest.raises(ParamsError, match="the calibration error has no interval"):
        make_params({"name": "pets", "gate": {"floors": {"ece": {"line": 0.1, "bound": "interval"}}}})


def make_head(name, low, high):
    return Baseline(name, Interval(0.9, 0.8, 0.95), Interval((low + high) / 2, low, high))


@pytest.mark.parametrize(
    ("gains", "passed", "named"),
    [
        ([(0.01, 0.05), (-0.04, 0.02)], True, "linear head"),
        ([(-0.06, -0.02), (-0.04, 0.02)], False, "neighbours"),
        ([(-0.06, 0.01), (-0.04, -0.02)], False, "linear head"),
    ],
)
def test_a_network_that_a_simple_head_beats_is_told(gains, passed, named):
    heads = [make_head(name, *gain) for name, gain in zip(("neighbours", "linear head"), gains, strict=True)]
    rows = [make_head("majority class", -0.5, -0.4), *heads]
    rule = check_simple_heads(rows, Gate(baseline={"heads": "on"}))
    assert (rule.passed, rule.mode, rule.line) == (passed, "on", 0.0)
    assert f" against 90.00 % of a simple head ({named}) on its own embeddings: " in rule.found
    assert check_simple_heads(rows, Gate()).mode == "dry_run"
    told = [check_simple_heads(these, Gate(baseline={"heads": "on"})) for these in (None, [])]
    needs = "`evaluate.baseline_images` above 0 and six groups or more"
    assert [rule.expected for rule in told] == [f"`visionloop evaluate` first, with {needs}", needs]
    assert check_simple_heads(rows, Gate(baseline={"heads": "off"})) is None


def test_an_equal_simple_head_is_found_better_in_at_most_one_of_twenty():
    generator, refused = np.random.default_rng(0), {0.85: [], 0.95: []}
    labels_n, key_n = np.arange(300) % 2, np.arange(300)
    for share, mine in refused.items():
        for _ in range(400):
            network_n, *heads = (
                np.where(generator.random(300) < s, labels_n, 1 - labels_n) for s in (0.85, share, share)
            )
            answers = Answers(labels_n, np.eye(2)[network_n], network_n, ("a", "b"), key_n)
            names = zip(("neighbours", "linear head"), heads, strict=True)
            rows = [make_baseline(name, np.eye(2, dtype=bool)[head_n], answers) for name, head_n in names]
            mine.append(check_simple_heads(rows, Gate()).passed is False)
    assert np.mean(refused[0.85]) <= 0.05 + 2.33 * np.sqrt(0.05 * 0.95 / 400)
    assert np.mean(refused[0.95]) >= 0.95


def test_fewer_answers_than_the_margin_allows_are_found_and_others_seldom():
    generator, refused = np.random.default_rng(0), {0.7: [], 0.5: []}
    section, any_share = Gate(answered={"least": 0.0}), Interval(0.5, None, None)
    for share, mine in refused.items():  # the champion answers 90 %: the margin of 20 points ends at 70
        for _ in range(RUNS):
            candidate_n, champion_n = generator.random(150) < share, generator.random(150) < 0.9
            hits = count_hits(candidate_n, champion_n, np.arange(150))
            mine.append(check_answered(any_share, hits, section).passed is False)
    assert np.mean(refused[0.7]) <= ALLOWED
    assert np.mean(refused[0.5]) >= 0.95


def test_without_a_report_about_the_candidate_only_a_rule_that_decides_is_shown():
    on = Gate(baseline={"heads": "on"})
    majority = make_head("majority class", 0.1, 0.2)
    few = Baseline("neighbours", Interval(0.9, None, None), Interval(0.1, None, None))
    for rows, found in ((None, "reports/ is not about this candidate"), ([majority, few], "no head with an interval")):
        assert check_simple_heads(rows, Gate()) is None
        rule = check_simple_heads(rows, on)
        assert (rule.passed, rule.found.endswith(found)) == (None, True)


def test_guessing_beats_the_baseline_in_at_most_one_of_forty():
    hits = np.random.default_rng(0).binomial(60, 0.6, size=RUNS)
    passed = [check_baseline(compute_wilson(int(each), 60), 0.6, "x", Gate()).passed is True for each in hits]
    assert np.mean(passed) <= 0.025 + 2.33 * np.sqrt(0.025 * 0.975 / RUNS)


def test_new_classes_are_held_against_their_own_line():
    rule = check_new_classes({"mule": (9, 20), "pony": (20, 20)}, Gate())
    assert (rule.passed, rule.value, rule.line) == (False, 0.45, 0.5)
    assert rule.found == "mule is found in 9 of 20 test images"
    assert check_new_classes({"mule": (10, 20)}, Gate()).passed is True
    few = check_new_classes({"mule": (5, 5)}, Gate())
    assert (few.passed, few.found) == (None, "mule is found in 5 of 5 test images")
    assert few.expected == (
        "each class that the champion does not know found in at least 50.00 % on at least 10 images: more test images "
        "of it, a lower `gate.min_images.per_class`, or `gate.new_class: {mode: off}`"
    )
    for counts in ({"mule": (0, 0)}, {"mule": (2, 5)}, {"mule": (5, 5), "pony": (0, 0)}):
        none = check_new_classes(counts, Gate())
        assert none.expected.endswith(": more test images of it, or `gate.new_class: {mode: off}`"), (
            "no lower one helps"
        )
    low = check_new_classes({"mule": (0, 20), "pony": (5, 5)}, Gate())
    assert (low.passed, low.expected[-13:]) == (False, "least 50.00 %")
    assert check_new_classes({"mule": (0, 0)}, Gate(min_images={"per_class": 0})).passed is None
    assert check_new_classes({}, Gate()) is None
    assert check_new_classes({"mule": (0, 9)}, Gate(new_class={"mode": "off"})) is None


def test_log_loss_is_refused_only_where_it_is_shown_to_be_worse():
    generator = np.random.default_rng(0)
    on = Gate(log_loss={"mode": "on"})
    worse_n = generator.normal(0.2, 0.5, 200)
    rule = check_log_loss(worse_n, np.arange(200), on)
    assert (rule.passed, rule.value) == (False, pytest.approx(worse_n.mean()))
    assert check_log_loss(worse_n, np.arange(200), Gate(log_loss={"margin": 0.3})).passed is True
    assert check_log_loss(worse_n, np.arange(200) % 5, on) is None, "five groups tell nothing"
    assert check_log_loss(worse_n, np.arange(200), Gate()).mode == "dry_run"
    even = check_log_loss(np.full(200, -1e-9), np.arange(200), on)
    assert even.found == "log loss +0.0000 against the champion's, 90 % interval +0.0000 ... +0.0000"
    assert even.expected == "not shown to be higher than the champion's"
    assert check_log_loss(worse_n, np.arange(200), Gate(log_loss={"margin": 0.3})).expected.endswith(
        " by more than 0.3"
    )
    level = [check_log_loss(generator.normal(0, 0.5, 60), np.arange(60), on).passed is False for _ in range(RUNS)]
    assert 0.02 <= np.mean(level) <= ALLOWED


def test_a_limit_holds_up_to_itself():
    assert check_limit("model_size", 4.0, 4.0, "MB", "on").passed is True
    rule = check_limit("model_size", 4.1, 4.0, "MB", "dry_run")
    assert (rule.passed, rule.found, rule.expected, rule.mode) == (False, "4.1 MB", "at most 4", "dry_run")


def test_time_is_held_against_both_limits():
    both = Latency(ms=20, ratio=1.5)
    assert check_latency(14.0, 10.0, both).passed is True
    slow = check_latency(16.0, 10.0, both)
    assert (slow.passed, slow.line, slow.mode) == (False, 15.0, "dry_run")
    assert slow.found == "16 ms for one image here, the champion 10 ms"
    assert slow.expected == "at most 20 ms and 1.5 times the champion's"
    assert check_latency(21.0, 20.0, both).line == 20
    first = check_latency(21.0, None, Latency(ratio=1.5))
    assert (first.passed, first.expected) == (True, "at most that of the champion, once there is one")
