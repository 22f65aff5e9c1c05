"""The table at the end of a retrain, and its Markdown twin."""

from visionloop.summary import Summary

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
    assert lines[0] == "# pets: pets has a new champion"
    assert "| asked: a cat | dog (50.0%)  photos:cat/1\\|2.jpg |" in lines
    assert lines[-1] == "- to serve the champion: `visionloop serve`"
