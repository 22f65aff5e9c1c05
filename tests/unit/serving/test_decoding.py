import asyncio
import struct
import threading
from collections import Counter
from collections.abc import Callable

import pytest

from visionloop.errors import ImageError
from visionloop.serving.decoding import Decoders


async def wait_for(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not claim():
            await asyncio.sleep(0.002)


def make_header(side: int) -> bytes:
    """The beginning of a PNG: it says how large it is, and no more."""
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)


def test_cheap_images_pass_dear_ones_and_dear_ones_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.serving.decoding.count_cores", lambda: 8)
    released, running_now, most = threading.Event(), Counter[str](), Counter[str]()
    lock = threading.Lock()

    def work(kind: str) -> str:
        with lock:
            running_now[kind] += 1
            most[kind] = max(most[kind], running_now[kind])
        assert kind == "cheap" or released.wait(10)
        with lock:
            running_now[kind] -= 1
        return kind

    async def run() -> None:
        decoders = Decoders(lambda number: True)
        dear = [asyncio.create_task(decoders.run(make_header(4000), lambda: work("dear"))) for _ in range(5)]
        await wait_for(lambda: running_now["dear"] == 2)
        cheap = await asyncio.gather(*(decoders.run(make_header(100), lambda: work("cheap")) for _ in range(20)))
        assert {one.value for one in cheap} == {"cheap"}
        assert not any(one.was_dear for one in cheap)
        released.set()
        assert all(one.was_dear for one in await asyncio.gather(*dear))
        assert most["dear"] == 2, "two of 96 MB fit into 256 MB"
        assert decoders.num_decoding == decoders._used_bytes == 0
        decoders.stop()

    asyncio.run(run())


def test_a_caller_that_leaves_gives_its_memory_back_when_its_decoding_ends() -> None:
    released, begun = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert released.wait(10)
        raise ImageError("x", "is damaged", "whole pixels")

    async def run() -> None:
        decoders = Decoders(lambda number: True)
        task = asyncio.create_task(decoders.run(make_header(4000), work))
        assert await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (decoders.num_decoding, decoders._used_bytes) == (1, 96_000_000)
        released.set()
        await wait_for(lambda: decoders.num_decoding == 0)
        assert decoders._used_bytes == 0
        decoders.stop()

    asyncio.run(run())


def test_an_image_beyond_the_whole_budget_is_decoded_alone() -> None:
    async def run() -> None:
        decoders = Decoders(lambda number: True)
        assert (await decoders.run(make_header(50_000), lambda: "done")).value == "done"
        decoders.stop()

    asyncio.run(run())
