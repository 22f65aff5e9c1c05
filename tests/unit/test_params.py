"""params.yaml: each mistake is one line that names the key."""

from pathlib import Path
from typing import Any

import pytest

from visionloop.errors import ParamsError
from visionloop.params import load_params, make_params


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"train": {"epochs": 3}}, "params.yaml train.epochs: unknown key; expected one of max_epochs, frozen_epochs"),
        ({"prepare": {"size": 3}}, "params.yaml prepare.size: unknown key; expected one of resize, train_size"),
        ({"prepare": {"imagesize": 3}}, "params.yaml prepare.imagesize: unknown key; expected image_size."),
        ({"embed": {"BatchSize": 3}}, "params.yaml embed.BatchSize: unknown key; expected batch_size."),
        ({"batchsize": 3}, "params.yaml batchsize: unknown key; expected one of embed.batch_size, train.batch_size."),
        (
            {"ingest": {"sources": [{"kind": "folder", "path": "x", "patern": "y"}]}},
            "params.yaml ingest.sources.0.patern: unknown key; expected pattern.",
        ),
        (
            {"train": {"tensorboard": True}},
            "params.yaml train.tensorboard: stands in another section; expected compute.tensorboard. Edit the file.",
        ),
        ({"train": {"devices": 2}}, "params.yaml train.devices: stands in another section; expected compute.devices"),
        ({"train": {"neighbours": {"devices": 2}}}, "params.yaml train.neighbours.devices: unknown key"),
        ({"gate": "on"}, "params.yaml gate: got 'on'; expected keys below it: alpha, floors, margin, metric, rule."),
        (
            {"ingest": {"expect": [1]}},
            "params.yaml ingest.expect: got [1]; expected keys below it: classes, max_imbalance, min_per_class",
        ),
        (
            {"train": {"preprocessing": "clip"}},
            "params.yaml train.preprocessing: got 'clip'; expected 'imagenet' or 'none', or keys below it: mean, "
            "rescale_factor, std. Edit the file.",
        ),
        (
            {"train": {"preprocessing": {"mean": 3, "std": [1, 1, 1]}}},
            "params.yaml train.preprocessing.mean: got 3; expected a list: [a, b]",
        ),
        (
            {"ingest": {"sources": {"kind": "folder"}}},
            "params.yaml ingest.sources: got {'kind': 'folder'}; expected a list",
        ),
        ({"colour": {}}, "params.yaml colour: unknown key; expected one of compute, embed, evaluate, gate, ingest"),
        ({"train": {"on": "all"}}, "params.yaml train: got {'on': 'all'}; expected `monitor: train/accuracy` with"),
        (
            {"train": {"weights": "s3://b/w.pth"}},
            "params.yaml train: got {'weights': 's3://b/w.pth'}; expected `weights_s",
        ),
        ({"tune": {"space": {"dropout": {"low": 1, "high": 0}}}}, "params.yaml tune.space.dropout"),
        ({"trian": {}}, "params.yaml trian: unknown key; expected train."),
        ({"prepare": {"image_size": 0}}, "params.yaml prepare.image_size: got 0; expected greater than or equal to 32"),
        ({"prepare": {"image_size": "big"}}, "params.yaml prepare.image_size: got 'big'; expected integer"),
        ({"train": {"max_epochs": "3"}}, "params.yaml train.max_epochs: got '3'; expected integer"),
        ({"train": {"way": "finetune"}}, "params.yaml train: got {'way': 'finetune'}; expected `weights: default`"),
        ({"train": []}, "params.yaml train: got []; expected keys below it: C, accumulate, augment"),
        ({"name": "My Pets"}, "params.yaml name: got 'My Pets'; expected lower-case letters, digits and '-'"),
        (
            {"ingest": {"sources": [{"kind": "ftp"}]}},
            "params.yaml ingest.sources.0.kind: got 'ftp'; expected one of 'folder', 'table', 'archive'",
        ),
        ({"ingest": {"sources": [{"kind": "folder"}]}}, "params.yaml ingest.sources.0.path: missing; expected a value"),
        ({"ingest": {"split": {"fractions": [0.5, 0.5, 0.5]}}}, "params.yaml ingest.split: got"),
        (
            {"schedule": {"retrain": "daily"}},
            "params.yaml schedule.retrain: got 'daily'; expected a cron expression",
        ),
        ({"gate": {"floors": {"acc": 0.5}}}, "params.yaml gate.floors.acc"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(value: dict[str, Any], line: str) -> None:
    with pytest.raises(ParamsError) as caught:
        make_params({"name": "pets", **value})
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert "Edit the file" in str(caught.value)


def test_defaults_and_sizes() -> None:
    assert make_params({"name": "pets"}).prepare.size_hw == (224, 224)
    assert make_params({"name": "pets", "prepare": {"image_size": [96, 128]}}).prepare.size_hw == (96, 128)


def test_digest_follows_what_changes_a_model_and_nothing_else() -> None:
    plain = make_params({"name": "pets"}).digest()
    compute = {"tensorboard": True, "confusion_every": 3, "devices": 2, "accelerator": "cpu", "strategy": "ddp"}
    for other in ({"serve": {"max_queue": 3}, "schedule": {"retrain": "0 1 * * *"}}, {"compute": compute}):
        assert plain == make_params({"name": "pets", **other}).digest()
    assert plain != make_params({"name": "pets", "train": {"seed": 1}}).digest()
    assert plain != make_params({"name": "pets", "gate": {"rule": "no_worse"}}).digest()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: [", "params.yaml line 1: is not YAML"),
        ("- a\n", "params.yaml: holds a list; expected sections with keys"),
        ("", "params.yaml: holds a NoneType; expected sections with keys"),
        ("name: 3\n", 'params.yaml name: got 3; expected text: write it in quotes, "3"'),
    ],
)
def test_a_file_that_is_no_params(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    assert str(caught.value).startswith(line)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"not found; expected a params\.yaml. Make a workspace"):
        load_params(tmp_path / "params.yaml")
