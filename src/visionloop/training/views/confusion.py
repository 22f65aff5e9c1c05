"""Which classes are taken for which, of the validation side, every so many epochs: figures/confusion/epoch-007.png.

With several labels an image there is no such matrix: what was found, missed and wrongly said of a class is drawn.

Dimensions: n images, u units (1 for binary, else k classes), k classes.
"""

from pathlib import Path

import pytorch_lightning as pl
from torch import Tensor

from visionloop.evaluation.label_metrics import compute_outcomes
from visionloop.evaluation.metrics import IntArray, compute_confusion
from visionloop.evaluation.plots import draw_confusion, draw_outcomes
from visionloop.training.job import Job
from visionloop.training.module import ClassifierModule
from visionloop.training.views.view import View


class ConfusionView(View):
    """Draws the confusion matrix of an epoch's validation for MLflow, every `train.confusion_every` epochs."""

    def __init__(self, job: Job, run_id: str, work: Path) -> None:
        self.job, self.run_id, self.work = job, run_id, work

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.job.params.train.confusion_every and epoch != trainer.max_epochs:
            return
        classes = self.job.prepared.classes
        assert isinstance(pl_module, ClassifierModule)
        units_nu, targets = pl_module.val_units_nu, pl_module.val_targets
        folder = self.work / "figures" / "confusion"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"epoch-{epoch:03d}.png"
        of_images = f"of {len(targets):,} validation images, epoch {epoch}"
        if targets.ndim == 2:
            outcomes = compute_outcomes(targets.cpu().numpy() > 0.5, units_nu.cpu().numpy() > 0, classes)
            path.write_bytes(draw_outcomes(outcomes, title=f"Answers {of_images}"))
        else:
            confusion_kk = count_confusion(units_nu, targets, len(classes))
            path.write_bytes(draw_confusion(confusion_kk, classes, title=f"Confusion {of_images}"))
        self.job.tracking.log_artifact(self.run_id, path, "figures/confusion")


def count_confusion(units_nu: Tensor, labels_n: Tensor, num_classes: int) -> IntArray:
    """Return how many images of each class (rows) were taken for which (columns)."""
    chosen_n = (units_nu.squeeze(1) > 0).long() if units_nu.shape[1] == 1 else units_nu.argmax(dim=1)
    return compute_confusion(labels_n.long().cpu().numpy(), chosen_n.cpu().numpy(), num_classes)
