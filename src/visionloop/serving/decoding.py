"""Decodes images in a few threads, in two lanes: a cheap one is not stuck behind dear ones, and memory is bounded.

What an image costs follows from the size in its header. All methods belong to one event loop.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from visionloop.data.encoded import estimate_bytes
from visionloop.parallel import count_cores

MAX_DECODERS = 8
DEAR_BYTES = 8_000_000  # a PNG of 1.3 megapixels, a JPEG of 8: some hundredths of a second
# Of the pixels that are being decoded, all together. One image alone may take more.
BUDGET_BYTES = 256_000_000

Result = TypeVar("Result")


@dataclass(frozen=True)
class Decoded(Generic[Result]):
    """What was decoded, how long it took, and whether it went by the lane of the dear ones."""

    value: Result
    seconds: float
    was_dear: bool


@dataclass(frozen=True)
class _Turn:
    """The place of an image in front of the decoders."""

    taken_at: float
    num_bytes: int
    given: "asyncio.Future[None]"


class _Lane:
    """The images that wait for a decoder, and how many are decoded now."""

    def __init__(self) -> None:
        self.num_decoding = 0
        self.turns: deque[_Turn] = deque()

    def find_oldest(self) -> _Turn | None:
        while self.turns and self.turns[0].given.done():
            self.turns.popleft()
        return self.turns[0] if self.turns else None


class Decoders:
    """Threads that decode. Make it inside the event loop that uses it."""

    def __init__(
        self,
        has_room: Callable[[int], bool],
        on_end: Callable[[], None] = lambda: None,
        pick: Callable[[deque[_Turn]], _Turn] = deque.popleft,
        *,
        decoders: Callable[[], int] = lambda: 0,
    ) -> None:
        """`has_room` says whether one more may be decoded while so many are; `on_end` is called after each.

        `pick` takes the next one out of a lane. `decoders` says how many had better decode at a time for the model that
        is served now; 0: all cores but one.
        """
        self._has_room, self._on_end, self._pick, self._wanted = has_room, on_end, pick, decoders
        # One core is left for the network and the event loop: mostly, with decoding on all cores the server is slower.
        self._most = count_cores() - 1
        self._cheap, self._dear = _Lane(), _Lane()
        self._pool = ThreadPoolExecutor(MAX_DECODERS, thread_name_prefix="decode")  # begins those that are needed
        self._used_bytes = 0

    @property
    def num_decoding(self) -> int:
        """How many images are decoded now."""
        return self._cheap.num_decoding + self._dear.num_decoding

    async def run(self, data: bytes, decode: Callable[[], Result]) -> Decoded[Result]:
        """Wait for a turn, decode in a thread, return or raise what `decode` does.

        If the caller is cancelled before its turn, nothing is decoded.
        """
        loop = asyncio.get_running_loop()
        num_bytes = estimate_bytes(data)
        lane = self._dear if num_bytes > DEAR_BYTES else self._cheap
        turn = _Turn(time.monotonic(), num_bytes, loop.create_future())
        lane.turns.append(turn)
        self.give_turns()
        try:
            await turn.given
        except asyncio.CancelledError:
            if turn.given.done() and not turn.given.cancelled():
                self._end(lane, turn)
            raise
        started_at = time.monotonic()
        work = loop.run_in_executor(self._pool, decode)
        try:
            value = await asyncio.shield(work)
        finally:
            if work.done():
                self._end(lane, turn)
            else:  # the caller is gone; the thread goes on, and its memory is in use until it ends
                work.add_done_callback(lambda done: self._end(lane, turn, done))
        return Decoded(value, time.monotonic() - started_at, lane is self._dear)

    def give_turns(self) -> None:
        """Let images be decoded: the lane with the oldest first."""
        cores = max(1, min(self._wanted() or self._most, MAX_DECODERS))
        limits = ((self._cheap, cores), (self._dear, max(1, cores - 1)))
        while self._has_room(self.num_decoding) and self.num_decoding < max(2, cores):
            lanes = [(oldest.taken_at, lane) for lane, limit in limits if (oldest := self._may_give(lane, limit))]
            if not lanes:
                return
            lane = min(lanes, key=lambda one: one[0])[1]
            turn = self._pick(lane.turns)
            if not turn.given.done():
                turn.given.set_result(None)
                lane.num_decoding += 1
                self._used_bytes += turn.num_bytes

    def stop(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _may_give(self, lane: _Lane, limit: int) -> _Turn | None:
        oldest = lane.find_oldest()
        if oldest is None or lane.num_decoding >= limit:
            return None
        fits = not self._used_bytes or self._used_bytes + max(t.num_bytes for t in lane.turns) <= BUDGET_BYTES
        return oldest if fits or lane is self._cheap else None

    def _end(self, lane: _Lane, turn: _Turn, unseen: "asyncio.Future[Result] | None" = None) -> None:
        if unseen is not None and not unseen.cancelled():
            unseen.exception()  # else the loop reports it as one that nobody looked at
        lane.num_decoding -= 1
        self._used_bytes -= turn.num_bytes
        self._on_end()
        self.give_turns()
