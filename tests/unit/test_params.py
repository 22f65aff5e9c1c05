"""params.yaml: each mistake is one line that names the key."""

import re
from pathlib import Path
from typing import Any

import pytest

from visionloop.errors import ParamsError
from visionloop.params import Gate, load_params, make_params
from visionloop.params.text import parse_yaml


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
        (
            {"serve": {"keep_images": {"confidence": 70}}},
            "params.yaml serve.keep_images.confidence: got 70; expected less than or equal to 1. Edit the file.",
        ),
        (
            {"serve": {"keep_images": {"confidnce": 0.7}}},
            "params.yaml serve.keep_images.confidnce: unknown key; expected confidence. Edit the file.",
        ),
        (
            {"gate": "on"},
            "params.yaml gate: got 'on'; expected keys below it: alpha, answered, approval, baseline",
        ),
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
        ({"train": []}, "params.yaml train: got []; expected keys below it: C, abstain, accumulate, augment"),
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
        (
            {"gate": {"floors": {"accurcy": 0.5}}},
            "params.yaml gate.floors.accurcy: unknown key; expected accuracy. Edit the file.",
        ),
        (
            {"gate": {"floors": {"speed": 0.5}}},
            "params.yaml gate.floors.speed: unknown key; expected one of accuracy, answered, answered_accuracy, auc",
        ),
        (
            {"gate": {"floors": {"accuracy": 95}}},
            "params.yaml gate.floors: got {'accuracy': 95}; expected a floor of accuracy from 0 to 1",
        ),
        ({"gate": {"floors": {"auc": {"line": 0.9, "low": 1}}}}, "params.yaml gate.floors.auc.low: unknown key"),
        (
            {"gate": {"class_drop": {"mode": True}}},
            "params.yaml gate.class_drop.mode: got True; expected 'on', 'dry_run'",
        ),
        (
            {"gate": {"min_images": {"all": 0}}},
            "params.yaml gate.min_images.all: got 0; expected greater than or equal",
        ),
        ({"gate": {"latency": {}}}, "params.yaml gate.latency: got {}; expected `ms`, `ratio`, or both"),
        (
            {"gate": {"metric": "macro_f1", "alpha": 0.01}, "evaluate": {"resamples": 1999}},
            "params.yaml evaluate.resamples: got 1999 with gate.metric: macro_f1 and gate.alpha: 0.01; expected an "
            "integer >= 2000 (20 / alpha",
        ),
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
    several = {"floors": {"accuracy": 0.9, "log_loss": 2, "auc": {"line": 0.8, "bound": "interval", "mode": "dry_run"}}}
    floors = make_params({"name": "pets", "gate": several}).gate.floors
    assert [(name, one.line, one.bound, one.mode) for name, one in floors.items()] == [
        ("accuracy", 0.9, "value", "on"),
        ("log_loss", 2.0, "value", "on"),
        ("auc", 0.8, "interval", "dry_run"),
    ]


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


def test_a_bare_number_of_images_is_that_of_all() -> None:
    asked = make_params({"name": "pets", "gate": {"min_images": 15}}).gate.min_images
    assert (asked.all, asked.per_class) == (15, 10)
    with pytest.raises(ParamsError, match=r"gate\.min_images\.all: got 0; expected greater than or equal"):
        make_params({"name": "pets", "gate": {"min_images": 0}})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"not found; expected a params\.yaml. Make a workspace"):
        load_params(tmp_path / "params.yaml")


def test_the_params_of_the_page_about_judging_are_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "judging.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.M | re.S)
    gates = [make_params({"name": "pets", **parse_yaml(block, "judging.md")}).gate for block in blocks]
    assert [(gate.looks, gate.approval, len(gate.floors)) for gate in gates] == [
        ("tell", "none", 0),
        ("spend", "required", 5),
        ("tell", "none", 1),
    ]
    assert gates[0] == Gate(), "the first block shows the defaults"
