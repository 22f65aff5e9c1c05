"""Work that fills the network's idle time: never in the way of /predict, bounded in number and in time."""

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from visionloop.serving.batcher import Batcher

Result = TypeVar("Result")


class SpareWork:
    """Requests of one kind: so many at once, none longer than `limit_s`."""

    def __init__(self, batcher: Batcher, what: str, *, at_once: int, limit_s: float) -> None:
        self.batcher, self.limit_s = batcher, limit_s
        self._what, self._at_once, self._num_running = what, at_once, 0

    @contextlib.contextmanager
    def take_place(self) -> Iterator[None]:
        """Count a request until it is answered. Raises QueueFull: there are as many as there may be."""
        if self._num_running >= self._at_once:
            raise self.batcher.refuse(f"has {self._num_running} {self._what} under way", f"at most {self._at_once}")
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    async def finish(self, request: Request, work: Coroutine[Any, Any, Result], asked_ms: int | None) -> Result:
        """Do the work of a request whose body is read, while its client is there.

        Raises:
            QueueFull: it takes longer than `limit_s`, or than the client says. ClientDisconnect.
        """
        limit_s = self.limit_s if asked_ms is None else min(self.limit_s, asked_ms / 1000)
        left_s = limit_s - (time.perf_counter() - request.state.started)
        task = asyncio.create_task(work)
        gone = asyncio.ensure_future(request.receive())  # the body is read: nothing but the end can come
        try:
            done, _ = await asyncio.wait((task, gone), timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(Exception, asyncio.CancelledError):
                    await task  # files that it reads are in use until then
        if task in done:
            return task.result()
        if gone in done:
            raise ClientDisconnect
        raise self.batcher.refuse("has no answer in time", f"one within {limit_s:g} s", "deadline")
