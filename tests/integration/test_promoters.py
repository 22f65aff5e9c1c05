"""Promoters in processes of their own, at the same moment, some of them killed: one wins, the ledger stays a line."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from memory_tracking import MemoryTracking
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.errors import PromotionError
from visionloop.params import make_params
from visionloop.promotion.ledger import read_champion, read_ledger, store_decision
from visionloop.promotion.promote import compare_alias, mirror_alias, promote
from visionloop.records import Decision
from visionloop.settings import Settings
from visionloop.store import LocalStore
from visionloop.workspace import Workspace, connect
from worlds import World, make_world, write_bundle

NOW = "2026-02-03T04:05:06Z"
CANDIDATES = 9
WON, MOVED = 0, 3
KILL_WITHIN_S = 0.4


class FileTracking(MemoryTracking):
    """An MLflow that several processes share: its versions and its alias are files of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.as_uri())
        self.folder = folder

    def find_version(self, bundle_digest: str) -> str | None:
        versions: Mapping[str, str] = json.loads((self.folder / "versions.json").read_text())
        return versions.get(bundle_digest)

    def set_champion(self, version: str) -> None:
        staged = self.folder / f"alias-{os.getpid()}"
        staged.write_text(version)
        staged.replace(self.folder / "alias")

    def get_champion(self) -> str | None:
        alias = self.folder / "alias"
        return alias.read_text() if alias.is_file() else None


def open_desk(home: Path, shared: Path) -> Workspace:
    """One promoter's own workspace, with its own candidate; store and MLflow are shared."""
    settings = Settings(home, (shared / "store").as_uri(), "memory://", "")
    return connect(settings, make_params({"name": "fake"}), tracking=FileTracking(shared))


def promote_when_told(home: Path, shared: Path, go: Path) -> None:
    desk = open_desk(home, shared)
    while not go.is_file():
        time.sleep(0.001)
    try:
        promote(desk, by=home.name, why="race", now=NOW)
    except PromotionError as exc:
        assert "champion moved" in str(exc), exc
        os._exit(MOVED)
    os._exit(WON)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A dataset, and candidates that are registered; each has a workspace of its own."""
    world = make_world(tmp_path / "shared")
    versions = {}
    for number in range(CANDIDATES):
        folder = tmp_path / f"home-{number}" / "models" / "candidate"
        folder.parent.mkdir(parents=True)
        versions[write_bundle(folder, world.pin, number)] = str(number + 1)
        upload_bundle(world.store, load_bundle(folder))
    (tmp_path / "shared" / "versions.json").write_text(json.dumps(versions))
    return world


def pass_gate(world: World, candidate: str) -> None:
    """Store what the gate says of a candidate that is good enough for the champion of now."""
    champion = read_champion(world.store, "fake")
    bundle, entry = (champion.bundle, champion.number) if champion else (None, 0)
    dataset = {"name": "fake", "version": 1, "digest": world.pin.digest}
    facts = {"test_digest": "t", "num_test": 1, "rules": (), "metrics": {}, "champion_metrics": {}, "run_id": None}
    about = {"candidate": candidate, "champion": bundle, "entry": entry, "state": {}, "dataset": dataset}
    store_decision(world.store, Decision(name="fake", number=0, verdict="passed", decided_at=NOW, **facts, **about))


def race(world: World, homes: list[Path], rng: random.Random) -> dict[str, int]:
    """Let promoters loose at one moment and kill one in five; return the exit codes of those that lived, by home."""
    shared, go = world.settings.home, world.settings.home / "go"
    go.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    racers = {home.name: context.Process(target=promote_when_told, args=(home, shared, go)) for home in homes}
    for racer in racers.values():
        racer.start()
    doomed = [name for name in list(racers)[1:] if rng.random() < 0.2 * len(racers) / (len(racers) - 1)]
    deaths = sorted((rng.uniform(0, KILL_WITHIN_S), name) for name in doomed)
    go.touch()
    started = time.monotonic()
    for at_s, name in deaths:
        time.sleep(max(0.0, started + at_s - time.monotonic()))
        racers[name].kill()
    for racer in racers.values():
        racer.join(60)
    return {name: racer.exitcode for name, racer in racers.items() if racer.exitcode != -9}  # type: ignore[misc]


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.long)])
def test_of_racing_promoters_one_wins_each_round(world: World, tmp_path: Path, rounds: int) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["visionloop.promotion.promote", "worlds"])
    rng = random.Random(7)
    digests = {home.name: load_bundle(home / "models" / "candidate").digest for home in tmp_path.glob("home-*")}
    killed = 0
    for number in range(1, rounds + 1):
        champion = read_champion(world.store, "fake")
        free = sorted(name for name, digest in digests.items() if champion is None or digest != champion.bundle)
        chosen = rng.sample(free, rng.randint(2, 8))
        for name in chosen:
            pass_gate(world, digests[name])
        ended = race(world, [tmp_path / name for name in chosen], rng)
        killed += len(chosen) - len(ended)
        ledger = read_ledger(LocalStore(tmp_path / "shared" / "store"), "fake")
        assert (len(ledger.entries), ledger.problems) == (number, ()), "one winner, and a line"
        assert ledger.champion is not None
        winner = ledger.champion.by
        assert ledger.champion.bundle == digests[winner]
        assert ledger.champion.previous == (champion.bundle if champion else None)
        assert winner in chosen
        assert ended == {name: WON if name == winner else MOVED for name in ended}
        desk = open_desk(tmp_path / winner, tmp_path / "shared")
        version = mirror_alias(desk)
        assert compare_alias(desk) == (version, version) == (ledger.champion.model_version, version)
    assert [entry.number for entry in ledger.entries] == list(range(1, rounds + 1))
    assert killed >= rounds // 3
