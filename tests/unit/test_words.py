"""What people are told: the table at the end of a retrain, and the rate and the end of long work."""

from dataclasses import replace

import pytest

from visionloop import words
from visionloop.words import Summary

SUMMARY = Summary(
    name="pets",
    outcome="promoted",
    headline="pets has a new champion",
    dataset={"version": 2, "digest": "ab" * 32},
    metrics={
        "accuracy": {"value": 0.979, "low": 0.9552, "high": 0.9903},
        "log_loss": {"value": 1, "low": 0, "high": 2},
    },
    rules=[{"rule": "floor", "passed": True, "found": "98 %", "expected": "90 %"}],
    model={"version": "3", "bundle": "cd" * 32},
    answers=[{"actual": "cat", "prediction": "dog", "confidence": 0.5, "origin": "photos:cat/1|2.jpg"}],
    step_seconds={"ingest": 1.0, "train": 2.5},
    commands={"serve the champion": "visionloop serve"},
)


def test_rows_tell_everything_in_order() -> None:
    assert SUMMARY.rows() == [
        ("result", "pets has a new champion"),
        ("dataset", "version 2, digest abababababab"),
        ("accuracy", "0.9790 (95 %: 0.9552 to 0.9903)"),
        ("gate: floor", "pass: 98 %; expected 90 %"),
        ("model", "version 3, bundle cdcdcdcdcdcd"),
        ("asked: a cat", "dog (50.0%)  photos:cat/1|2.jpg"),
        ("seconds", "ingest 1.0, train 2.5; in all 3.5"),
    ]


def test_markdown_holds_the_same_and_the_commands() -> None:
    lines = SUMMARY.to_markdown().splitlines()
    assert lines[0] == "# pets has a new champion"
    assert "| asked: a cat | dog (50.0%)  photos:cat/1\\|2.jpg |" in lines
    assert lines[-1] == "- to serve the champion: `visionloop serve`"


RULES = [
    {"rule": "floor accuracy", "passed": True, "found": "accuracy 95.0 %", "expected": "at least 90.0 %"},
    {"rule": "floor macro_f1", "passed": False, "found": "macro_f1 80.0 %", "expected": "at least 90.0 %"},
    {
        "rule": "better",
        "passed": None,
        "found": "difference +1.0 points",
        "expected": "an interval above 0",
        "value": 0.01,
    },
]


@pytest.mark.parametrize(
    ("verdict", "by"),
    [("refused", "floor macro_f1 (macro_f1 80.0 %)"), ("inconclusive", "better (difference +1.0 points)")],
)
def test_a_verdict_that_stands_is_told_again_with_its_rule(verdict: str, by: str) -> None:
    error = words.make_refusal(verdict, RULES, again=True)
    more = "With `gate.rule: no_worse` an equal one passes. " * (verdict == "inconclusive")
    assert (error.exit_code, str(error)) == (
        3,
        f"gate: the candidate is still {verdict} by the rule {by}; expected a passed gate. Add images or change "
        f"params.yaml, then retrain. {more}See decisions/latest.json and decisions/latest.html.",
    )
    assert str(words.make_refusal(verdict, RULES)).startswith(f"gate: the candidate is {verdict} by the rule {by}; ")
    shown = [{**rule, "mode": "dry_run"} for rule in RULES]
    assert " by the rule " not in str(words.make_refusal(verdict, shown)), "a dry run holds nothing back"


def test_a_verdict_gives_no_advice_that_does_not_fit_its_rule() -> None:
    first = [{"rule": "baseline", "passed": None, "found": "accuracy 100 %", "expected": "above 60 %", "value": 1.0}]
    assert "no_worse" not in str(words.make_refusal("inconclusive", first))
    same = [{"rule": "better", "passed": None, "found": "the candidate is the champion itself", "expected": "another"}]
    assert "no_worse" not in str(words.make_refusal("inconclusive", same))
    waits = [{"rule": "approval", "passed": None, "found": "waits for `visionloop approve`", "expected": "required"}]
    assert "Add images" not in str(words.make_refusal("waiting", waits, again=True))


def test_a_dry_run_is_marked_as_one() -> None:
    shown = replace(SUMMARY, rules=[{**RULES[1], "mode": "dry_run"}])
    assert ("gate: floor macro_f1", "FAIL (dry run): macro_f1 80.0 %; expected at least 90.0 %") in shown.rows()


def test_without_a_champion_the_end_says_so() -> None:
    refused = replace(SUMMARY, outcome="unchanged", verdict="refused", model={})
    assert ("model", "no champion yet") in refused.rows()
    assert "no champion" not in str(replace(refused, verdict="").rows())


def test_the_rate_leaves_out_what_an_earlier_run_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr(words.time, "perf_counter", lambda: next(clock))
    lines: list[str] = []
    show = words.make_log_progress("prepared", "images", lines.append)
    show(1000, 1500)
    show(1200, 1500)
    show(1500, 1500)
    assert lines == ["prepared 1,200 of 1,500 images (50/s, 6 s left)", "prepared 1,500 of 1,500 images (50/s)"]


def test_no_end_is_told_where_none_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(words.time, "perf_counter", lambda: next(clock))
    lines: list[str] = []
    show = words.make_log_progress("checked", "images", lines.append)
    show(0, 0)
    show(80, 0)
    assert lines == ["checked 80 images (20/s)"]
