"""The stage `train`: prepared arrays to models/candidate. Resumable by epoch, in the same MLflow run.

.visionloop/work/train/<input key>/   run.json  checkpoints/{last,best}.ckpt  bundle/
"""

import json
import logging
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from visionloop.data.manifest import is_experiment, load_version
from visionloop.data.shards import Prepared, load_prepared
from visionloop.errors import DatasetError, TrainingError, VisionLoopError, shorten
from visionloop.networks.classifier import Classifier, make_classifier
from visionloop.networks.weights import load_weights
from visionloop.params import Params
from visionloop.records import RunNote, canonical_json, compute_digest
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.tracking import Tracking
from visionloop.training.callbacks import EpochReport, EpochReporter, find_checkpoint, has_stopped_early
from visionloop.training.datamodule import PreparedData
from visionloop.training.hardware import Hardware, read_hardware
from visionloop.training.module import ClassifierModule
from visionloop.training.package import hash_weights_file, write_bundle
from visionloop.training.plots import write_curve
from visionloop.workfolder import lock_work, replace_folder


@dataclass(frozen=True)
class Job:
    """One training: its inputs, and where it works and reports."""

    settings: Settings
    params: Params
    store: ObjectStore
    tracking: Tracking
    prepared: Prepared
    hardware: Hardware
    code_digest: str
    on_epoch: Callable[[EpochReport], None]

    def make_key(self) -> str:
        """Return the input key: equal keys mean equal bits, so work under it may be gone on with."""
        report = json.loads((self.prepared.folder / "report.json").read_text())
        section = self.params.train
        weights = hash_weights_file(self.settings.home, section.weights)
        parts = [report, self.params.name, section.model_dump(mode="json"), asdict(self.hardware)]
        return compute_digest([*parts, self.code_digest, weights])


