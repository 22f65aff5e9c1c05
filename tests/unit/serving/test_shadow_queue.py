"""The shadow beside a batcher of ours: what it takes, when it works, and what it never does."""

import asyncio
import gc
import random
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from fakes import make_bundle, make_image
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.data.prediction_log import Order, read_shadow, write_order
from visionloop.errors import StoreError
from visionloop.predictor import Predictor
from visionloop.serving.answers import Answer
from visionloop.serving.batcher import Batcher
from visionloop.serving.log import Noted
from visionloop.serving.shadow import MAX_WAITING, QUIET_S, Shadow
from visionloop.serving.swap import ServedModel
from visionloop.store import LocalStore

STARTED = "2026-01-01T00:00:00Z"


class Desk:
    """A store with a shadow's bundle and its order, and the champion."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(folder / "store")
        make_bundle(folder / "champion", seed=1)
        make_bundle(folder / "second", seed=2)
        self.champion = ServedModel(Predictor.load(folder / "champion", threads=1))
        bundle = load_bundle(folder / "second")
        upload_bundle(self.store, bundle)
        self.order = Order(bundle.digest, 1.0, STARTED, "t", "second")
        self.folder = folder

    def make(self, **options: Any) -> Shadow:
        options = {"open_model": lambda bundle: Predictor(bundle, threads=1), "flush_s": 0.0, **options}
        return Shadow("fake", self.store, self.folder / "cache", draw=random.Random(0), **options)

    def begin(self, share: float = 1.0, **options: Any) -> Shadow:
        write_order(self.store, "fake", Order(self.order.bundle, share, STARTED, "t", "second"))
        shadow = self.make(**options)
        shadow.follow()
        return shadow

    def note(self, number: int, data: bytes | None = None) -> Noted:
        answer = cast(Answer, None)  # it looks at none
        return Noted(f"r{number}", time.time(), self.champion, data or make_image(number), answer, 1.0)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr("visionloop.serving.shadow.DUTY", 1.0)
    return Desk(tmp_path)


def work(shadow: Shadow, act: Callable[[Batcher], Any], until: Callable[[], bool], limit_s: float = 10.0) -> bool:
    """Let the shadow work after `act`; return whether it came as far."""

    async def run() -> bool:
        batcher = Batcher()
        batcher.start()
        shadow.start(batcher)
        act(batcher)
        stop_at_s = time.monotonic() + limit_s
        while not until() and time.monotonic() < stop_at_s:
            await asyncio.sleep(0.005)
        has_come = until()
        await shadow.stop()
        await batcher.stop()
        return has_come

    return asyncio.run(run())


def test_what_it_answers_is_written_down_as_the_second_model_answers(desk: Desk) -> None:
    shadow = desk.begin()
    assert work(shadow, lambda _: [shadow.offer(desk.note(i)) for i in range(3)], lambda: shadow.num_answered == 3)
    shadow.flush()
    rows = read_shadow(desk.store, "fake", desk.order).to_pylist()
    expected = Predictor.load(desk.folder / "second", threads=1).predict([make_image(i) for i in range(3)])
    assert [(row["request_id"], row["prediction"], row["problem"]) for row in rows] == [
        (f"r{i}", one.prediction, None) for i, one in enumerate(expected)
    ]
    assert [row["confidence"] for row in rows] == pytest.approx([one.confidence for one in expected])
    assert all(row["network_ms"] > 0 for row in rows)


def test_it_takes_its_share_and_drops_what_finds_the_queue_full(desk: Desk) -> None:
    shadow = desk.begin(share=0.25)
    taken = 0

    def offer(_: Batcher) -> None:
        nonlocal taken
        for i in range(400):
            shadow.offer(desk.note(i, b"x"))
        taken = len(shadow._waiting) + shadow.num_dropped

    work(shadow, offer, lambda: True)
    assert 70 <= taken <= 130
    assert shadow.num_dropped == taken - MAX_WAITING


def test_it_does_not_work_while_somebody_waits_or_was_answered_a_moment_ago(desk: Desk) -> None:
    shadow = desk.begin()

    def keep_busy(batcher: Batcher) -> None:
        shadow.offer(desk.note(0))
        batcher._tasks.add(cast(Any, object()))

    def give_up() -> bool:
        return shadow.num_answered + shadow.num_failed > 0

    async def run() -> None:
        batcher = Batcher()
        batcher.start()
        shadow.start(batcher)
        keep_busy(batcher)
        await asyncio.sleep(3 * QUIET_S)
        assert not give_up()
        batcher._tasks.clear()
        began_at_s = time.monotonic()
        shadow.offer(desk.note(1))
        while not give_up():
            await asyncio.sleep(0.002)
        assert time.monotonic() - began_at_s >= QUIET_S
        await shadow.stop()
        await batcher.stop()

    asyncio.run(run())


def test_it_rests_so_long_that_few_requests_can_meet_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Predictor.run

    def be_slow(self: Predictor, images_nhwc: Any) -> Any:
        time.sleep(0.02)
        return run(self, images_nhwc)

    monkeypatch.setattr(Predictor, "run", be_slow)
    monkeypatch.setattr("visionloop.serving.shadow.DUTY", 0.01)
    shadow = desk.begin()  # 20 ms of work: then 2 s of rest
    assert not work(
        shadow, lambda _: [shadow.offer(desk.note(i)) for i in range(3)], lambda: shadow.num_answered > 1, 1
    )
    assert shadow.num_answered == 1


def test_it_is_refused_where_there_is_no_memory_for_it(desk: Desk) -> None:
    opened: list[Any] = []
    shadow = desk.begin(read_free=lambda: 100_000_000, open_model=opened.append)
    assert (shadow.is_on, opened) == (False, [])
    assert shadow.problem == "100 MB of memory are free"
    shadow.offer(desk.note(0))
    assert not shadow._waiting


def test_a_stop_frees_the_model_and_its_files_also_while_it_rests(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.serving.shadow.DUTY", 1e-6)
    shadow = desk.begin()
    held = weakref.ref(shadow._loaded.model.predictor) if shadow._loaded else None
    assert held is not None

    def is_free() -> bool:
        if shadow.num_answered:
            write_order(desk.store, "fake", Order(**{**vars(desk.order), "stopped_at": STARTED}))
            shadow.follow()
            gc.collect()
        return held() is None

    assert work(shadow, lambda _: shadow.offer(desk.note(0)), is_free, 5.0)
    assert not (desk.folder / "cache").exists()
    assert (shadow.is_on, shadow.problem) == (False, None)


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"bundle": 1, "share": 2}'])
def test_a_damaged_order_leaves_all_as_it_is(desk: Desk, data: bytes) -> None:
    shadow = desk.begin()
    desk.store.put("shadow/fake/current.json", data)
    shadow.follow()
    assert shadow.is_on
    assert shadow.problem == "is damaged"
    write_order(desk.store, "fake", desk.order)
    shadow.follow()
    assert shadow.problem is None


def test_rows_wait_while_the_store_is_away(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow = desk.begin()
    assert work(shadow, lambda _: shadow.offer(desk.note(0)), lambda: shadow.num_answered == 1)
    with monkeypatch.context() as patch:
        patch.setattr(desk.store, "create", lambda *_: (_ for _ in ()).throw(StoreError("store", "is away", "a store")))
        shadow.flush()
    assert len(read_shadow(desk.store, "fake", desk.order)) == 0
    shadow.flush()
    assert len(read_shadow(desk.store, "fake", desk.order)) == 1


def test_an_image_that_the_champion_answered_as_the_same_model_is_not_asked_again(desk: Desk) -> None:
    shadow = desk.begin()
    second = ServedModel(Predictor.load(desk.folder / "second", threads=1))
    shadow.offer(Noted("r", time.time(), second, b"x", cast(Answer, None), 1.0))
    assert not shadow._waiting
