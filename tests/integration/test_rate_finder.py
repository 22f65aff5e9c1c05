"""The learning-rate finder on shapes: a rate that learns, the same again, and a workspace that stays as it was."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes import run_here
from trainings import Ear, Place, make_place, registered
from visionloop.cli.tune import describe_sweep
from visionloop.errors import ParamsError, TrainingError
from visionloop.features.embed import embed
from visionloop.training.rate_finder import make_rates, make_sweep, search_rate

# A batch is 8 images: with half as many steps its noise at high rates is as steep as the fall, and rounding decides.
STEPS = 80


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("rates") / "ws", max_epochs=2)


@pytest.fixture
def clean(place: Place) -> Place:
    return dataclasses.replace(place, tracking=type(place.tracking)())


def list_files(home: Path) -> dict[str, bytes]:
    files = (path for path in home.rglob("*") if path.is_file() and ".visionloop/mlflow" not in str(path))
    return {str(path.relative_to(home)): path.read_bytes() for path in files}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_suggested_rate_learns_and_nothing_but_the_figure_is_left(
    clean: Place, precision: str, tmp_path: Path
) -> None:
    clean = clean.with_train(precision=precision)
    (clean.settings.hidden_dir / "lr-find.png").unlink(missing_ok=True)
    before = list_files(clean.settings.home)
    told: list[tuple[int, int]] = []
    rates = make_rates(1e-6, 1.0, STEPS)
    sweep, run_id = search_rate(clean.make_job(), rates, on_step=lambda done, total: told.append((done, total)))
    after = list_files(clean.settings.home)
    assert after.pop(".visionloop/lr-find.png").startswith(b"\x89PNG")
    assert after == before
    assert told[0] == (1, STEPS)
    run = clean.tracking.runs[run_id]
    assert run["status"] == "FINISHED"
    assert run["tags"]["visionloop.kind"] == "lr-find"
    assert run["artifacts"] == ["figures/lr-find.png"]
    assert sweep.suggestion is not None
    assert 3e-5 < sweep.suggestion < 3e-1
    assert run["metrics"] == {0: {"lr_find/suggestion": sweep.suggestion}}
    # At that rate a training learns; at the sweep's lowest it does not.
    learned = clean.with_train(learning_rate=sweep.suggestion, schedule="constant").learn(work=tmp_path / "a")
    idle = clean.with_train(learning_rate=1e-6, schedule="constant").learn(work=tmp_path / "b")
    assert learned.metrics["train/loss"] < idle.metrics["train/loss"] - 0.1


def test_the_command_says_the_result_alone_when_it_is_asked_to(
    clean: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("visionloop.workspace.open_workspace", lambda: clean)
    words = ("lr-find", "--steps", str(STEPS))
    assert run_here(monkeypatch, *words, "--quiet") == 0
    quiet = capsys.readouterr().out.splitlines()
    assert quiet[0].split() == ["rate", "loss"]
    assert quiet[-1].startswith("params.yaml  train.learning_rate: ")
    assert run_here(monkeypatch, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{found['suggestion']:g}" == quiet[-1].split()[2], "the same search gives the same rate"
    assert len(found["rates"]) == len(found["losses"]) == len(found["smooth"]) <= STEPS
    assert found["figure"] == ".visionloop/lr-find.png"


def test_the_loss_is_of_the_same_images_and_the_suggestion_in_the_valley(clean: Place) -> None:
    """The valley is that of all sweeps together, whose noise is smaller."""
    rates = make_rates(1e-6, 1.0, STEPS)
    sweeps = [search_rate(clean.with_train(seed=seed).make_job(), rates)[0] for seed in range(3)]
    num_steps = min(len(sweep.rates_s) for sweep in sweeps)
    losses = np.mean([sweep.losses_s[:num_steps] for sweep in sweeps], axis=0)
    valley = make_sweep(rates[:num_steps], losses, num_steps=STEPS).suggestion
    assert valley is not None
    for sweep in sweeps:
        assert sweep.suggestion is not None
        assert abs(np.log10(sweep.suggestion / valley)) < np.log10(3)
        # Before the fall the curve is flat: batches differ by a tenth of the fall.
        assert np.abs(np.diff(sweep.losses_s[:20])).max() < 0.02 * (sweep.losses_s[0] - sweep.smooth_s.min())


def test_the_same_sweep_gives_the_same_losses(clean: Place) -> None:
    job, rates = clean.with_train(mixup=0.2, dropout=0.3, clip_norm=1.0).make_job(), make_rates(1e-5, 1e-2, 8)
    first, again = (search_rate(job, rates)[0] for _ in range(2))
    assert first.losses_s.tolist() == again.losses_s.tolist()


def test_all_layers_learn_from_the_first_step_in_a_fine_tuning(clean: Place, tmp_path: Path) -> None:
    from visionloop.networks.backbones import make_backbone

    torch.save(make_backbone("small_cnn", (32, 32))[0].state_dict(), tmp_path / "w.pth")
    keys = {"way": "finetune", "weights": str(tmp_path / "w.pth"), "backbone_rate": 0.5}
    rates = make_rates(1e-5, 1e-2, 8)
    frozen, whole = (
        search_rate(clean.with_train(**keys, frozen_epochs=epochs).make_job(), rates)[0] for epochs in (2, 0)
    )
    assert frozen.losses_s.tolist() == whole.losses_s.tolist()


def test_a_head_that_is_solved_gets_a_rate_all_the_same_and_it_is_said_what_for(place: Place) -> None:
    ear, head = Ear(), place.with_train(way="frozen")
    embed(head)
    sweep, _ = search_rate(head.make_job(ear), make_rates(1e-5, 1e-2, 8))
    assert len(sweep.rates_s) == 8
    line = "head: is solved without a learning rate; `train.solver: epochs` uses the one that is found"
    assert ear.said(line)
    ear = Ear()
    search_rate(head.with_train(solver="epochs").make_job(ear), make_rates(1e-5, 1e-2, 8))
    assert not ear.said(line)


def test_a_loss_that_explodes_ends_the_sweep(clean: Place) -> None:
    sweep, _ = search_rate(clean.make_job(), make_rates(1e-4, 100.0, 60))
    assert len(sweep.rates_s) < 60
    lines = describe_sweep(sweep, 60)
    assert "the loss exploded" in lines[-1]
    assert sum("<- falls most steeply" in line for line in lines) == 1


def test_a_loss_that_is_no_number_is_an_error_and_the_run_is_marked(clean: Place) -> None:
    with registered(lambda features, images, is_training: features * float("nan")) as name:
        job = clean.with_train(backbone=name).make_job(Ear())
        with pytest.raises(
            TrainingError, match=r"the loss is not finite at the first step, at 1e-06; expected a number"
        ):
            search_rate(job, make_rates(1e-6, 1.0, 20))
    assert clean.tracking.only["status"] == "FAILED"


def test_a_way_that_learns_nothing_has_no_rate(clean: Place) -> None:
    with pytest.raises(ParamsError, match="'knn', which has no epochs"):
        search_rate(clean.with_train(way="knn").make_job(), make_rates(1e-6, 1.0, 20))
