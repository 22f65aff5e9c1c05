"""What people are told: the table at the end of a retrain, and the rate and the end of long work."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from visionloop import words
from visionloop.records import Rejected
from visionloop.retrain import describe_answered, find_command
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
        ("candidate accuracy", "0.9790 (95 %: 0.9552 to 0.9903)"),
        ("gate: floor", "pass: 98 %; expected 90 %"),
        ("champion", "version 3, bundle cdcdcdcdcdcd"),
        ("asked: a cat", "dog (50.0%)  photos:cat/1|2.jpg"),
        ("seconds", "ingest 1.0, train 2.5; in all 3.5"),
    ]


def test_how_much_is_answered_stands_below_the_accuracy_and_a_large_fall_is_told() -> None:
    def describe(mine: float | None, theirs: float | None, **more: object) -> dict[str, str]:
        figures = [{} if share is None else {"answered": {"value": share}} for share in (mine, theirs)]
        champion = {"accuracy": {"value": 1.0}, **figures[1]} if more.get("has_champion", True) else {}
        return describe_answered(SimpleNamespace(metrics=figures[0], champion_metrics=champion))

    share = "63.67 % of the photos; accuracy counts its best guess for the others too"
    rows = describe(0.6367, None)
    assert rows == {
        "candidate answers": f"{share}; the champion that it was compared with: 100.00 %",
        "LOOK": "it answers 36 points fewer of the photos (train.abstain)",
    }
    told = replace(SUMMARY, answered=rows).rows()
    assert told[2:5] == [SUMMARY.rows()[2], *rows.items()]
    assert describe(0.6367, None, has_champion=False) == {"candidate answers": share}
    assert describe(None, None) == {}, "nothing abstains"
    assert "LOOK" not in describe(0.85, 0.94)
    assert "LOOK" not in describe(None, 0.5), "it answers more"


def test_markdown_holds_the_same_and_the_commands() -> None:
    lines = SUMMARY.to_markdown().splitlines()
    assert lines[0] == "# pets has a new champion"
    assert "| asked: a cat | dog (50.0%)  photos:cat/1\\|2.jpg |" in lines
    assert lines[-1] == "- to serve the champion: `visionloop serve`"


def test_rules_that_a_step_has_told_are_not_told_again() -> None:
    judged = replace(SUMMARY, step_seconds={"ingest": 1.0, "gate": 0.1})
    assert "gate: floor" not in words.render_summary(judged, 120)
    assert "gate: floor" in words.render_summary(SUMMARY, 120), "nothing changed: no step has told them"
    assert "| gate: floor |" in judged.to_markdown()


def test_columns_stand_below_each_other_in_any_script() -> None:
    lines = words.align([["cat", "1"], ["马车", "10"], ["e\u0301", "2"]])
    assert lines == ["cat    1", "马车  10", "e\u0301      2"]


RULES = [
    {"rule": "floor accuracy", "passed": True, "found": "accuracy 95.0 %", "expected": "at least 90.0 %"},
    {"rule": "floor macro_f1", "passed": False, "found": "macro_f1 80.0 %", "expected": "at least 90.0 %"},
    {
        "rule": "better", "passed": None, "found": "difference +1.0 points", "expected": "an interval above 0",
        "value": 0.01, "line": 0.0,
    },
]  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "by"),
    [("refused", "floor macro_f1 (macro_f1 80.0 %)"), ("inconclusive", "better (difference +1.0 points)")],
)
def test_a_verdict_that_stands_is_told_again_with_its_rule(verdict: str, by: str) -> None:
    error = words.make_refusal(verdict, RULES, again=True)
    more = f"More test images would tell; {EQUAL_PASSES} " * (verdict == "inconclusive")
    assert (error.exit_code, str(error)) == (
        3,
        f"gate: the candidate is still {verdict} by the rule {by}; expected a passed gate. Add images or change "
        f"params.yaml, then retrain. {more}See decisions/latest.json and decisions/latest.html.",
    )
    assert str(words.make_refusal(verdict, RULES)).startswith(f"gate: the candidate is {verdict} by the rule {by}; ")
    shown = [{**rule, "mode": "dry_run"} for rule in RULES]
    assert " by the rule " not in str(words.make_refusal(verdict, shown)), "a dry run holds nothing back"


def hold(rule: str, value: float | None = None, line: float | None = None, **more: object) -> dict[str, object]:
    return {"rule": rule, "passed": None, "found": "x", "expected": "y", "value": value, "line": line, **more}


EQUAL_PASSES = "with `gate.rule: no_worse` an equal one passes, from 133 test images on for a margin of 2 points."
MORE_IMAGES = "Ingest more images, of more groups where they are grouped; or lower `gate.min_images`."

SIMPLE_HEAD = (
    "Run `visionloop evaluate` with `evaluate.baseline_images` above 0, then `visionloop gate`; with fewer than six "
    "groups of test images set `gate.baseline: {heads: dry_run}`."
)
ONLY_IMAGES = "Ingest more images, of more groups where they are grouped."


@pytest.mark.parametrize(
    ("rules", "advice"),
    [
        ([hold("better", 0.01, 0.0)], f"More test images would tell; {EQUAL_PASSES}"),
        ([hold("better", 0.0, 0.0)], f"Train on more images or with other params; {EQUAL_PASSES}"),
        ([hold("better", -0.03, 0.0)], "Train on more images or with other params."),  # nor is it nearly equal
        ([hold("better")], "It is the champion already: there is nothing to do."),
        ([hold("no_worse", -0.01, -0.02)], "More test images would tell, or a larger `gate.margin`."),
        (
            [hold("no_worse", -0.03, -0.02)],
            "Train on more images or with other params, or set a larger `gate.margin`.",
        ),
        ([hold("min_images", 36, 100)], ONLY_IMAGES),
        ([hold("min_images", 36, 100, expected="at least 100 ... or a lower gate.min_images")], MORE_IMAGES),
        (
            [hold("min_images", 36, 10, expected="10, or a lower gate.min_images and gate.min_images.per_class")],
            f"{MORE_IMAGES[:-1]} and `gate.min_images.per_class`.",
        ),
        (
            [hold("min_images", 36, 10, expected="at least 10, or a lower gate.min_images.per_class")],
            MORE_IMAGES.replace("min_images`", "min_images.per_class`"),
        ),
        ([hold("new_class", 0.0, 0.5)], "Ingest more images of the class, or set `gate.new_class: {mode: off}`."),
        (
            [hold("new_class", 1.0, 0.5, expected="more ..., a lower `gate.min_images.per_class`, or")],
            "Ingest more images of the class, or lower `gate.min_images.per_class` (one test image is the least), or "
            "set `gate.new_class: {mode: off}`.",
        ),
        ([hold("baseline", 0.6, 0.5)], "More test images would tell whether it beats the baseline."),
        ([hold("baseline", 0.5, 0.5)], "Train on more images or with other params."),
        ([hold("floor auc")], "Choose another figure in `gate.floors`."),
        (
            [hold("floor accuracy", 0.9, 0.8)],
            "It has no interval yet: more test images give one, or set `bound: value`.",
        ),
        ([hold("floor accuracy", 0.7, 0.8)], "It has no interval yet: more test images give one."),
        ([hold("floor brier", 0.7, 0.8)], "It has no interval yet: more test images give one, or set `bound: value`."),
        ([hold("simple_head")], SIMPLE_HEAD),
        (
            [hold("champion_runs"), hold("log_loss", mode="dry_run"), hold("min_images", 9, 100), hold("better", 1, 0)],
            ONLY_IMAGES,
        ),
        (
            [hold("baseline", 0.5, 0.5), hold("min_images", 9, 100), hold("better", 1, 0)],
            f"Train on more images or with other params. {ONLY_IMAGES}",
        ),
    ],
)
def test_the_advice_is_of_the_rules_that_hold_it_back(rules: list[dict[str, object]], advice: str) -> None:
    told = str(words.make_refusal("inconclusive", rules))
    first, *others = [str(r["rule"]) for r in rules if r["rule"] != "champion_runs" and "mode" not in r]
    more = f", and by {', '.join(sorted(others))}" if others else ""
    assert told == (
        f"gate: the candidate is inconclusive by the rule {first} (x){more}; expected a passed gate. {advice} "
        "See decisions/latest.json and decisions/latest.html."
    )


def test_what_waits_for_a_person_is_named_and_gets_no_other_advice() -> None:
    assert "Add images" not in str(words.make_refusal("waiting", [hold("approval")], again=True))
    assert str(words.make_refusal("waiting", [hold("approval")])) == (
        "gate: the candidate is waiting by the rule approval (x); expected a passed gate. "
        "See decisions/latest.json and decisions/latest.html."
    )


def test_a_dry_run_is_marked_as_one() -> None:
    shown = replace(SUMMARY, rules=[{**RULES[1], "mode": "dry_run"}])
    assert ("gate: floor macro_f1", "FAIL (dry run): macro_f1 80.0 %; expected at least 90.0 %") in shown.rows()


def test_without_a_champion_the_end_says_so() -> None:
    refused = replace(SUMMARY, outcome="unchanged", verdict="refused", model={})
    assert ("champion", "none yet") in refused.rows()
    assert "champion" not in dict(replace(refused, verdict="").rows())


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


def test_a_command_is_pasted_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the environment below this folder and not on the PATH: after `cd` into another one its path is right."""
    beside = tmp_path / "env" / "bin" / "visionloop"
    beside.parent.mkdir(parents=True)
    beside.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(beside.with_name("python")))
    assert find_command("visionloop") == "env/bin/visionloop"
    assert find_command("visionloop", tmp_path / "model") == str(beside)
    assert find_command("visionloop", tmp_path / "env") == "bin/visionloop"
    assert find_command("dvc") == "dvc"


def test_quarantine_lines_keep_the_advice() -> None:
    """The advice is the end of the reason; a line that was cut lost it."""
    reason = "is a web page or XML, not an image; expected JPEG, PNG or WebP. Check where it was downloaded from."
    lines = words.describe_rejected([Rejected(f"photos:{'a' * 60}/page.jpg", "not_an_image", reason)])
    assert " ".join(line.strip() for line in lines[2:]).endswith("Check where it was downloaded from.")
    assert max(map(len, lines)) <= words.LINE
    hostile = words.describe_rejected([Rejected("x" * 5000, "not_an_image", "is empty")])
    assert len(hostile) <= 7 and max(map(len, hostile)) <= words.LINE
