"""A world with an MLflow in memory, and the steps of judging and promoting as a person takes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from memory_tracking import MemoryTracking
from visionloop.promotion.decide import gate
from visionloop.promotion.promote import promote, register, rollback
from visionloop.records import LedgerEntry
from visionloop.workspace import connect
from worlds import make_world, write_note

NOW = "2026-02-03T04:05:06Z"


class Desk:
    """A world with an MLflow in memory, and the steps as a person takes them."""

    def __init__(self, home: Path) -> None:
        self.world = make_world(home)
        self.store, self.tracking = self.world.store, MemoryTracking()
        self.place = replace(self.world, tracking=self.tracking)

    def judge(self, seed: int, *, floors: dict[str, float] | None = None, note: str | None = None, **card: Any) -> str:
        digest = self.world.write_candidate(seed, **card)
        params = self.world.with_gate(rule="no_worse", margin=0.99, floors=floors or {}, class_drop={"mode": "off"})
        gate(connect(self.world.settings, params, store=self.store), state={}, now=NOW)
        if note:  # after the gate: it would tag a run of a real MLflow
            write_note(self.world.settings.runs_dir, digest, note)
        return digest

    def promote(self, by: str = "ann", **options: Any) -> LedgerEntry:
        return promote(self.place, by=by, why="because", now=NOW, **options)

    def rollback(self, to: int | None = None) -> LedgerEntry:
        return rollback(self.place, to=to, by="bob", why="it was wrong", now=NOW)

    def crown(self, seed: int, **card: Any) -> str:
        """Take a candidate all the way."""
        digest = self.judge(seed, **card)
        register(self.place)
        assert self.promote().bundle == digest
        return digest
