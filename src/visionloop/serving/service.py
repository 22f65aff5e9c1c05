"""What the routes that answer images share: they take images in, wait for the answer in time, and name the model.

A route of a new kind needs this module, `schemas.py`, and a line in `app.py`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request
from starlette.requests import ClientDisconnect

from visionloop.errors import ImageError
from visionloop.serving.answers import Answer
from visionloop.serving.batcher import Batcher, ImageInput
from visionloop.serving.body import Inbox, RequestError, Upload
from visionloop.serving.swap import ModelSlot, ServedModel

Result = TypeVar("Result")

MAX_DEADLINE_MS = 86_400_000
Deadline = Annotated[
    int | None, Header(ge=1, le=MAX_DEADLINE_MS, description="How long you wait; if that is too short you get 503")
]


@dataclass(frozen=True)
class TimeLimit:
    """How long a request may take. `is_said`: by the client's own word."""

    seconds: float
    is_said: bool


@dataclass(frozen=True)
class Service:
    """The model of a server, what reads its requests, and the queue in front of its network."""

    slot: ModelSlot
    inbox: Inbox
    batcher: Batcher

    def require_model(self) -> ServedModel:
        """Return the model that answers now. Raises RequestError if there is none."""
        if self.slot.current is None:
            found = f"no model is ready ({self.slot.problem})" if self.slot.problem else "no model is ready"
            raise RequestError(found, todo="Try again in a moment.", status=503, reason_code="not_ready")
        return self.slot.current

    def require_ready(self) -> ServedModel:
        """Return the model that answers now. Raises RequestError if there is none, or the server stops soon."""
        if self.slot.is_leaving:
            raise RequestError("the server stops", todo="Ask another one.", status=503, reason_code="stopping")
        return self.require_model()

    def require_live(self) -> None:
        """Raise RequestError if the network does not finish any more."""
        if self.batcher.is_stuck(self.inbox.limits.stuck_s):
            raise RequestError("the network does not finish", todo="Start it again.", status=503, reason_code="stuck")

    def note_model(self, request: Request) -> ServedModel:
        """Return the model that answers a request, and note it for the log of requests."""
        model = self.require_model()
        request.state.model = {"version": model.version, "digest": model.digest}
        return model

    def read_limit(self, asked_ms: int | None, most_s: float | None = None) -> TimeLimit:
        """Return how long a request may take whose client waits for so long (None: it does not say); `most_s` at most.

        None: the section `serve` says it.
        """
        most_s = self.inbox.limits.deadline_s if most_s is None else most_s
        return TimeLimit(most_s, False) if asked_ms is None else TimeLimit(min(most_s, asked_ms / 1000), True)

    @contextlib.asynccontextmanager
    async def take_in(self, request: Request, limit: TimeLimit) -> AsyncIterator[list[Upload]]:
        """Yield the images of a request, counted for its client; refuse it before its body is read if it is full."""
        check = partial(self.batcher.require_room, 1, limit.seconds, is_patient=limit.is_said)
        async with self.inbox.receive(request, check) as uploads:
            request.state.access.charge(request, len(uploads))
            yield uploads

    async def answer(
        self, request: Request, model: ServedModel, images: Sequence[ImageInput], limit: TimeLimit
    ) -> list[Answer | ImageError]:
        """Answer images in time. Raises as `finish`."""
        left_s = limit.seconds - (time.perf_counter() - request.state.started)
        work = self.batcher.predict(model, images, limit_s=left_s, is_patient=limit.is_said)
        try:
            return await self.finish(request, work, limit)
        except ClientDisconnect:
            if not limit.is_said:
                self.batcher.patience.note_left(time.perf_counter() - request.state.started)
            raise

    async def finish(self, request: Request, work: Coroutine[Any, Any, Result], limit: TimeLimit) -> Result:
        """Do the work of a request whose body is read: while its client is there, and so long at most after it began.

        Raises:
            QueueFull: it takes longer. ClientDisconnect: nobody waits for the answer.
        """
        left_s = limit.seconds - (time.perf_counter() - request.state.started)
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
        raise self.batcher.refuse("has no answer in time", f"one within {limit.seconds:g} s", "deadline")


class Places:
    """Work in the network's idle time is bounded: so many requests of one kind at once."""

    def __init__(self, batcher: Batcher, what: str, at_once: int) -> None:
        self._batcher, self._what, self._at_once, self._num_taken = batcher, what, at_once, 0

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Count a request until it is answered. Raises QueueFull: there are as many as there may be."""
        if self._num_taken >= self._at_once:
            raise self._batcher.refuse(f"has {self._num_taken} {self._what} under way", f"at most {self._at_once}")
        self._num_taken += 1
        try:
            yield
        finally:
            self._num_taken -= 1


def name_model(model: ServedModel) -> dict[str, Any]:
    """Return what every answer says of its model."""
    return {
        "name": model.name,
        "version": model.version,
        "digest": model.digest,
        "engine": model.predictor.engine,
    }


def is_single(uploads: Sequence[Upload]) -> bool:
    """Say whether a request gets one answer, not a list."""
    return len(uploads) == 1 and not uploads[0].in_list


def name_image(request_id: str, number: int, *, is_only: bool) -> str:
    """Return the id of one image of a request: several images cannot share the id that feedback names."""
    return request_id if is_only else f"{request_id}.{number}"


def make_answer(
    uploads: Sequence[Upload],
    answers: Sequence[Answer | ImageError],
    describe: Callable[[Answer], dict[str, Any]],
    request_id: str,
) -> dict[str, Any]:
    """Return the answer for one upload, or a list of answers and errors for several.

    Raises:
        ImageError: the only upload cannot be used.
    """
    if is_single(uploads):
        if isinstance(answers[0], ImageError):
            raise answers[0]
        return describe(answers[0])
    results = []
    for number, (upload, answer) in enumerate(zip(uploads, answers, strict=True)):
        if isinstance(answer, ImageError):
            results.append({"file": upload.name, "error": {"code": answer.reason_code, "message": str(answer)}})
        else:
            own_id = name_image(request_id, number, is_only=False)
            results.append({"file": upload.name, **describe(answer), "request_id": own_id})
    return {"results": results}
