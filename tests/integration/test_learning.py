"""What a step learns: frozen and thawed backbones, averages, schedules, weights; and the same after a stop."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from trainings import Ear, make_place, same_weights
from visionloop.networks.backbones import make_backbone
from visionloop.networks.classifier import Classifier
from visionloop.params import Train
from visionloop.training.datamodule import Batch
from visionloop.training.imbalance import choose_imbalance
from visionloop.training.module import ClassifierModule, compute_decay

SIZE = 16
EPOCHS = 4


class Order(Sampler[Any]):
    """Batches of 8 rows, shuffled by the epoch alone."""

    def __init__(self, num: int) -> None:
        self.num, self.epoch = num, 0
        self.batches = np.array_split(np.arange(num), -(-num // 8))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng([1, self.epoch]).permutation(self.num)
        yield from np.array_split(order, len(self))


class Stripes(Dataset[Batch]):
    """Images of noise; class k has bright rows at its own place. Several labels: several such rows."""

    def __init__(self, targets: np.ndarray, *, contrast: int = 60, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 120, (len(targets), SIZE, SIZE, 3))
        hot = targets if targets.ndim == 2 else np.eye(4, dtype=int)[targets]
        for k in range(hot.shape[1]):
            images[hot[:, k] == 1, 4 * k : 4 * k + 3] += contrast
        self.images, self.targets = torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: Any) -> Batch:
        rows_n = torch.from_numpy(np.asarray(rows))
        return Batch(self.images[rows_n], self.targets[rows_n], rows_n)

    def load(self) -> DataLoader[Batch]:
        return DataLoader(self, batch_size=None, sampler=Order(len(self)))


class StopAfter(pl.Callback):
    """Ends a training after some epochs, as a kill between two epochs would."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class Each(pl.Callback):
    """Calls a function after each step, each epoch."""

    def __init__(
        self, *, step: Callable[[Any], None] | None = None, epoch: Callable[[Any], None] | None = None
    ) -> None:
        self.step, self.epoch = step, epoch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.step:
            self.step(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epoch:
            self.epoch(pl_module)


def make_module(section: Train, *, task: str = "multiclass", num_classes: int = 4, **options: Any) -> ClassifierModule:
    torch.manual_seed(0)
    backbone, num_features = make_backbone("small_cnn", (SIZE, SIZE))
    classifier = Classifier(backbone, num_features, num_classes, task=task, dropout=section.dropout)
    return ClassifierModule(classifier, section, **options)


def fit(
    folder: Path,
    module: ClassifierModule,
    train: Stripes,
    *callbacks: pl.Callback,
    resume: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Train with a checkpoint each epoch, and return the last figures."""
    section = module.params
    best = ModelCheckpoint(folder, "best", section.monitor, mode=section.monitor_mode)
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = pl.Trainer(
        max_epochs=section.max_epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks, best, last],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        deterministic=True,
        accumulate_grad_batches=section.accumulate,
        limit_val_batches=0 if section.on == "all" else 1.0,
        **options,
    )
    val = Stripes(train.targets.numpy()[::2], seed=99)
    checkpoint = folder / "last.ckpt" if resume else None
    trainer.fit(module, train.load(), val.load(), ckpt_path=checkpoint, weights_only=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def load(path: Path, key: str = "state_dict") -> dict[str, Tensor]:
    return torch.load(path, "cpu", weights_only=True)[key]  # type: ignore[no-any-return]


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


BALANCED = Stripes(np.arange(48) % 4)
FINETUNE: dict[str, Any] = {"way": "finetune", "weights": "w.pth", "max_epochs": EPOCHS, "learning_rate": 0.01}


@pytest.mark.parametrize(
    ("stop", "more"),
    [
        (1, {**FINETUNE, "frozen_epochs": 2, "ema": 0.9, "mixup": 0.4, "cutmix": 1.0, "dropout": 0.3}),
        (2, {**FINETUNE, "frozen_epochs": 2, "schedule": "one_cycle"}),
        (3, {**FINETUNE, "frozen_epochs": 2, "ema": 0.9, "label_smoothing": 0.1}),
        (
            2,
            {"max_epochs": EPOCHS, "schedule": "plateau", "patience": 2, "monitor": "train/loss", "learning_rate": 0.5},
        ),
        (3, {"max_epochs": EPOCHS, "schedule": "plateau", "patience": 2, "learning_rate": 0.5, "ema": 0.5}),
        (1, {"max_epochs": EPOCHS, "on": "all", "monitor": "train/accuracy", "ema": 0.9, "accumulate": 4}),
    ],
    ids=["frozen", "thawing", "thawed", "plateau-of-train", "plateau-of-val", "on-all"],
)
def test_going_on_gives_the_weights_of_an_uninterrupted_training(tmp_path: Path, stop: int, more: Any) -> None:
    section = Train(**more)
    figures = fit(tmp_path / "whole", make_module(section), BALANCED)
    fit(tmp_path / "parts", make_module(section), BALANCED, StopAfter(stop))
    assert fit(tmp_path / "parts", make_module(section), BALANCED, resume=True) == figures
    for key in ("state_dict", "current_model_state")[: 2 if section.ema else 1]:
        parts, whole = (load(tmp_path / name / "last.ckpt", key) for name in ("parts", "whole"))
        assert_same_bits(parts, whole)


def test_frozen_epochs_leave_the_backbone_as_it_was_to_the_bit(tmp_path: Path) -> None:
    module = make_module(Train(**FINETUNE, frozen_epochs=2))
    states: list[dict[str, Tensor]] = []

    def keep(module: ClassifierModule) -> None:
        states.append({name: tensor.clone() for name, tensor in module.classifier.state_dict().items()})

    keep(module)
    fit(tmp_path, module, BALANCED, Each(epoch=keep))
    backbone = [name for name in states[0] if name.startswith("backbone.")]
    assert any("running_mean" in name for name in backbone)
    for name in backbone:
        assert torch.equal(states[2][name], states[0][name]), name
        assert not torch.equal(states[3][name], states[2][name]), name
    assert not torch.equal(states[1]["head.weight"], states[0]["head.weight"])


def test_thawed_layers_learn_at_rates_that_grow_with_the_depth(tmp_path: Path) -> None:
    # Adam's first steps are of the size of the rate: the first layer's weights move backbone_rate times as far.
    section = Train(**FINETUNE, backbone_rate=0.01, schedule="constant", weight_decay=0.0)
    section = section.model_copy(update={"max_epochs": 1, "learning_rate": 1e-4})
    module = make_module(section)
    before = {name: tensor.detach().clone() for name, tensor in module.classifier.named_parameters()}
    fit(tmp_path, module, BALANCED)
    moved = {n: float((p.detach() - before[n]).abs().median()) for n, p in module.classifier.named_parameters()}
    first = next(iter(moved))
    assert moved["head.weight"] / moved[first] == pytest.approx(100, rel=0.5)
    convolutions = [moved[n] for n, p in module.classifier.named_parameters() if p.ndim == 4]
    assert convolutions == sorted(convolutions)


def test_average_is_validated_and_kept_and_equals_the_one_by_hand(tmp_path: Path) -> None:
    module = make_module(Train(max_epochs=2, learning_rate=0.01, ema=0.8, schedule="constant"))
    average: dict[str, Tensor] = {}
    validated: list[float] = []
    steps = 0

    def update(module: ClassifierModule) -> None:
        nonlocal steps
        for name, tensor in module.state_dict().items():
            if not average or name not in average or not tensor.is_floating_point():
                average[name] = tensor.clone()
            else:
                decay = compute_decay(0.8, steps)
                average[name] = decay * average[name] + (1 - decay) * tensor
        steps += 1

    def compare(module: ClassifierModule) -> None:
        other = make_module(module.params)
        other.load_state_dict(average)
        with torch.no_grad():
            units_nu = other.eval().compute_units(VAL.images)
        validated.append(float((units_nu - module.val_units_nu).abs().max()))

    VAL = Stripes(BALANCED.targets.numpy()[::2], seed=99)
    fit(tmp_path, module, BALANCED, Each(step=update, epoch=compare))
    assert steps == 12
    for name, tensor in load(tmp_path / "last.ckpt").items():
        assert torch.allclose(tensor, average[name], atol=1e-5), name
    assert max(validated) < 1e-3, "what was validated is the average, not the weights of the last step"
    current = load(tmp_path / "last.ckpt", "current_model_state")
    assert not torch.allclose(current["classifier.head.weight"], average["classifier.head.weight"], atol=1e-3)


def recall_of_rare(folder: Path, imbalance: Any) -> float:
    labels = np.repeat([0, 1], [114, 6])
    train = Stripes(labels, contrast=14)
    plan = choose_imbalance(labels, ("common", "rare"), "binary", imbalance)
    section = Train(max_epochs=6, learning_rate=3e-3, imbalance=imbalance)
    module = make_module(section, task="binary", num_classes=2, plan=plan)
    fit(folder, module, train)
    test = Stripes(np.repeat(1, 100), contrast=14, seed=5)
    with torch.no_grad():
        units_n1 = module.eval().compute_units(test.images)
    return float((units_n1 > 0).float().mean())


def test_weights_raise_the_recall_of_a_rare_class(tmp_path: Path) -> None:
    plain, weighted = recall_of_rare(tmp_path / "none", "none"), recall_of_rare(tmp_path / "weights", "weights")
    assert weighted > plain + 0.3, (plain, weighted)


def test_without_validation_the_training_figures_can_be_monitored(tmp_path: Path) -> None:
    section = Train(max_epochs=30, on="all", monitor="train/accuracy", learning_rate=1e-6, patience=2)
    stopping = EarlyStopping("train/accuracy", patience=2, mode="max", check_on_train_epoch_end=True, min_delta=0.5)
    module = make_module(section)
    figures = fit(tmp_path, module, BALANCED, stopping)
    assert set(figures) == {"train/loss", "train/accuracy", "train/learning_rate"}
    assert (stopping.stopped_epoch, float(stopping.best_score)) == (
        2,
        pytest.approx(figures["train/accuracy"], abs=0.5),
    )
    assert (tmp_path / "best.ckpt").is_file()


def test_figures_of_training_are_those_of_its_images(tmp_path: Path) -> None:
    module = make_module(Train(max_epochs=1, on="all", monitor="train/loss", learning_rate=1e-9, accumulate=6))
    torch.manual_seed(0)
    figures = fit(tmp_path, module, BALANCED)
    losses, right = [], []
    module.train()
    order = Order(48)
    order.set_epoch(0)
    for rows in order:
        batch = BALANCED[rows]
        with torch.no_grad():
            loss, units_nu = module.compute_batch(batch, 0)
        losses.append(float(loss))
        right += (units_nu.argmax(dim=1) == batch.targets).tolist()
    assert figures["train/loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert figures["train/accuracy"] == pytest.approx(np.mean(right))


def test_several_labels_are_learned_and_judged_per_class(tmp_path: Path) -> None:
    targets = np.random.default_rng(0).integers(0, 2, (96, 4)).astype(np.uint8)
    section = Train(max_epochs=8, learning_rate=0.01, monitor="val/map", mixup=0.1)
    figures = fit(tmp_path, make_module(section, task="multilabel"), Stripes(targets))
    assert figures["val/map"] > 0.9
    assert figures["val/f1"] > 0.8
    assert 0.5 < figures["val/accuracy"] <= figures["val/f1"], "all four right is no commoner than one"


def test_plateau_lowers_the_rate_of_the_epochs_after_one_that_is_no_better(tmp_path: Path) -> None:
    section = Train(max_epochs=8, schedule="plateau", learning_rate=0.1, patience=2, monitor="val/accuracy")
    seen: list[tuple[float, float]] = []

    def keep(module: ClassifierModule) -> None:
        figures = module.trainer.callback_metrics
        seen.append((float(figures["train/learning_rate"]), float(figures["val/accuracy"])))

    fit(tmp_path, make_module(section), BALANCED, Each(epoch=keep))
    rate, best = 0.1, -1.0
    for found, accuracy in seen:
        assert found == pytest.approx(rate)
        rate, best = (rate if accuracy > best else rate * 0.3), max(best, accuracy)
    assert seen[-1][0] < 0.1 * 0.3 + 1e-9, "it was lowered at least once"


def test_a_stopped_stage_with_everything_on_ends_in_the_same_weights(tmp_path: Path) -> None:
    backbone, _ = make_backbone("small_cnn", (32, 32))
    torch.save(backbone.state_dict(), tmp_path / "w.pth")
    place = make_place(
        tmp_path / "ws",
        counts={"disc": (20, 6, 2), "ring": (6, 6, 2)},
        **{**FINETUNE, "weights": str(tmp_path / "w.pth"), "frozen_epochs": 1, "dropout": 0.2, "label_smoothing": 0.1},
        **{"ema": 0.9, "mixup": 0.2, "cutmix": 1.0, "imbalance": "sampler", "schedule": "plateau", "patience": 3},
        **{"accumulate": 2, "batch_size": 4, "clip_norm": 1.0, "augment": "light"},
    )
    whole = place.learn(Ear(), work=tmp_path / "whole")
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            place.learn(Ear(stop_at=stop), work=tmp_path / "parts")
    parts = place.learn(Ear(), work=tmp_path / "parts")
    assert same_weights(parts, whole)
    assert parts.metrics == whole.metrics


def test_what_is_done_about_imbalance_is_told_and_logged(tmp_path: Path) -> None:
    place = make_place(tmp_path / "ws", counts={"disc": (40, 4, 1), "ring": (2, 4, 1)}, max_epochs=1)
    ear = Ear()
    place.learn(ear)
    assert ear.said(
        "imbalance: auto chose sampler, images of rare classes are drawn more often (42 images: disc 40, ring 2"
    )
    tags = place.tracking.only["tags"]
    assert (tags["imbalance.chosen"], tags["imbalance.ratio"]) == ("sampler", "20")
    assert tags["imbalance.counts"] == '{"disc": 40, "ring": 2}'


def test_a_last_model_learns_from_both_sides_and_stops_on_the_training_figure(tmp_path: Path) -> None:
    place = make_place(
        tmp_path / "ws", on="all", monitor="train/accuracy", patience=2, max_epochs=9, learning_rate=1e-7
    )
    assert len(place.make_job().train_rows) == 64
    outcome = place.learn(Ear())
    assert outcome.num_epochs < 9
    assert set(outcome.metrics) >= {"train/loss", "train/accuracy", "train/learning_rate"}
    assert not any(name.startswith("val/") for name in outcome.metrics)
