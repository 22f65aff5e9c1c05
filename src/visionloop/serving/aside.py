"""Threads for what may hang, as a store on a network does: they end with the process, which does not wait for them.

(For those of an executor Python waits at its end, however long they hang.)
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")


class Aside:
    """A few daemon threads, begun when they are first needed."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._name, self._missing = name, threads
        self._todo: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def run(self, work: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Do work in one of the threads; what it returns or raises is that of the future.

        If the future is cancelled before its turn, the work is not done.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()

        def finish(settle: Callable[[], None]) -> None:
            if not done.done():
                settle()

        def do() -> None:
            if done.cancelled():
                return
            try:
                settle = partial(done.set_result, work())
            except Exception as exc:
                settle = partial(done.set_exception, exc)
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(finish, settle)

        self._todo.put(do)
        for _ in range(self._missing):
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        self._missing = 0
        return done

    def _work(self) -> None:
        while True:
            self._todo.get()()
