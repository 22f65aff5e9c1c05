import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import make_bundle, make_image
from visionloop.bundle import Bundle, load_bundle, seal_bundle, upload_bundle
from visionloop.engines import Open, Opened, open_plainly
from visionloop.errors import BundleError, ServingError, StoreError
from visionloop.predictor import FP32, INT8, Predictor
from visionloop.records import LedgerEntry
from visionloop.serving.swap import ChampionFollower, ModelSlot
from visionloop.store import LocalStore


def make_entry(number: int, digest: str) -> LedgerEntry:
    return LedgerEntry(
        name="fake",
        number=number,
        action="promote",
        bundle=digest,
        previous=None,
        model_version=str(number * 10),
        decision=None,
        dataset={},
        run_id=None,
        by="test",
        why="test",
        at="2026-01-01T00:00:00Z",
    )


class World:
    """A store with two bundles, a ledger that the test writes by assignment, and a follower of both."""

    def __init__(self, folder: Path, *, engines: Sequence[str] = (), open_model: Open = open_plainly) -> None:
        self.store = LocalStore(folder / "store")
        self.digests = [self._add(folder / f"bundle-{seed}", seed, engines) for seed in (1, 2)]
        self.entry: LedgerEntry | None = make_entry(1, self.digests[0])
        self.error: Exception | None = None
        self.slot = ModelSlot()
        self.follower = ChampionFollower(
            self.slot,
            name="fake",
            find_champion=self.find_champion,
            store=self.store,
            cache_dir=folder / "cache",
            poll_s=0.01,
            retry_s=60,
            open_model=open_model,
        )

    def find_champion(self) -> LedgerEntry | None:
        if self.error:
            raise self.error
        return self.entry

    def served(self) -> tuple[int | None, str | None, str]:
        assert self.slot.current
        return self.slot.current.entry, self.slot.current.version, self.slot.current.digest

    def _add(self, folder: Path, seed: int, engines: Sequence[str]) -> str:
        make_bundle(folder, seed=seed, engines=engines)
        (folder / "weights.safetensors").write_bytes(b"large")
        digest = seal_bundle(folder)
        upload_bundle(self.store, load_bundle(folder))
        return digest


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.follower.stop()


def spoil(world: World, digest: str) -> bytes:
    key = f"bundles/{digest}/model.onnx"
    data = world.store.get(key)
    world.store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    return data


def test_first_load_serves_the_champion_without_its_weights(world: World, tmp_path: Path) -> None:
    world.follower.load_first()
    assert world.served() == (1, "10", world.digests[0])
    assert not (tmp_path / "cache" / world.digests[0] / "weights.safetensors").exists()


def test_first_load_says_what_to_do_when_the_ledger_is_empty(world: World) -> None:
    world.entry = None
    with pytest.raises(ServingError, match=r"no champion.*visionloop start.*--bundle"):
        world.follower.load_first()


def test_first_load_fails_on_a_spoilt_bundle(world: World) -> None:
    spoil(world, world.digests[0])
    with pytest.raises(BundleError, match=r"model\.onnx differs from its digest"):
        world.follower.load_first()


def test_a_new_entry_swaps_the_model(world: World) -> None:
    world.follower.load_first()
    before = world.slot.current
    world.follower.poll_once(0)
    assert world.slot.current is before
    world.entry = make_entry(2, world.digests[1])
    world.follower.poll_once(5)
    assert world.served() == (2, "20", world.digests[1])
    assert (world.slot.num_swaps, world.slot.num_failures, world.slot.problem) == (1, 0, None)
    assert before
    assert len(before.predictor.predict([make_image(0)])) == 1


def test_an_entry_for_the_same_bundle_keeps_the_loaded_model(world: World) -> None:
    world.follower.load_first()
    assert world.slot.current
    predictor = world.slot.current.predictor
    world.entry = make_entry(3, world.digests[0])
    world.follower.poll_once(0)
    assert world.served() == (3, "30", world.digests[0])
    assert world.slot.current.predictor is predictor


def test_a_spoilt_bundle_keeps_the_old_model_and_is_told_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.follower.load_first()
    whole = spoil(world, world.digests[1])
    world.entry = make_entry(2, world.digests[1])
    with caplog.at_level(logging.INFO):
        for now_s in (0, 5, 59, 60, 65):
            world.follower.poll_once(now_s)
    assert world.served() == (1, "10", world.digests[0])
    assert world.slot.problem == "ledger entry 2 is not served: bundle_error: model.onnx differs from its digest"
    assert world.slot.num_failures == 2  # at 0 s, and again at 60 s
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    world.store.put(f"bundles/{world.digests[1]}/model.onnx", whole)
    world.follower.poll_once(121)
    assert world.served() == (2, "20", world.digests[1])
    assert world.slot.problem is None


