"""Figures to MLflow, epoch by epoch. One that cannot be reached for a while stops no training: they are sent later.

WORK/unsent.json   what it has not got yet, also for the next process
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from visionloop.errors import TrackingError
from visionloop.tracking import Tracking
from visionloop.training.checkpoints import write_file

FILE = "unsent.json"
TRY_EVERY_S = 30.0  # each try may wait for the server's time limit


class FigureLog:
    """The figures of a run's epochs on their way to MLflow, in order."""

    def __init__(self, work: Path, tracking: Tracking, run_id: str, tell: Callable[[str], object]) -> None:
        self.path, self.tracking, self.run_id, self.tell = work / FILE, tracking, run_id, tell
        self.unsent = _load(self.path)
        self._failed_at: float | None = None

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of an epoch, or keep them until MLflow can be reached."""
        self.unsent = [(at, kept) for at, kept in self.unsent if at != step] + [(step, dict(figures))]
        if self._failed_at is not None and time.monotonic() - self._failed_at < TRY_EVERY_S:
            self._keep()
            return
        try:
            self.send()
        except TrackingError as exc:
            if self._failed_at is None:
                self.tell(f"MLflow cannot be reached; training goes on, its figures are sent later ({exc.found})")
            self._failed_at = time.monotonic()
            self._keep()

    def send(self) -> None:
        """Send what is left. Raises TrackingError; nothing is lost then."""
        while self.unsent:
            step, figures = self.unsent[0]
            self.tracking.log_metrics(self.run_id, figures, step=step)
            self.unsent.pop(0)
        self.path.unlink(missing_ok=True)
        if self._failed_at is not None:
            self.tell("MLflow can be reached again: all figures are there")
            self._failed_at = None

    def _keep(self) -> None:
        write_file(self.path, json.dumps(self.unsent).encode())


def _load(path: Path) -> list[tuple[int, dict[str, float]]]:
    try:
        value: list[tuple[int, dict[str, float]]] = json.loads(path.read_text())
        return [(int(step), {str(name): float(v) for name, v in figures.items()}) for step, figures in value]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
