import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from fakes import make_bundle, make_image
from visionloop.bundle import load_bundle, seal_bundle
from visionloop.data.images import UInt8Array
from visionloop.errors import ImageError
from visionloop.params import Serve
from visionloop.predictor import Outputs, Predictor
from visionloop.records import Prediction, canonical_json
from visionloop.serving.answers import Answer
from visionloop.serving.batcher import Batcher, Patience, QueueFull
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


def test_times_are_finer_than_the_clock_of_the_servers_loop(model: ServedModel) -> None:
    """The clock of uvloop has whole milliseconds; decoding and a small network take less."""
    images = [make_image(seed) for seed in range(5)]

    async def run() -> list[Answer | ImageError]:
        async with running() as batcher:
            return [(await batcher.predict(model, [data]))[0] for data in images]

    timings = [answer.timing for answer in uvloop.run(run()) if isinstance(answer, Answer)]
    assert len(timings) == 5
    for seconds in ([one.decode_s for one in timings], [one.network_s for one in timings]):
        assert min(seconds) > 0 and any(round(1e3 * s, 6) % 1 for s in seconds), seconds


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


@pytest.mark.parametrize(
    ("limit", "of_model", "refused"),
    [(None, 1024, True), (2000, 1024, True), (1024, 2000, True), (2000, 2000, False)],
)
def test_an_image_keeps_to_the_limit_of_the_server_and_that_of_the_model(
    tmp_path: Path, limit: int | None, of_model: int, refused: bool
) -> None:
    make_bundle(tmp_path / "b")
    card = replace(load_bundle(tmp_path / "b").card, max_pixels=of_model)
    (tmp_path / "b" / "card.json").write_bytes(canonical_json(card.to_json()))
    seal_bundle(tmp_path / "b")
    model = ServedModel(Predictor.load(tmp_path / "b", threads=1))

    async def run() -> list[Answer | ImageError]:
        async with running(max_pixels=make_limits(Serve(max_pixels=limit)).max_pixels) as batcher:
            return await batcher.predict(model, [make_image(1), make_image(1, size_hw=(32, 33))])

    assert [isinstance(one, ImageError) for one in asyncio.run(run())] == [False, refused]


def test_a_large_jpeg_counts_with_the_pixels_that_are_decoded(model: ServedModel) -> None:
    async def run() -> list[Answer | ImageError]:
        async with running(max_pixels=1024) as batcher:
            return await batcher.predict(model, [make_image(1, size_hw=(256, 256), kind=k) for k in ("JPEG", "PNG")])

    assert [isinstance(one, Prediction) for one in asyncio.run(run())] == [True, False]