def test_what_a_ledger_entry_approves_is_asked_for_and_known_without_the_store(tmp_path: Path) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def open_model(bundle: Bundle, allowed: Sequence[str]) -> Opened:
        asked.append((bundle.digest, tuple(allowed)))
        engine = INT8 if INT8 in allowed else FP32
        return Opened(Predictor(bundle, threads=1, engine=engine), why=f"by {engine}")

    world = World(tmp_path, engines=[FP32, INT8], open_model=open_model)
    first, second = world.digests
    world.entry = replace(make_entry(1, first), runtimes=(INT8,))
    world.follower.load_first()
    assert world.slot.current and world.slot.current.why == f"by {INT8}"
    before = world.slot.current.predictor
    world.entry = replace(make_entry(2, first), runtimes=(INT8, "openvino fp32"))
    world.follower.poll_once(0)
    assert world.slot.current.predictor is before, "it may go on as it is"
    world.entry = make_entry(3, first)
    world.follower.poll_once(1)
    assert world.slot.current.predictor.engine == FP32, "this entry approves of nothing else"
    world.entry = replace(make_entry(4, second), runtimes=(INT8,))
    world.follower.poll_once(2)
    assert asked == [(first, (INT8,)), (first, ()), (second, (INT8,))]
    world.slot.current, world.error = None, StoreError("store", "is away")
    world.follower.load_first()
    assert asked[-1] == (second, (INT8,))


def test_engines_that_a_later_entry_of_the_same_bundle_approves_are_taken_up(tmp_path: Path) -> None:
    def open_model(bundle: Bundle, allowed: Sequence[str]) -> Opened:
        return Opened(Predictor(bundle, threads=1, engine=INT8 if INT8 in allowed else FP32))

    world = World(tmp_path, engines=[FP32, INT8], open_model=open_model)
    world.follower.load_first()
    assert world.slot.current and world.slot.current.predictor.engine == FP32
    world.entry = replace(make_entry(2, world.digests[0]), runtimes=(INT8,))
    world.follower.poll_once(0)
    assert world.slot.current.predictor.engine == INT8
    assert world.served() == (2, "20", world.digests[0])
    before = world.slot.current.predictor
    world.entry = replace(make_entry(3, world.digests[0]), runtimes=(INT8,))
    world.follower.poll_once(1)
    assert world.slot.current.predictor is before


def test_a_newer_entry_is_tried_at_once_after_a_refusal(world: World) -> None:
    world.follower.load_first()
    spoil(world, world.digests[1])
    world.entry = make_entry(2, world.digests[1])
    world.follower.poll_once(0)
    assert world.slot.problem
    world.entry = make_entry(3, world.digests[0])
    world.follower.poll_once(1)
    assert (world.served(), world.slot.problem) == ((3, "30", world.digests[0]), None)


def test_an_unreachable_store_keeps_the_model_and_heals(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.follower.load_first()
    for error in (StoreError("store file:///secret", "cannot reach it"), ValueError("/secret/path")):
        world.error = error
        for now_s in range(3):
            world.follower.poll_once(now_s)
        assert world.served() == (1, "10", world.digests[0])
        assert world.slot.problem
        assert "secret" not in world.slot.problem
    assert world.slot.num_failures == 6
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 2
    world.error = None
    world.follower.poll_once(9)
    assert world.slot.problem is None


def test_the_thread_follows_until_stopped(world: World) -> None:
    world.follower.load_first()
    world.follower.start()
    world.entry = make_entry(2, world.digests[1])
    thread = world.follower._thread
    assert thread
    for _ in range(500):
        if world.slot.num_swaps:
            break
        thread.join(0.01)
    assert world.served() == (2, "20", world.digests[1])
    world.follower.stop()
    assert not thread.is_alive()


def test_what_was_served_last_is_not_served_under_another_name(world: World) -> None:
    world.follower.load_first()
    world.error = StoreError("store", "cannot reach it")
    world.follower.load_first()
    assert world.served() == (1, "10", world.digests[0])
    world.follower._name = "other"
    with pytest.raises(StoreError, match="cannot reach it"):
        world.follower.load_first()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bundles": 3}', '{"name": "fake", "bundles": []}', "\x00"])
def test_a_damaged_note_of_what_was_served_last_is_written_anew(world: World, tmp_path: Path, text: str) -> None:
    world.follower.load_first()
    (tmp_path / "cache" / "last.json").write_text(text)
    world.error = StoreError("store", "cannot reach it")
    with pytest.raises(StoreError, match="cannot reach it"):
        world.follower.load_first()
    world.error = None
    world.follower.load_first()
    assert f'"bundles": ["{world.digests[0]}"]' in (tmp_path / "cache" / "last.json").read_text()
