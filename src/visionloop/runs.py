"""What is said of each training, in `visionloop runs` and in the Python interface alike, and which are marked."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from visionloop.errors import VisionLoopError
from visionloop.tracking import DIGEST_TAG, Run
from visionloop.workspace import Workspace


@dataclass(frozen=True)
class Marks:
    """The bundles of the champion and of the candidate, by digest; None where there is none."""

    champion: str | None
    candidate: str | None

    def of(self, run: Run) -> str:
        """Return `champion`, `candidate`, both or nothing."""
        bundle = run.tags.get(DIGEST_TAG)
        marks = {"champion": self.champion, "candidate": self.candidate}
        return " ".join(name for name, digest in marks.items() if bundle and digest == bundle)


COLUMNS: dict[str, Callable[[Run], Any]] = {
    "started": lambda run: run.started_at,
    "run": lambda run: run.run_id,
    "way": lambda run: run.params.get("train.way"),
    "backbone": lambda run: run.params.get("train.backbone"),
    "data": lambda run: to_number(run.tags.get("visionloop.dataset_version")),
    "epochs": lambda run: run.metrics.get("epoch"),
    "val accuracy": lambda run: get_best(run, "val/accuracy"),
    "val loss": lambda run: get_best(run, "val/loss"),
    "test accuracy": lambda run: run.metrics.get("test/accuracy"),
    "time": lambda run: run.seconds,
    "status": lambda run: run.status,
}


def read_marks(workspace: Workspace) -> Marks:
    """Find out which bundles are champion (by the ledger) and candidate; an unreadable one is none."""
    from visionloop.bundle import load_bundle
    from visionloop.promotion.ledger import read_champion

    champion = candidate = None
    with contextlib.suppress(VisionLoopError):
        entry = read_champion(workspace.store, workspace.name)
        champion = entry.bundle if entry else None
    with contextlib.suppress(VisionLoopError):
        candidate = load_bundle(workspace.settings.candidate_dir).digest
    return Marks(champion, candidate)


def get_best(run: Run, name: str) -> float | None:
    """Return a figure of the run's best epoch; of its last one while it runs, or if it was killed."""
    return run.metrics.get(f"best/{name.replace('/', '_')}", run.metrics.get(name))


def to_number(text: str | None) -> int | None:
    """Return a tag as a number; None where it is none."""
    return int(text) if text and text.isdecimal() else None
