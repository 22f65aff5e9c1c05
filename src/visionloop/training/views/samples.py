"""Pictures of what the network sees, once a run: its first training batch, and some images under each augmentation.

WORK/figures/{batch,augment}.png, and `figures/` of the MLflow run.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from torch import Tensor

from visionloop.data.contact_sheet import Cell, draw_contact_sheet
from visionloop.data.images import UInt8Array
from visionloop.tracking import CALL_ERRORS
from visionloop.training.augment import (
    AUGMENT,
    NUM_UNIFORM,
    PRESETS,
    augment_images,
    draw_bits,
    draw_preset,
    draw_uniform,
    make_image_keys,
)
from visionloop.training.batches import Batch, frame_images, read_whole
from visionloop.training.job import Job

MAX_IMAGES = 24
NUM_AUGMENTED = 3
NUM_DRAWS = 2  # of each preset
FRAME_RGB = (0, 114, 178)
FRAME_SHARE = 0.03


class SampleView(pl.Callback):
    """Draws both pictures with the first batch of a run; a run that goes on has them already."""

    def __init__(self, job: Job, run_id: str, work: Path) -> None:
        """Take where to draw to; nothing is drawn before the first batch."""
        self.job, self.run_id, self.folder = job, run_id, work / "figures"
        self._seen: Tensor | None = None
        self._hook: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Take the batch where the network gets it: after mixup and cutmix."""
        if batch_idx == 0 and not (self.folder / "batch.png").is_file():
            self._seen = batch.inputs
            self._hook = pl_module.classifier.register_forward_pre_hook(self._keep)  # type: ignore[union-attr]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Draw, once the batch has passed."""
        if self._hook is None:
            return
        self._hook.remove()
        images, self._hook, self._seen = self._seen, None, None
        if images is None or images.ndim != 4:
            return
        pixels = images[:MAX_IMAGES].float().round().clamp(0, 255).byte().cpu().numpy()
        self._show("augment.png", draw_presets(self.job))
        self._show("batch.png", draw_batch(self.job, pixels, batch.rows_n[:MAX_IMAGES].cpu().numpy()))

    def _keep(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0].detach()

    def _show(self, name: str, png: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(png)
        try:
            self.job.tracking.log_artifact(self.run_id, self.folder / name, "figures")
        except CALL_ERRORS as exc:  # a training does not end for a picture
            self.job.watcher.tell(f"figures/{name} is not in MLflow: {exc}")


def make_sample_view(job: Job, run_id: str, work: Path) -> SampleView:
    """Return the callback that draws what the network sees."""
    return SampleView(job, run_id, work)


def draw_batch(job: Job, images_nhwc: UInt8Array, rows_n: NDArray[np.int64]) -> bytes:
    """Draw images as the network sees them, with their labels, as a PNG."""
    section = job.params.train
    mixed = [f"{name} {value:g}" for name, value in (("mixup", section.mixup), ("cutmix", section.cutmix)) if value]
    title = ", ".join(["The first batch as the network sees it", f"augment: {section.augment}", *mixed])
    cells = [
        Cell(image, ", ".join(job.prepared.labels(int(row))) or "no label")
        for image, row in zip(images_nhwc, rows_n, strict=True)
    ]
    return draw_contact_sheet(cells, title, columns=6, cell_px=144)


def draw_presets(job: Job) -> bytes:
    """Draw a few training images as they are and under each preset; the chosen one is framed."""
    prepared, section = job.prepared, job.params.train
    rows_n = _choose_rows(job)
    key_n = make_image_keys([prepared.sha256_n[row] for row in rows_n])
    whole, frame_n4 = read_whole(prepared, rows_n), frame_images(prepared, rows_n)
    columns = [("none", prepared.read_crops(rows_n, seed=section.seed, epoch=0))]
    for name in PRESETS:
        for epoch in range(NUM_DRAWS):
            bits_n = draw_bits(key_n, seed=section.seed, epoch=epoch, purpose=AUGMENT)
            draws_nd = draw_preset(name, draw_uniform(bits_n, NUM_UNIFORM), frame_n4, prepared.size_hw)
            columns.append((name, augment_images(whole, draws_nd, prepared.size_hw)))
    cells = []
    for number in range(len(rows_n)):
        for name, images_nhwc in columns:
            chosen = name == section.augment
            image = _frame(images_nhwc[number]) if chosen else images_nhwc[number]
            cells.append(Cell(image, f"{name} (chosen)" if chosen else name))
    return draw_contact_sheet(cells, "Augmentation presets, two draws of each", columns=len(columns), cell_px=128)


def _choose_rows(job: Job) -> NDArray[np.int64]:
    """Return a training image of each of the first classes that have one; of fewer classes, more of each."""
    rows_n = job.train_rows
    label_n = job.prepared.label_n[rows_n]
    turn_n = np.zeros(len(rows_n), np.int64)
    for label in np.unique(label_n):
        turn_n[label_n == label] = np.arange((label_n == label).sum())
    return rows_n[np.lexsort((label_n, turn_n))][:NUM_AUGMENTED]


def _frame(image_hwc: UInt8Array) -> UInt8Array:
    width = max(1, round(FRAME_SHARE * max(image_hwc.shape[:2])))
    framed = np.empty_like(image_hwc)
    framed[:] = FRAME_RGB
    framed[width:-width, width:-width] = image_hwc[width:-width, width:-width]
    return framed
