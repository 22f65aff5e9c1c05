import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import make_bundle, make_image
from visionloop.bundle import load_bundle, seal_bundle
from visionloop.data.images import UInt8Array
from visionloop.errors import ImageError
from visionloop.params import Serve
from visionloop.predictor import Outputs, Predictor
from visionloop.records import Prediction, canonical_json
from visionloop.serving.batcher import Batcher, QueueFull
from visionloop.serving.main import make_limits
from visionloop.serving.swap import ServedModel


@pytest.fixture
def model(bundle_dir: Path) -> ServedModel:
    return ServedModel(Predictor.load(bundle_dir, threads=1))


@asynccontextmanager
async def running(**limits: float | Callable[[int], None]) -> AsyncIterator[Batcher]:
    batcher = Batcher(**limits)  # type: ignore[arg-type]
    batcher.start()
    try:
        yield batcher
    finally:
        await batcher.stop()


class Gate:
    """Holds a model's runs until it is opened, so that a test decides when the network is busy."""

    def __init__(self, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        run = model.predictor.run

        def held(images_nhwc: UInt8Array) -> Outputs:
            self.entered.set()
            assert self.opened.wait(10)
            return run(images_nhwc)

        monkeypatch.setattr(model.predictor, "run", held)

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)


async def wait_for(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not claim():
            await asyncio.sleep(0.002)


def test_answers_equal_those_of_the_predictor_one_by_one(model: ServedModel) -> None:
    images = [make_image(seed) for seed in range(20)]

    async def run() -> list[Prediction | ImageError]:
        async with running(max_batch=8) as batcher:
            return await batcher.predict(model, images)

    for data, answer in zip(images, asyncio.run(run()), strict=True):
        [expected] = model.predictor.predict([data])
        assert isinstance(answer, Prediction)
        assert answer.prediction == expected.prediction
        assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_images_that_wait_are_answered_in_full_batches(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    gate = Gate(model, monkeypatch)

    async def run() -> None:
        async with running(max_batch=4, max_batch_s=10, on_batch=sizes.append) as batcher:
            first = asyncio.create_task(batcher.predict(model, [make_image(0)]))
            await gate.wait_entered()
            rest = asyncio.create_task(batcher.predict(model, [make_image(i) for i in range(10)]))
            await wait_for(lambda: batcher.depth == 11 and len(batcher._ready) >= 8)
            gate.opened.set()
            await asyncio.gather(first, rest)

    asyncio.run(run())
    assert sizes == [1, 4, 4, 2]


def test_a_lone_image_does_not_wait_for_others(model: ServedModel) -> None:
    async def run() -> list[Prediction | ImageError]:
        batcher = Batcher(max_wait_s=60)
        batcher.start()
        try:
            return await asyncio.wait_for(batcher.predict(model, [make_image(0)]), 10)
        finally:
            await batcher.stop()

    assert isinstance(asyncio.run(run())[0], Prediction)


def test_a_broken_image_is_an_answer_and_spoils_no_other(model: ServedModel) -> None:
    async def run() -> list[Prediction | ImageError]:
        async with running() as batcher:
            return await batcher.predict(model, [make_image(0), b"text", make_image(1)])

    first, second, third = asyncio.run(run())
    assert isinstance(first, Prediction)
    assert isinstance(second, ImageError)
    assert second.reason_code == "not_an_image"
    assert isinstance(third, Prediction)


def test_a_full_queue_refuses_whole_requests_and_recovers(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)

    async def run() -> None:
        async with running(max_queue=3) as batcher:
            two = asyncio.create_task(batcher.predict(model, [make_image(0), make_image(1)]))
            await gate.wait_entered()
            with pytest.raises(QueueFull, match="2 images waiting"):
                await batcher.predict(model, [make_image(2), make_image(3)])
            assert batcher.depth == 2
            one = asyncio.create_task(batcher.predict(model, [make_image(4)]))
            await wait_for(lambda: batcher.depth == 3)
            gate.opened.set()
            assert [len(answers) for answers in await asyncio.gather(two, one)] == [2, 1]
            assert batcher.depth == 0

    asyncio.run(run())


def test_a_cancelled_caller_breaks_no_batch_and_frees_its_place(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(model, monkeypatch)

    async def run() -> None:
        async with running() as batcher:
            gone = asyncio.create_task(batcher.predict(model, [make_image(0)]))
            stays = asyncio.create_task(batcher.predict(model, [make_image(1)]))
            await gate.wait_entered()
            gone.cancel()
            gate.opened.set()
            [answer] = await stays
            assert isinstance(answer, Prediction)
            with pytest.raises(asyncio.CancelledError):
                await gone
            await wait_for(lambda: batcher.depth == 0)

    asyncio.run(run())


def test_an_error_of_the_network_reaches_its_callers_only(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running() as batcher:
            with monkeypatch.context() as patch:
                patch.setattr(model.predictor, "run", lambda images_nhwc: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await batcher.predict(model, [make_image(0)])
            assert isinstance((await batcher.predict(model, [make_image(0)]))[0], Prediction)

    asyncio.run(run())


def test_each_image_is_answered_by_the_model_it_was_taken_in_for(
    model: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path / "other", classes=("x", "y"), size_hw=(48, 64), seed=5)
    other = ServedModel(Predictor.load(tmp_path / "other", threads=1))
    gate = Gate(model, monkeypatch)

    async def run() -> None:
        async with running() as batcher:
            calls = [asyncio.create_task(batcher.predict(m, [make_image(0)])) for m in (model, other, model, other)]
            await gate.wait_entered()
            gate.opened.set()
            for call, m in zip(calls, (model, other, model, other), strict=True):
                [answer] = await call
                assert isinstance(answer, Prediction)
                assert tuple(answer.probabilities) == m.predictor.card.classes

    asyncio.run(run())


def test_stop_answers_what_was_taken_and_takes_no_more(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)

    async def run() -> None:
        batcher = Batcher()
        batcher.start()
        taken = asyncio.create_task(batcher.predict(model, [make_image(i) for i in range(5)]))
        await gate.wait_entered()
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="stops"):
            await batcher.predict(model, [make_image(9)])
        gate.opened.set()
        assert len(await taken) == 5
        await stopping
        names = {thread.name.partition("_")[0] for thread in threading.enumerate()}
        assert not names & {"decode", "network"}

    asyncio.run(run())


@pytest.mark.parametrize(("limit", "refused"), [(None, [False, True]), (2000, [False, False]), (1024, [False, True])])
def test_without_a_limit_of_its_own_the_server_has_that_of_the_model(
    tmp_path: Path, limit: int | None, refused: list[bool]
) -> None:
    make_bundle(tmp_path / "b")
    card = replace(load_bundle(tmp_path / "b").card, max_pixels=1024)
    (tmp_path / "b" / "card.json").write_bytes(canonical_json(card.to_json()))
    seal_bundle(tmp_path / "b")
    model = ServedModel(Predictor.load(tmp_path / "b", threads=1))

    async def run() -> list[Prediction | ImageError]:
        async with running(max_pixels=make_limits(Serve(max_pixels=limit)).max_pixels) as batcher:
            return await batcher.predict(model, [make_image(1), make_image(1, size_hw=(32, 33))])

    assert [isinstance(one, ImageError) for one in asyncio.run(run())] == refused