def train(
    settings: Settings,
    params: Params,
    store: ObjectStore,
    tracking: Tracking,
    *,
    now: str,
    code_digest: str = "",
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> RunNote:
    """Train, export and put the bundle at models/candidate; return the note of the run.

    The same inputs go on from the last finished epoch. A random split has no validation side: such an experiment is
    validated on the test side, and its note says so.

    Raises:
        DatasetError: a class has no training image, or a side is empty.
        TrainingError: the network, its weights or its loss are unusable.
        TrackingError: MLflow cannot be reached.
    """
    started = time.perf_counter()
    prepared = load_prepared(settings.prepared_dir)
    validated_on = choose_validation(prepared, store)
    if validated_on != "val":
        prepared = replace(prepared, side_n=np.where(prepared.side_n == validated_on, "val", prepared.side_n))
    check_sides(prepared)
    job = Job(settings, params, store, tracking, prepared, read_hardware(), code_digest, on_epoch)
    with lock_work(settings.work_dir("train"), job.make_key()) as work:
        run_id = _open_run(work, job)
        try:
            classifier = _fit(work, job, run_id)
            digest = _package(work, job, classifier, run_id)
        except KeyboardInterrupt:
            tracking.close_run(run_id, "KILLED")
            raise
        except (VisionLoopError, RuntimeError) as exc:
            tracking.close_run(run_id, "FAILED")
            if isinstance(exc, VisionLoopError):
                raise
            raise TrainingError("train", f"torch failed ({str(exc).splitlines()[0][:200]})") from exc
        seconds = round(time.perf_counter() - started, 1)
        note = RunNote(digest, run_id, read_git_commit(settings.home), now, seconds, {"validated_on": validated_on})
        _write_note(settings, note)
        replace_folder(work / "bundle", settings.candidate_dir)
        tracking.close_run(run_id)
        shutil.rmtree(work)
    return note


def choose_validation(prepared: Prepared, store: ObjectStore) -> str:
    """Return the side that epochs are judged on: val, or test in an experiment that has no val. Raises DatasetError."""
    if len(prepared.rows("val")):
        return "val"
    return "test" if is_experiment(load_version(store, prepared.pin.name, prepared.pin.version)) else "val"


def check_sides(prepared: Prepared) -> None:
    """Raise DatasetError unless train has every class and validation has an image."""
    counts = np.bincount(prepared.label_n[prepared.rows("train")], minlength=len(prepared.classes))
    where = f"dataset {prepared.pin.name} version {prepared.pin.version}"
    if empty := [name for name, count in zip(prepared.classes, counts, strict=True) if not count]:
        raise DatasetError(where, f"no training image of {shorten(empty)}", "one or more", "Add images of it.")
    if len(prepared.rows("train")) < 2 or not len(prepared.rows("val")):
        raise DatasetError(
            where,
            f"{len(prepared.rows('train'))} training and {len(prepared.rows('val'))} validation images",
            "two or more for training and one or more for validation",
            "Add images, or change ingest.split.fractions under a new `name`.",
        )


def read_git_commit(home: Path) -> str | None:
    """Return the commit of the workspace, with `-dirty` when files differ; None outside of git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=home, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


def _open_run(work: Path, job: Job) -> str:
    """Open the MLflow run of this input key: the one that a killed process had opened, or a new one."""
    path = work / "run.json"
    known = json.loads(path.read_text())["run_id"] if path.is_file() else None
    sections = {"train": job.params.train, "prepare": job.params.prepare}
    flat = {f"{s}.{k}": v for s, m in sections.items() for k, v in m.model_dump(mode="json").items()}
    pin = job.prepared.pin
    tags = {
        "visionloop.dataset_version": str(pin.version),
        "visionloop.dataset_digest": pin.digest,
        "visionloop.git_commit": read_git_commit(job.settings.home) or "none",
        **{f"visionloop.{k}": str(v) for k, v in asdict(job.hardware).items()},
    }
    run_name = f"{job.params.train.backbone}-dataset{pin.version}"
    run_id = job.tracking.open_run(run_name, run_id=known, tags=tags, params=flat)
    staged = path.with_suffix(".new")
    staged.write_bytes(canonical_json({"run_id": run_id}))
    staged.replace(path)
    return run_id


def _fit(work: Path, job: Job, run_id: str) -> Classifier:
    """Train until the patience or the epochs are used up, from the last checkpoint if there is one."""
    section, prepared = job.params.train, job.prepared
    checkpoint_path, checkpoint = find_checkpoint(work / "checkpoints")
    pl.seed_everything(section.seed, workers=True, verbose=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    classifier = make_classifier(section.backbone, len(prepared.classes), prepared.size_hw, dropout=section.dropout)
    if not checkpoint_path:
        load_weights(classifier.backbone, section.backbone, section.weights, job.settings.home)
    module = ClassifierModule(classifier, section)
    if not has_stopped_early(checkpoint, section.patience):
        _run_epochs(work, job, run_id, module, checkpoint_path)
    best = torch.load(work / "checkpoints" / "best.ckpt", "cpu", weights_only=True)
    module.load_state_dict(best["state_dict"])
    return classifier


def _run_epochs(work: Path, job: Job, run_id: str, module: ClassifierModule, checkpoint_path: Path | None) -> None:
    section, reports = job.params.train, list[EpochReport]()

    def report(epoch: EpochReport) -> None:
        reports.append(epoch)
        job.on_epoch(epoch)

    num_train = len(job.prepared.rows("train"))
    trainer = make_trainer(
        work, job.params, job.hardware, lambda s: EpochReporter(job.tracking, run_id, num_train, s, report)
    )
    data = PreparedData(job.prepared, batch_size=section.batch_size, seed=section.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint_path) if checkpoint_path else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if reports:
        write_curve(reports, work / "curve.png")
        job.tracking.log_artifact(run_id, work / "curve.png", "figures")


def _package(work: Path, job: Job, classifier: Classifier, run_id: str) -> str:
    """Write the bundle into the work folder, show it in MLflow, and return its digest."""
    folder = work / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    way = {"precision": job.hardware.precision, "threads": str(job.hardware.threads)}
    digest = write_bundle(folder, classifier, job.params, job.prepared, job.store, way=way)
    job.tracking.set_tags(run_id, {"visionloop.bundle": digest})
    job.tracking.log_artifact(run_id, folder / "card.json", "bundle")
    job.tracking.log_artifact(run_id, folder / "golden", "bundle/golden")
    return digest


def make_trainer(
    work: Path, params: Params, hardware: Hardware, make_reporter: Callable[[EarlyStopping], pl.Callback]
) -> pl.Trainer:
    """Wire Lightning: early stopping, best and last checkpoint in the work folder, nothing printed."""
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    section = params.train
    mode = "min" if section.monitor == "val/loss" else "max"
    stopping = EarlyStopping(section.monitor, patience=section.patience, mode=mode)
    keeper = ModelCheckpoint(
        dirpath=work / "checkpoints",
        filename="best",
        monitor=section.monitor,
        mode=mode,
        save_last=True,
        enable_version_counter=False,
    )
    precision: Any = hardware.lightning_precision
    return pl.Trainer(
        max_epochs=section.max_epochs,
        accelerator=hardware.accelerator,
        devices=1,
        precision=precision,
        callbacks=[stopping, keeper, make_reporter(stopping)],
        default_root_dir=work,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        deterministic="warn",
    )


def _write_note(settings: Settings, note: RunNote) -> None:
    settings.runs_dir.mkdir(parents=True, exist_ok=True)
    (settings.runs_dir / f"{note.bundle}.json").write_bytes(canonical_json(note.to_json()))