def test_a_queue_longer_than_clients_wait_refuses_only_those_who_say_nothing(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(model, monkeypatch)

    async def run() -> None:
        async with running(max_batch=1) as batcher:
            gate.opened.set()
            await batcher.predict(model, [make_image(0)])
            gate.opened.clear()
            batcher._image_s = 0.1
            waiting = [asyncio.create_task(batcher.predict(model, [make_image(i)], is_patient=False)) for i in range(5)]
            await wait_for(lambda: batcher.depth == 5)
            batcher.require_room(1, 10, is_patient=False)
            for _ in range(60):
                batcher.patience.note_left(0.2)
            with pytest.raises(QueueFull, match=r"waiting for 0\.5 s; expected at most 0\.2 s") as caught:
                batcher.require_room(1, 10, is_patient=False)
            assert caught.value.headers["Retry-After"] == "1"
            batcher.require_room(1, 10, is_patient=True)
            gate.opened.set()
            await asyncio.gather(*waiting)
            batcher.require_room(1, 10, is_patient=False)

    asyncio.run(run())


def test_patience_follows_those_that_leave_and_not_a_few_of_them() -> None:
    now_s = 0.0
    patience = Patience(lambda: now_s)
    for _ in range(200):
        patience.note_left(0.01)
        for _ in range(15):
            patience.note_answered()
    assert patience.seconds > 50, "one in sixteen leaves"
    for _ in range(100):
        patience.note_left(0.2)
    assert 0.15 < patience.seconds < 0.18
    for _ in range(100):
        patience.note_left(0.001)
    assert 0.09 < patience.seconds < 0.11, "never shorter than a batch takes"
    now_s = 1.0
    assert patience.seconds == pytest.approx(0.1)
    now_s = 3.0
    assert patience.seconds == pytest.approx(0.1 * 2.5**2)
    patience.note_left(0.001)
    assert patience.seconds == pytest.approx(0.9 * 0.625)
    now_s = 1e9
    assert patience.seconds == 60


@pytest.mark.parametrize(("num_left", "newest_first"), [(0, False), (100, True)])
def test_the_newest_goes_first_only_where_clients_leave(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, num_left: int, newest_first: bool
) -> None:
    gate, done = Gate(model, monkeypatch), list[int]()

    async def ask(batcher: Batcher, number: int) -> None:
        await batcher.predict(model, [make_image(number)])
        done.append(number)

    async def run() -> None:
        async with running(max_batch=1) as batcher:
            for _ in range(num_left):
                batcher.patience.note_left(0.2)
            first = asyncio.create_task(ask(batcher, 0))
            await gate.wait_entered()
            others = []
            for number in range(1, 8):
                others.append(asyncio.create_task(ask(batcher, number)))
                await asyncio.sleep(0.03)
            gate.opened.set()
            await asyncio.gather(first, *others)

    asyncio.run(run())
    assert done[0] == 0
    assert (done[1:] == sorted(done[1:])) is not newest_first


# Answers that are kept


def test_a_repeated_image_is_answered_without_the_network_and_never_by_another_model(
    model: ServedModel, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "other", seed=5)
    other = ServedModel(Predictor.load(tmp_path / "other", threads=1))
    data, sizes = make_image(3), list[int]()

    async def ask(batcher: Batcher, one: ServedModel) -> Answer:
        [answer] = await batcher.predict(one, [data])
        assert isinstance(answer, Answer)
        return answer

    async def run() -> None:
        async with running(cache_bytes=100_000, on_batch=sizes.append) as batcher:
            first, second = await ask(batcher, model), await ask(batcher, model)
            assert (first.timing.is_cached, second.timing.is_cached) == (False, True)
            assert second == replace(first, timing=second.timing)
            swapped = await ask(batcher, other)
            assert not swapped.timing.is_cached
            assert swapped.probabilities == pytest.approx(other.predictor.predict([data])[0].probabilities)
            assert swapped.probabilities != first.probabilities
            batcher.cache.keep(model.predictor, first)  # late, of the model before
            assert (await ask(batcher, other)).probabilities == swapped.probabilities
            renamed = replace(other, version="7", entry=7)
            assert (await ask(batcher, renamed)).timing.is_cached, "the same network under a new number"
        assert sizes == [1, 1]

    asyncio.run(run())


def test_kept_answers_have_a_limit_and_the_one_not_asked_for_goes_first(model: ServedModel) -> None:
    async def run() -> list[bool]:
        async with running(cache_bytes=5_000) as batcher:
            for seed in (0, 1, 0, 2, 0, 3, 0, 4):
                await batcher.predict(model, [make_image(seed)])
            assert len(batcher.cache) == 3
            answers = await batcher.predict(model, [make_image(seed) for seed in (0, 1, 4)])
        return [isinstance(one, Answer) and one.timing.is_cached for one in answers]

    assert asyncio.run(run()) == [True, False, True]


def test_a_kept_answer_does_not_keep_its_batch_in_memory(model: ServedModel) -> None:
    async def run() -> list[Answer | ImageError]:
        async with running(cache_bytes=100_000) as batcher:
            return await batcher.predict(model, [make_image(seed) for seed in range(8)])

    answers = [one for one in asyncio.run(run()) if isinstance(one, Answer)]
    assert [one.embedding_d.base for one in answers] == [None] * 8
    assert len({one.sha256 for one in answers}) == 8


def test_without_memory_nothing_is_kept_and_a_broken_image_never_is(model: ServedModel) -> None:
    async def run() -> None:
        for memory, data, kind in ((0, make_image(0), Answer), (100_000, b"text", ImageError)):
            async with running(cache_bytes=memory) as batcher:
                answers = [*await batcher.predict(model, [data]), *await batcher.predict(model, [data])]
                assert len(batcher.cache) == 0
            assert [type(one) for one in answers] == [kind, kind]
            assert not any(one.timing.is_cached for one in answers if isinstance(one, Answer))

    asyncio.run(run())
