"""The file graph: code digests, healing after kills, the stage's own error."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from visionloop import pipeline
from visionloop.cli.run import write_error_file
from visionloop.data.manifest import load_pin
from visionloop.errors import BusyError, DatasetError, DiskError, PipelineError, StoreError
from visionloop.params import make_params
from visionloop.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    return load_settings({}, tmp_path)


def test_code_file_is_written_only_when_it_differs(tmp_path: Path) -> None:
    params = make_params({"name": "pets"})
    digests = pipeline.refresh_code(tmp_path, params)
    assert set(digests) == {"prepare", "embed", "train", "evaluate", "gate", "weights", "max_pixels"}
    path = tmp_path / "code.json"
    assert json.loads(path.read_text()) == digests
    stamp = path.stat().st_mtime_ns
    pipeline.refresh_code(tmp_path, params)
    assert path.stat().st_mtime_ns == stamp


def test_a_candidate_of_which_dvc_recorded_other_params_is_not_evaluated(tmp_path: Path) -> None:
    params = make_params({"name": "pets", "train": {"seed": 1, "max_epochs": 3}})
    card = {name: getattr(params, name).model_dump(mode="json") for name in ("prepare", "train")}
    lock = tmp_path / "dvc.lock"
    pipeline.check_recorded(tmp_path, card)  # no dvc.lock
    text = "stages:\n  train:\n    params:\n      params.yaml:\n        name: pets\n        train: {}\n"
    for section in ("{seed: 1, max_epochs: 3}", "{seed: 1, max_epochs: 3, wings: 2}"):  # wings: of another code
        lock.write_text(text.format(section))
        pipeline.check_recorded(tmp_path, card)
    lock.write_text(text.format("{seed: 2, max_epochs: 3}"))
    told = r"dvc\.lock train: says seed: 2, and models/candidate was made with seed: 1; .* `dvc repro -f train`"
    with pytest.raises(PipelineError, match=told):
        pipeline.check_recorded(tmp_path, card)
    older = {"train": {key: value for key, value in card["train"].items() if key != "seed"}}
    pipeline.check_recorded(tmp_path, older)  # a card of before there was that key


def test_state_follows_dataset_params_and_code(tmp_path: Path) -> None:
    params = make_params({"name": "pets"})
    state = pipeline.compute_state(tmp_path, params, "d1")
    assert (state["dataset"], state["weights"]) == ("d1", "")
    assert state == pipeline.compute_state(tmp_path, params, "d1")
    other = pipeline.compute_state(tmp_path, make_params({"name": "pets", "train": {"seed": 1}}), "d1")
    assert {key for key in state if state[key] != other[key]} == {"params"}


def test_other_weights_under_the_same_name_are_another_state(tmp_path: Path) -> None:
    params = make_params({"name": "pets", "train": {"weights": "weights/net.pth"}})
    assert pipeline.compute_state(tmp_path, params, "d1")["weights"] == ""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "net.pth").write_bytes(b"one")
    first = pipeline.compute_state(tmp_path, params, "d1")
    assert first["weights"] == hashlib.sha256(b"one").hexdigest()
    assert pipeline.refresh_code(tmp_path, params)["weights"] == first["weights"]
    (tmp_path / "weights" / "net.pth").write_bytes(b"two")
    second = pipeline.compute_state(tmp_path, params, "d1")
    assert {key for key in first if first[key] != second[key]} == {"weights"}
    assert pipeline.refresh_code(tmp_path, params)["weights"] == second["weights"]
    assert json.loads((tmp_path / "code.json").read_text())["weights"] == second["weights"]


@pytest.mark.parametrize("weights", ["none", "default", "s3://bucket/net.pth"])
def test_weights_that_are_no_file_are_told_by_the_params(tmp_path: Path, weights: str) -> None:
    train = {"weights": weights, "weights_sha256": "0" * 64}
    assert pipeline.compute_state(tmp_path, make_params({"name": "pets", "train": train}), "d1")["weights"] == ""


def test_stage_names_come_from_dvc_yaml(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages:\n  prepare: {cmd: a}\n  embed: {cmd: b}\n  train: {cmd: c}\n")
    assert pipeline.read_stage_names(tmp_path) == ["prepare", "embed", "train"]
    (tmp_path / "dvc.yaml").write_text("{}")
    with pytest.raises(PipelineError, match=r"dvc\.yaml: is missing or has no stages"):
        pipeline.read_stage_names(tmp_path)


def test_heal_restores_an_emptied_lock_and_drops_a_torn_table(settings: Settings) -> None:
    lock, table = settings.home / "dvc.lock", settings.home / ".dvc" / "tmp" / "rwlock"
    table.parent.mkdir(parents=True)
    lock.write_text("schema: '2.0'\nstages:\n  prepare: {}\n")
    pipeline._snapshot(settings)
    lock.write_text("")
    table.write_text('{"a": ')
    pipeline.heal(settings)
    assert "prepare" in lock.read_text()
    assert not table.exists()


def test_heal_leaves_what_is_whole(settings: Settings) -> None:
    lock, table = settings.home / "dvc.lock", settings.home / ".dvc" / "tmp" / "rwlock"
    table.parent.mkdir(parents=True)
    lock.write_text("stages: {}\n")
    pipeline._snapshot(settings)
    lock.write_text("stages: {prepare: {}}\n")
    table.write_text("{}")
    pipeline.heal(settings)
    assert lock.read_text() == "stages: {prepare: {}}\n"
    assert table.read_text() == "{}"


def test_the_stages_own_error_is_raised_again(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    told = DatasetError("a", "b", "c", "d.")
    write_error_file(told, {"VISIONLOOP_HOME": str(tmp_path)})
    error = pipeline._read_error(
        tmp_path / ".visionloop" / "error.json", "train", ["ERROR: failed to reproduce 'train'"]
    )
    assert type(error) is DatasetError
    assert str(error) == "a: b; expected c. d."
    assert not error.transient


def test_an_error_that_may_pass_says_so_on_both_sides_of_dvc(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    told = StoreError("s3://b", "is busy")
    told.transient = True
    write_error_file(told, {"VISIONLOOP_HOME": str(tmp_path)})
    error = pipeline._read_error(tmp_path / ".visionloop" / "error.json", "prepare", [])
    assert type(error) is StoreError
    assert error.transient


def test_without_one_the_last_line_tells(tmp_path: Path) -> None:
    error = pipeline._read_error(tmp_path / "none", "train", ["x", "ERROR: failed to reproduce 'train'", "y"])
    assert str(error).startswith("stage train: failed (ERROR: failed to reproduce 'train')")
    busy = pipeline._read_error(tmp_path / "none", "train", ["ERROR: '/x/models' is busy, it is being blocked by:"])
    assert isinstance(busy, BusyError)


@pytest.mark.parametrize(
    "line",
    [
        "ERROR: failed to transfer 'md5: 0123' - [Errno 28] No space left on device: '/x/cache'",
        "ERROR: unexpected error - database or disk is full",
    ],
)
def test_a_full_disk_that_only_dvc_tells_of_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / ".visionloop").mkdir()
    (tmp_path / ".visionloop" / "error.json").write_text("")  # it could not be written either
    error = pipeline._read_error(tmp_path / ".visionloop" / "error.json", "embed", [line, "ERROR: failed to reproduce"])
    assert isinstance(error, DiskError)
    told = rf"stage embed: cannot be written \(no space left on the disk of {tmp_path}, [\d.,]+ [KMGT]B free\);"
    assert re.match(told, str(error))


def test_environment_of_a_stage(tmp_path: Path) -> None:
    env = pipeline.make_stage_environment(tmp_path, {"PATH": "/bin", "DO_NOT_TRACK": "false"})
    assert env["PATH"].endswith(":/bin")
    assert env["DO_NOT_TRACK"] == "false", "what the user set stays"
    assert env["DVC_SITE_CACHE_DIR"].startswith(str(tmp_path))


@pytest.mark.parametrize("side", ["ours", "both"])
def test_conflict_marks_in_the_lock_are_told_and_left(settings: Settings, side: str) -> None:
    lock, snapshot = settings.home / "dvc.lock", settings.hidden_dir / "dvc.lock"
    settings.hidden_dir.mkdir()
    snapshot.write_text("stages: {}\n")
    theirs = "" if side == "ours" else "  train: {}\n"
    text = f"schema: '2.0'\nstages:\n<<<<<<< HEAD\n  prepare: {{}}\n=======\n{theirs}>>>>>>> other\n"
    lock.write_text(text)
    with pytest.raises(PipelineError, match=r"dvc\.lock: has the conflict marks of a merge in it.*git checkout --ours"):
        pipeline.heal(settings)
    assert lock.read_text() == text
    lock.write_text("")
    pipeline.heal(settings)
    assert lock.read_text() == "stages: {}\n"


def test_conflict_marks_in_the_pin_are_told(settings: Settings) -> None:
    settings.pin_path.parent.mkdir()
    settings.pin_path.write_text('{\n<<<<<<< HEAD\n "version": 1\n=======\n "version": 2\n>>>>>>> b\n}\n')
    with pytest.raises(DatasetError, match=r"conflict marks of a merge.*`visionloop ingest` pins the newest"):
        load_pin(settings.pin_path)


DVC = """\
stages:
  train:
    cmd: make
    deps: [data/dataset.json, data/prepared]
    params: [name, train.seed, {code.json: [train, weights]}]
    outs: [made.txt]
