"""A training that is finished stays finished: whatever fails after its last epoch, the next run takes its bundle."""

import copy
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_tracking import MemoryTracking
from shapes import visionloop
from trainings import Ear, Place, make_place, read_json
from visionloop import predictor
from visionloop.bundle import Bundle, load_bundle, upload_bundle
from visionloop.errors import DiskError, TrackingError
from visionloop.predictor import FP32, INT8
from visionloop.promotion.ledger import append_entry
from visionloop.settings import load_settings
from visionloop.store import open_store
from visionloop.training import engines, fit
from workspaces import NOW

SAID = "this training is finished already"


def make(home: Path) -> Place:
    return make_place(home, counts={"disc": (6, 2, 2), "ring": (6, 2, 2)}, max_epochs=2)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make(tmp_path / "ws")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Any]:
    place = make(tmp_path_factory.mktemp("trained") / "ws")
    return place, place.train()


@pytest.fixture
def finished(trained: tuple[Place, Any], tmp_path: Path) -> tuple[Place, Any]:
    """A workspace of its own in which a training is finished, and the note of it."""
    place, note = trained
    shutil.copytree(place.settings.home, tmp_path / "ws")
    settings = load_settings({}, tmp_path / "ws")
    store = open_store(settings.store_url)
    return replace(place, settings=settings, store=store, tracking=copy.deepcopy(place.tracking)), note


def take(place: Place) -> tuple[Any, Ear]:
    """Train, which must run no epoch; return the note and what was told."""
    note = place.train(ear := Ear())
    assert ear.epochs == []
    assert ear.said(SAID)
    assert load_bundle(place.settings.candidate_dir).digest == note.bundle
    assert (place.settings.runs_dir / f"{note.bundle}.json").is_file()
    assert place.tracking.only["status"] == "FINISHED", "one run, and closed"
    return note, ear


def test_what_is_finished_is_taken_when_dvc_has_deleted_its_out(finished: tuple[Place, Any]) -> None:
    """So it is when dvc was killed while it hashed the bundle: it knows nothing of it, and runs the stage again."""
    place, note = finished
    shutil.rmtree(place.settings.candidate_dir)
    assert take(place)[0] == note
    assert take(place)[0] == note, "also when it is still there"


def test_a_kill_before_the_bundle_is_in_its_place_costs_no_epoch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(work: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit, "replace_folder", kill)
        with pytest.raises(KeyboardInterrupt):
            place.train()
    assert not place.settings.candidate_dir.exists()
    assert place.tracking.only["status"] == "RUNNING"
    take(place)


class Closing(MemoryTracking):
    """An MLflow that is away when a run is to be closed."""

    is_away = True

    def close_run(self, run_id: str, status: str = "FINISHED") -> None:
        if self.is_away:
            raise TrackingError("MLflow", "cannot be used (connection refused)")
        super().close_run(run_id, status)


def test_an_mlflow_that_fails_at_the_end_loses_nothing(place: Place) -> None:
    tracking = Closing()
    place = replace(place, tracking=tracking)
    with pytest.raises(TrackingError, match="connection refused"):
        place.train()
    digest = load_bundle(place.settings.candidate_dir).digest
    shutil.rmtree(place.settings.candidate_dir)  # as dvc does before it runs the stage again
    tracking.down = True
    with pytest.raises(TrackingError, match="connection refused"):
        place.train()
    tracking.down = tracking.is_away = False
    assert take(place)[0].bundle == digest


def test_a_bundle_that_was_damaged_since_is_made_again(finished: tuple[Place, Any]) -> None:
    place, note = finished
    (folder,) = place.settings.work_dir("train").glob("*/bundle")
    (folder / "card.json").write_text("{}")
    again = place.train(ear := Ear())
    assert again.bundle == note.bundle
    assert [report.epoch for report in ear.epochs] == [1, 2]
    assert not ear.said(SAID)


def test_an_mlflow_that_does_not_know_the_run_gets_a_training_of_its_own(finished: tuple[Place, Any]) -> None:
    place, _ = finished
    other = replace(place, tracking=MemoryTracking())
    other.train(ear := Ear())
    assert len(ear.epochs) == 2
    assert other.tracking.only["status"] == "FINISHED"


