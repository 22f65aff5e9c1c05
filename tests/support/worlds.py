"""Whole small workspaces for tests of judging and promoting: images in a store, a pin, prepared data, candidates.

Labels follow the answers of the fake bundle with seed 0, some of them turned: that model is good, others guess.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fakes import make_bundle, make_image
from visionloop.bundle import load_bundle, seal_bundle
from visionloop.data.manifest import load_pin
from visionloop.params import Params, make_params
from visionloop.predictor import Predictor
from visionloop.records import ImageRecord, Pin, RunNote, canonical_json
from visionloop.store import LocalStore, ObjectStore
from visionloop.workspace import Workspace
from workspaces import build, make_settings, store_image

CLASSES = ("a", "b", "c")
NUM_IMAGES = 160
GOOD, POOR = 0, 5
# 80 test images are enough here, and a poor model may be the first one.
SMALL = {"min_images": {"all": 50, "per_class": 5}, "baseline": {"mode": "off"}}


@dataclass(frozen=True)
class World(Workspace):
    """One workspace with a pinned dataset, in a store of its own. Its MLflow cannot be reached."""

    pin: Pin
    records: tuple[ImageRecord, ...]

    def with_gate(self, **section: Any) -> Params:
        """Return the params with another gate section, for as few images as here."""
        rest = self.params.model_dump(mode="json", exclude={"gate", "ingest"})
        return make_params({**rest, "gate": {**SMALL, **section}})

    def write_candidate(self, seed: int = GOOD, *, note: str | None = None, **card: Any) -> str:
        """Put a bundle into models/candidate, of the world's task, with other facts on its card; return its digest."""
        if self.params.task == "multilabel":
            card = {**make_label_facts(card.get("model_classes", self.pin.classes)), **card}
        return write_bundle(self.settings.candidate_dir, self.pin, seed, self.settings.runs_dir, note, **card)


def make_label_facts(classes: tuple[str, ...]) -> dict[str, Any]:
    """What is on the card of a multilabel model."""
    return {"task": "multilabel", "threshold": None, "thresholds": dict.fromkeys(classes, 0.5)}


def make_world(
    home: Path,
    *,
    prepared: bool = False,
    test_sides: int = 2,
    turned: int = 8,
    classes: tuple[str, ...] = CLASSES,
    task: str = "auto",
) -> World:
    """Build a workspace: every second image is a test image (`test_sides=0`: none), one label of `turned` is wrong.

    With the task multilabel an image has any number of labels, and those without one are negatives.
    """
    settings, store = make_settings(home), LocalStore(home / "store")
    section = {"image_size": 32, "unlabelled": "negative" if task == "multilabel" else "exclude"}
    values = {"name": "fake", "task": task, "prepare": section, "evaluate": {"resamples": 400}, "gate": SMALL}
    params = make_params(values)
    oracle_task = task if task == "multilabel" else None
    make_bundle(home / "oracle", classes=classes, seed=GOOD, task=oracle_task)
    records = _make_records(store, Predictor(load_bundle(home / "oracle"), threads=1), test_sides, turned)
    place = build(settings, params, store, records, prepared=prepared)
    return World(**vars(place), pin=load_pin(settings.pin_path), records=tuple(records))


def write_bundle(
    folder: Path, pin: Pin, seed: int, runs_dir: Path | None = None, note: str | None = None, **card: Any
) -> str:
    """Write a fake bundle trained on the pin; with `note`, also the note that names its run."""
    if folder.exists():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    classes = card.pop("model_classes", pin.classes)
    make_bundle(folder, classes=classes, seed=seed)
    dataset = {"name": pin.name, "version": pin.version, "digest": pin.digest}
    facts = replace(load_bundle(folder).card, **{"dataset": dataset, **card})
    (folder / "card.json").write_bytes(canonical_json(facts.to_json()))
    digest = seal_bundle(folder)
    if note and runs_dir:
        write_note(runs_dir, digest, note)
    return digest


def write_note(runs_dir: Path, digest: str, run_id: str) -> None:
    """Write the note that names the run of a bundle."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    run = RunNote(bundle=digest, run_id=run_id, git_commit=None, finished_at="2026-01-01T00:00:00Z")
    (runs_dir / f"{digest}.json").write_text(json.dumps(run.to_json()))


def _make_records(store: LocalStore, oracle: Predictor, test_sides: int, turned: int) -> list[ImageRecord]:
    classes = oracle.card.classes
    images = [make_image(1000 + number) for number in range(NUM_IMAGES)]
    records = []
    for number, (data, answer) in enumerate(zip(images, oracle.predict(images), strict=True)):
        labels = set(answer.labels if answer.labels is not None else [answer.prediction])
        if turned and number % turned < 2 and number // 2 % 2 == 0:
            if answer.labels is None:
                labels = {classes[(classes.index(answer.prediction) + 1) % len(classes)]}
            else:
                labels ^= {classes[number % len(classes)]}
        side = "test" if test_sides and number % test_sides else "train"
        facts = {"labels": tuple(sorted(labels)), "sources": ("fake",), "origins": (f"{number}.png",), "side": side}
        records.append(store_image(store, 0, data=data, **facts))
    return records


def list_encoders(store: ObjectStore) -> list[str]:
    """The digests of all encoders that have a table in the store."""
    return sorted({key.split("/")[1] for key in store.list("embeddings/")})