"""


@pytest.fixture
def graph(settings: Settings) -> Settings:
    """A workspace with one stage, which reads a key of params.yaml, two of code.json, the pin and a folder."""
    home = settings.home
    (home / "data" / "prepared").mkdir(parents=True)
    (home / "data" / "prepared" / "index").write_text("x")
    (home / "data" / "dataset.json").write_text("{}")
    (home / "params.yaml").write_text("name: pets\ntrain: {seed: 1, max_epochs: 2}\n")
    (home / "code.json").write_text('{"train": "a", "weights": "b", "gate": "c"}')
    (home / "dvc.yaml").write_text(DVC)
    return settings


def test_the_inputs_of_a_stage_are_what_dvc_yaml_names(graph: Settings) -> None:
    home = graph.home
    before = pipeline.read_inputs(home, "train")
    names = {"params.yaml name", "params.yaml train.seed", "code.json train", "code.json weights"}
    assert set(before) == {*names, "data/dataset.json", "train.weights"}
    (home / "params.yaml").write_text("name: pets\n\ntrain: {max_epochs: 3, seed: 0x1}  # other text, other epochs\n")
    (home / "code.json").write_text('{"train": "a", "weights": "b", "gate": "d"}')
    pipeline.check_inputs(home, "train", before)
    assert pipeline.read_inputs(home, "gate") == {}


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        (
            "params.yaml",
            "name: pets\ntrain: {seed: 2}\n",
            r"params\.yaml changed while it ran \(train\.seed\); expected",
        ),
        (
            "params.yaml",
            "name: pets\ntrain: {seed: 1",
            r"params\.yaml, train\.weights changed .* \(name, train\.seed\)",
        ),
        ("params.yaml", None, r"params\.yaml, train\.weights changed while it ran \(name, train\.seed\); expected"),
        ("code.json", '{"train": "z", "weights": "b"}', r"code\.json changed while it ran \(train\); expected what it"),
        ("data/dataset.json", '{"version": 2}', r"data/dataset\.json changed while it ran; expected what it has read"),
        ("data/dataset.json", None, r"data/dataset\.json changed while it ran; expected what it has read"),
    ],
)
def test_what_changes_while_a_stage_runs_is_named(graph: Settings, name: str, text: str | None, found: str) -> None:
    before = pipeline.read_inputs(graph.home, "train")
    (graph.home / name).unlink()
    if text is not None:
        (graph.home / name).write_text(text)
    with pytest.raises(PipelineError, match=rf"^stage train: {found}"):
        pipeline.check_inputs(graph.home, "train", before)


def test_other_bytes_in_the_file_of_the_weights_are_a_change(graph: Settings) -> None:
    (graph.home / "params.yaml").write_text("name: pets\ntrain: {weights: net.pth}\n")
    (graph.home / "net.pth").write_bytes(b"one")
    before = pipeline.read_inputs(graph.home, "train")
    (graph.home / "net.pth").write_bytes(b"two")
    with pytest.raises(PipelineError, match=r"^stage train: train\.weights changed while it ran; expected"):
        pipeline.check_inputs(graph.home, "train", before)


def test_a_decision_is_about_the_params_that_its_candidate_was_made_with(tmp_path: Path) -> None:
    made, now = ({"name": "pets", "train": {"seed": seed}} for seed in (1, 2))
    card = {"params": {"train": make_params(made).train.model_dump(mode="json"), "unknown": 1}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    state = pipeline.compute_state(tmp_path, make_params(now), "d1", candidate_dir=tmp_path)
    assert state == pipeline.compute_state(tmp_path, make_params(made), "d1")
    for damaged in ("", "[]", '{"params": [1]}', '{"params": {"train": NaN}}'):
        (tmp_path / "card.json").write_text(damaged)
        state = pipeline.compute_state(tmp_path, make_params(now), "d1", candidate_dir=tmp_path)
        assert state == pipeline.compute_state(tmp_path, make_params(now), "d1"), damaged