def test_other_inputs_are_another_training_and_the_finished_one_goes(finished: tuple[Place, Any]) -> None:
    place, first = finished
    (before,) = place.settings.work_dir("train").glob("*/done.json")
    second = place.with_train(seed=1).train(ear := Ear())
    assert len(ear.epochs) == 2
    (after,) = place.settings.work_dir("train").glob("*/done.json")
    assert not before.exists()
    assert (first.bundle == second.bundle, read_json(after)["bundle"]) == (False, second.bundle)


OTHER_CARD = {"threshold": "max_f1", "abstain": {"error": 0.4}}
TAKEN = "is taken again, no epoch runs: only train.abstain, train.threshold changed"


def run_of(place: Place, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = place.tracking.runs[run_id]
    return found


def test_other_thresholds_run_no_epoch_and_give_what_a_whole_training_gives(finished: tuple[Place, Any]) -> None:
    (place, first), ear = finished, Ear()
    other = place.with_train(**OTHER_CARD)
    note = other.train(ear)
    assert ear.epochs == []
    assert ear.said(f"the network of run {first.run_id[:8]} {TAKEN}")
    bundle = load_bundle(place.settings.candidate_dir, expected_digest=note.bundle)
    assert bundle.card.params["train"]["threshold"] == "max_f1"
    assert note.extra["network_of"] == first.run_id
    before, run = run_of(place, first.run_id), run_of(place, note.run_id)
    assert (run["tags"]["visionloop.network_of"], run["status"]) == (first.run_id, "FINISHED")
    assert (run["params"]["train.threshold"], before["params"]["train.threshold"]) == ("max_f1", "0.5")
    assert run["metrics"] == before["metrics"], "its page shows how the network learned"
    assert (place.settings.reports_dir / "training" / "curve.png").is_file()

    assert take_from(other).run_id == note.run_id, "the same again opens no third run"
    back = take_from(place)
    assert back == first
    shutil.rmtree(place.settings.work_dir("train"))
    assert other.train(whole := Ear()).bundle == note.bundle
    assert len(whole.epochs) == 2
    assert load_bundle(place.settings.candidate_dir).files == bundle.files


def take_from(place: Place) -> Any:
    """Train, which must find all finished."""
    note = place.train(ear := Ear())
    assert ear.said(SAID)
    assert load_bundle(place.settings.candidate_dir).digest == note.bundle
    return note


INT8_TOO = {"export": {"int8": "on", "most_changed": 0.5}}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engines whose networks are opened from here on, without OpenVINO."""
    names, open_it = list[str](), predictor._open

    def note(model_bytes: bytes, where: str, runtime: str, *args: Any) -> Any:
        names.append(f"{runtime} int8" if b"QuantizeLinear" in model_bytes else f"{runtime} fp32")
        return open_it(model_bytes, where, runtime, *args)

    monkeypatch.setattr(predictor, "_open", note)
    monkeypatch.setattr("visionloop.evaluation.runtimes.has_openvino", lambda: False)
    return names


def find_threshold_between(bundle: Bundle, images_nhwc: Any) -> float:
    """Return a threshold that gives the image on which two engines differ most two answers."""
    ours, theirs = (predictor.Predictor(bundle, engine=n).run(images_nhwc).probs_nk[:, 1] for n in (FP32, INT8))
    return float((ours + theirs)[np.abs(ours - theirs).argmax()]) / 2


def test_another_threshold_runs_no_engine_and_counts_other_answers_anew(place: Place, opened: list[str]) -> None:
    (first := place.with_train(**INT8_TOO)).train()
    before = load_bundle(place.settings.candidate_dir)
    job = first.make_job()
    threshold = find_threshold_between(before, job.prepared.read(engines.find_unseen(job)))
    opened.clear()
    other, ear = place.with_train(**INT8_TOO, threshold=threshold, abstain={"coverage": 0.5}), Ear()
    note = other.train(ear)
    assert (ear.epochs, opened) == ([], [FP32]), "only the last check, of the whole bundle"
    bundle = load_bundle(place.settings.candidate_dir)
    found, known = bundle.card.engines[INT8], before.card.engines[INT8]
    assert (found["changed"] >= 1, found != known, found["images"], found["cosine"]) == (True, True, 8, known["cosine"])
    shutil.rmtree(place.settings.work_dir("train"))
    assert other.train().bundle == note.bundle
    assert load_bundle(place.settings.candidate_dir).files == bundle.files, "as a whole training has it"
    assert opened.count(INT8) == 1


def test_a_stop_in_the_checks_of_engines_repeats_no_epoch_and_no_check_that_was_made(
    place: Place, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wished, judge = place.with_train(**INT8_TOO), engines._judge

    def stop(*args: Any) -> None:
        judge(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engines, "_judge", stop)
        with pytest.raises(KeyboardInterrupt):
            wished.train(stopped := Ear())
    assert stopped.said("stopped after the last epoch; the same command goes on with making the bundle")
    assert opened == [FP32, FP32, INT8], "for the reference embeddings, and for the check"
    opened.clear()
    monkeypatch.setattr(engines, "quantise", None)
    note = wished.train(ear := Ear())
    assert ear.epochs == []
    assert opened == [FP32, FP32], "for the reference embeddings, and to check the whole bundle"
    assert load_bundle(place.settings.candidate_dir).digest == note.bundle


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bundle": 1}', "null", None])
def test_a_note_that_was_damaged_costs_a_training_and_no_more(finished: tuple[Place, Any], text: str | None) -> None:
    place, _ = finished
    (path,) = place.settings.work_dir("train").glob("*/done.json")
    note = {**read_json(path), "extra": None}
    path.write_text(json.dumps(note) if text is None else text)
    assert fit._load_note(path.parent) is None
    assert fit._find_finished(path.parent, place.make_job()) is None


def test_only_the_newest_other_card_is_kept(finished: tuple[Place, Any]) -> None:
    place, _ = finished
    notes = [place.with_train(threshold=value).train() for value in (0.6, 0.7)]
    (kept,) = place.settings.work_dir("train").glob("*/again/done.json")
    assert read_json(kept)["bundle"] == notes[1].bundle
    assert notes[0].extra["network_of"] == notes[1].extra["network_of"]
    assert len({note.run_id for note in notes}) == 2
    place.train()
    assert not kept.exists()


def test_a_kill_while_the_card_is_made_costs_neither_the_network_nor_a_run(
    finished: tuple[Place, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, first = finished
    other = place.with_train(**OTHER_CARD)
    with monkeypatch.context() as patch:

        def kill(folder: Path, *args: object) -> None:
            (folder / "golden").mkdir(parents=True)
            raise KeyboardInterrupt

        patch.setattr(fit, "write_bundle_again", kill)
        with pytest.raises(KeyboardInterrupt):
            other.train()
    assert sorted(run["status"] for run in place.tracking.runs.values()) == ["FINISHED", "KILLED"]
    third = place.with_train(threshold=0.7).train()
    assert [run["status"] for run in place.tracking.runs.values()] == ["FINISHED", "KILLED", "FINISHED"]
    assert run_of(place, third.run_id)["params"]["train.threshold"] == "0.7", "a run is of one set of params"
    with monkeypatch.context() as patch:
        patch.setattr(fit, "write_bundle_again", kill)
        with pytest.raises(KeyboardInterrupt):
            other.train()
    ear = Ear()
    note = other.train(ear)
    assert ear.epochs == [] and ear.said(TAKEN)
    assert [run["status"] for run in place.tracking.runs.values()] == ["FINISHED", "KILLED", "FINISHED", "FINISHED"]
    assert note.extra["network_of"] == first.run_id


def test_thresholds_changed_while_a_training_is_stopped_cost_no_epoch(place: Place) -> None:
    with pytest.raises(KeyboardInterrupt):
        place.train(Ear(stop_at=1))
    ear = Ear()
    note = place.with_train(threshold=0.7).train(ear)
    assert [report.epoch for report in ear.epochs] == [2]
    (stopped, run) = place.tracking.runs.values()
    assert (stopped["status"], run["status"], run["tags"]["visionloop.ended"]) == ("KILLED", "FINISHED", "all epochs")
    assert (stopped["params"]["train.threshold"], run["params"]["train.threshold"]) == ("0.5", "0.7")
    assert [step for step, figures in sorted(run["metrics"].items()) if "val/loss" in figures] == [1, 2]
    assert load_bundle(place.settings.candidate_dir).card.threshold == 0.7
    assert note.extra.get("network_of") is None


def crown(place: Place, note: Any) -> None:
    """Make the candidate the champion."""
    upload_bundle(place.store, load_bundle(place.settings.candidate_dir))
    facts = {"action": "promote", "model_version": "1", "decision": None, "dataset": {}, "run_id": note.run_id}
    append_entry(place.store, "shapes", None, bundle=note.bundle, by="x", why="x", at=NOW, **facts)


def test_a_machine_without_the_work_folder_takes_the_champions_network(finished: tuple[Place, Any]) -> None:
    place, first = finished
    crown(place, first)
    other = place.with_train(**OTHER_CARD)
    here = other.train()
    shutil.rmtree(place.settings.work_dir("train"))
    ear = Ear()
    there = other.train(ear)
    assert ear.epochs == [] and ear.said(f"the network of run {first.run_id[:8]} {TAKEN}")
    assert (there.bundle, there.extra["network_of"]) == (here.bundle, first.run_id)
    shutil.rmtree(place.settings.work_dir("train"))
    whole = Ear()
    place.tracking.runs[first.run_id]["tags"]["visionloop.network_key"] = "of another code"
    assert other.train(whole).bundle == here.bundle
    assert len(whole.epochs) == 2


def test_the_champions_own_run_is_the_source_also_where_it_took_its_network_from_another(
    finished: tuple[Place, Any],
) -> None:
    """The other run may be deleted in MLflow, or hold the first epochs alone."""
    place, first = finished
    taken = place.with_train(threshold=0.6).train()
    crown(place, taken)
    shutil.rmtree(place.settings.work_dir("train"))
    del place.tracking.runs[first.run_id]
    ear = Ear()
    note = place.with_train(threshold=0.7).train(ear)
    assert ear.epochs == [] and note.extra["network_of"] == taken.run_id
    figures = run_of(place, note.run_id)["metrics"]
    assert figures == run_of(place, taken.run_id)["metrics"]
    assert [step for step, found in sorted(figures.items()) if "val/loss" in found] == [1, 2]
    assert note.run_id not in (first.run_id, taken.run_id)


def test_a_warm_start_takes_its_network_again_too_also_where_it_is_the_champion_now(place: Place) -> None:
    warm = place.with_train(way="warm")
    first = warm.train()
    crown(place, first)
    ear = Ear()
    note = warm.with_train(threshold=0.7).train(ear)
    assert ear.epochs == [] and note.extra["network_of"] == first.run_id
    again = Ear()
    assert len((warm.with_train(threshold=0.7).train(again), *again.epochs)) == 3, "nothing changed: the next round"
    assert again.said(f"starts from champion {first.bundle[:12]}")


def test_a_full_disk_at_the_start_is_one_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run.json")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskError) as caught:
        place.train()
    assert str(caught.value) == (
        "run.json: cannot be written (No space left on device); expected a disk with free space. Free some; the same "
        "command goes on from the last finished epoch."
    )


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("backbone", "resnet81", "train.backbone: got 'resnet81'; expected a known backbone; near: resnet18, "),
        ("weights", "no.pth", "no.pth does not exist; expected none, default or a file."),
        ("monitor", "val/acuracy", "train.monitor: got 'val/acuracy', which no epoch of a binary training"),
        ("neighbours", {"k": 13}, "train.neighbours.k: got 13 with 12 training images; expected at most 12."),
    ],
)
def test_a_typo_is_told_before_torch_is_loaded_and_leaves_no_run(place: Place, key: str, value: Any, line: str) -> None:
    import yaml

    path = place.settings.params_path
    values = yaml.safe_load(path.read_text())
    values["train"] |= {key: value, **({"way": "knn"} if key == "neighbours" else {})}
    path.write_text(yaml.safe_dump(values))
    done = visionloop(place.settings.home, "train")
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert "loading torch" not in done.stdout
    assert not (place.settings.hidden_dir / "mlflow").exists()
