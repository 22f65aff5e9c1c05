"""A workspace of shapes that is trained in this process, and one that has a champion."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory_tracking import MemoryTracking
from shapes import write_shapes
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.data.prepare import prepare
from visionloop.errors import VisionLoopError
from visionloop.features.embed import embed
from visionloop.ingest.pull import check_sources, pull
from visionloop.params import Params, make_params
from visionloop.promotion.ledger import append_entry, read_champion
from visionloop.settings import Settings, load_settings
from visionloop.store import ObjectStore, open_store
from visionloop.tracking import MlflowTracking
from visionloop.training.checks import check_training
from visionloop.training.fit import make_job, train
from visionloop.training.job import Call, Job
from visionloop.training.watch import EpochReport, Watcher

NOW = "2026-01-01T00:00:00+00:00"
CLASSES = ("bar", "disc", "ring")
QUIET_RUN = f"{1:032x}"
EPOCHS = 10  # of the champion


class Notes(Watcher):
    """Keeps what a training tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.epochs: list[EpochReport] = []

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def on_epoch(self, report: EpochReport) -> None:
        self.epochs.append(report)


class Home:
    """A workspace, used in this process."""

    def __init__(self, folder: Path, **section: Any) -> None:
        self.folder, self.notes = folder, Notes()
        fixed = {"backbone": "small_cnn", "batch_size": 16, "learning_rate": 3e-3, "precision": "fp32"}
        self.section: dict[str, Any] = {**fixed, **section}
        self.runtime = "onnxruntime"

    @property
    def params(self) -> Params:
        source = {"kind": "folder", "path": str(self.folder / "photos"), "name": "photos"}
        value = {"name": "shapes", "ingest": {"sources": [source]}, "prepare": {"image_size": 32}}
        return make_params({**value, "embed": {"runtime": self.runtime}, "train": self.section})

    @property
    def settings(self) -> Settings:
        (self.folder / "params.yaml").touch()
        return load_settings({}, self.folder)

    name = "shapes"

    @property
    def store(self) -> ObjectStore:
        return open_store(self.settings.store_url)

    @property
    def tracking(self) -> MlflowTracking:
        return MlflowTracking(self.settings.tracking_uri, self.settings.artifact_root, "shapes")

    def ingest(self) -> None:
        pull(self, sources=check_sources(self.params), now=NOW)
        prepare(self)

    def embed(self) -> None:
        embed(self)

    def make_job(self) -> Job:
        return make_job(self, check_training(self), Call(watcher=self.notes))

    def make_quiet_job(self) -> Job:
        """A job without an MLflow."""
        tracking = MemoryTracking()
        assert tracking.open_run("quiet", run_id=None, tags={}, params={}) == QUIET_RUN
        return replace(self.make_job(), tracking=tracking)

    def train(self) -> str:
        self.notes = Notes()
        note = train(self, check_training(self), Call(NOW, watcher=self.notes))
        assert note is not None
        self.run = self.tracking._connect()[0].get_run(note.run_id)
        return note.bundle

    def refuse(self, kind: type[VisionLoopError]) -> str:
        with pytest.raises(kind) as caught:
            self.train()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def promote(self) -> str:
        bundle = load_bundle(self.settings.candidate_dir)
        upload_bundle(self.store, bundle)
        facts = dict.fromkeys(("model_version", "by", "why", "at"), "x") | {"dataset": {}, "run_id": None}
        champion = read_champion(self.store, "shapes")
        append_entry(self.store, "shapes", champion, action="promote", bundle=bundle.digest, decision=None, **facts)
        return bundle.digest


def fork(home: Home, folder: Path, **section: Any) -> Home:
    shutil.copytree(home.folder, folder)
    return Home(folder, **{**home.section, **section})


def make_champion(folder: Path) -> Home:
    """A workspace whose champion tells bars, discs and rings apart; its weights lie in weights.safetensors."""
    home = Home(folder, max_epochs=EPOCHS)
    write_shapes(home.folder / "photos", 60, classes=CLASSES)
    home.ingest()
    home.train()
    home.promote()
    shutil.copy(home.settings.candidate_dir / "weights.safetensors", home.folder)
    return home
