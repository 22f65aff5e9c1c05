"""Runs as a table and side by side: order, marks, differences, and what is said when one is not there."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from visionloop.cli.runs import (
    compare_runs,
    find_run,
    label_run,
    list_differences,
    make_table,
    mark_stopped,
    sort_runs,
    to_json,
)
from visionloop.errors import SettingsError, StoreError
from visionloop.runs import Marks, find_stopped
from visionloop.tracking import KIND_TAG, Run
from visionloop.workfolder import lock_work, write_file
from visionloop.workspace import open_workspace

STARTED = datetime(2026, 1, 1, 12, tzinfo=UTC)
NO_MARKS = Marks(None, None)


def make_run(number: int, *, seconds: float | None = 61.0, bundle: str | None = None, **metrics: float) -> Run:
    tags = {"visionloop.dataset_version": str(number), **({"visionloop.bundle": bundle} if bundle else {})}
    params = {"train.way": "scratch", "train.backbone": "resnet18", "train.batch_size": str(8 * number)}
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    started = STARTED + timedelta(hours=number)
    return Run(f"{number:x}" * 32, f"run-{number}", "FINISHED", started, seconds, params, named, tags)


FIRST = make_run(1, bundle="a" * 64, best__val_accuracy=0.75, val__accuracy=0.5, best__epoch=3, epoch=5)
SECOND = make_run(2, bundle="b" * 64, val__accuracy=0.5, test__accuracy=0.875, epoch=4, seconds=None)
THIRD = make_run(3)
RUNS = [FIRST, SECOND, THIRD]


def test_table_has_the_best_epoch_or_else_the_last_one() -> None:
    header, first, second, third = make_table(RUNS, Marks("a" * 64, "b" * 64))
    row = dict(zip(header, first, strict=True))
    assert (row["run"], row["way"], row["backbone"], row["data"]) == ("11111111", "scratch", "resnet18", "1")
    assert (row["epochs"], row["val accuracy"], row["time"], row["status"]) == ("5", "0.7500", "1 min 01 s", "finished")
    assert first[-1] == "champion"
    assert second[-1] == "candidate"
    row = dict(zip(header, second, strict=True))
    assert (row["val accuracy"], row["test accuracy"], row["time"]) == ("0.5000", "0.8750", "-")
    assert third[-1] == ""


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("started", [3, 2, 1]),
        ("val_accuracy", [1, 2, 3]),
        ("val accuracy", [1, 2, 3]),
        ("test/accuracy", [2, 1, 3]),
        ("time", [1, 3, 2]),
    ],
)
def test_best_and_newest_come_first_and_runs_without_a_value_last(by: str, order: list[int]) -> None:
    assert [int(run.run_id[0]) for run in sort_runs(RUNS, by)] == order


def test_a_run_whose_training_was_broken_off_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    workspace = open_workspace(tmp_path)
    work = workspace.settings.work_dir("train") / "0123"
    write_file(work / "run.json", b'{"run_id": "a"}')
    left, other = (replace(make_run(1), run_id=run_id, status="RUNNING") for run_id in "ab")

    def look() -> list[str]:
        return [run.status for run in mark_stopped([left, other], find_stopped(workspace))]

    assert look() == ["STOPPED", "RUNNING"], "what another machine trains runs on"
    with lock_work(work.parent, "0123"):
        assert look() == ["RUNNING", "RUNNING"]
    (work / "run.json").write_text("{")
    assert look() == ["RUNNING", "RUNNING"]


def test_losses_are_sorted_upwards() -> None:
    runs = [make_run(1, val__loss=0.5), make_run(2, val__loss=0.25)]
    assert [run.name for run in sort_runs(runs, "val/loss")] == ["run-2", "run-1"]


def test_unknown_column_names_those_there_are() -> None:
    with pytest.raises(SettingsError, match=r"--sort: got 'accurracy'; expected one of backbone, .*val/accuracy"):
        sort_runs(RUNS, "accurracy")
    assert sort_runs([], "anything") == []


def test_runs_side_by_side_show_what_differs() -> None:
    rows: dict[str, Any] = {first: others for first, *others in compare_runs([FIRST, SECOND], NO_MARKS)}
    assert rows["train.batch_size"] == ["8", "16"]
    assert "train.backbone" not in rows
    assert rows["best/val_accuracy"] == ["0.7500", "-"]
    assert rows["best/epoch"] == ["3", "-"]
    assert rows["test/accuracy"] == ["-", "0.8750"]
    assert rows["dataset version"] == ["1", "2"]


def test_small_figures_are_not_rounded_to_nothing() -> None:
    run = make_run(1, best__train_learning_rate=1.25e-5, best__val_loss=0.5, best__epoch=12)
    rows: dict[str, Any] = {first: others for first, *others in compare_runs([run], NO_MARKS)}
    assert rows["best/train_learning_rate"] == ["1.25e-05"]
    assert rows["best/val_loss"] == ["0.5000"]
    assert rows["best/epoch"] == ["12"]


def test_a_parameter_that_one_run_lacks_differs() -> None:
    assert list_differences([{"a": "1", "b": "2"}, {"a": "1"}]) == ["b"]


def test_the_legend_names_what_differs() -> None:
    differing = list_differences([FIRST.params, SECOND.params])
    assert label_run(FIRST, differing) == "11111111 batch_size 8"
    assert label_run(FIRST) == "11111111 scratch resnet18", "one alone, or runs of the same parameters"
    many = ["evaluate.resamples", "train.a", "train.batch_size", "train.c", "train.way"]
    assert label_run(SECOND, many) == "22222222 a -, batch_size 16, c - and 2 more"


def test_a_run_is_found_by_its_first_letters_or_its_mark() -> None:
    assert find_run(RUNS, "2222", NO_MARKS) is SECOND
    assert find_run(RUNS, "champion", Marks("a" * 64, None)) is FIRST
    with pytest.raises(
        SettingsError, match=r"run 'candidate': no run of this experiment; .*Newest: 11111111, 22222222"
    ):
        find_run([replace(FIRST, run_id="9" * 32, tags={KIND_TAG: "evaluate"}), *RUNS], "candidate", NO_MARKS)
    with pytest.raises(StoreError, match=r"store s3://a: is away"):
        find_run(RUNS, "champion", Marks(None, None, StoreError("store s3://a", "is away")))
    with pytest.raises(SettingsError, match=r"run '': 3 runs begin so"):
        find_run(RUNS, "", NO_MARKS)


def test_json_has_everything() -> None:
    value = to_json(FIRST, Marks("a" * 64, None))
    assert value["marks"] == ["champion"]
    assert value["dataset_version"] == 1
    assert value["started_at"] == "2026-01-01T13:00:00+00:00"
    assert value["metrics"]["best/epoch"] == 3
    assert value["kind"] == "train"
