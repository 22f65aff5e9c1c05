"""The HTTP interface of a model: routes, answers and errors. Builds no model, reads no settings, opens no socket.

A wrong request gets a 4xx. A full server, or one without a model, answers 503. Only our own bugs give a 500.
"""

import asyncio
import contextlib
import heapq
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from visionloop import __version__
from visionloop.errors import ImageError
from visionloop.predictor import Predictor
from visionloop.serving.access import Access
from visionloop.serving.answers import Answer
from visionloop.serving.batcher import Batcher
from visionloop.serving.body import Inbox, Limits, RequestError, Upload
from visionloop.serving.envelope import ERROR_KINDS, Envelope, answer_error, check_options, name_request
from visionloop.serving.feedback import FeedbackBook, add_feedback
from visionloop.serving.log import Noted, PredictionLog
from visionloop.serving.metrics import Meters
from visionloop.serving.page import add_page
from visionloop.serving.schemas import (
    ERRORS,
    NOT_FOLLOWING,
    PREDICT_BODY,
    REFUSED,
    BatchAnswer,
    ErrorAnswer,
    ModelAnswer,
    PredictAnswer,
    PredictLabelsAnswer,
    ReadyAnswer,
    ReloadAnswer,
    SimilarAnswer,
    SimilarBatchAnswer,
    complete_document,
)
from visionloop.serving.similar import Reference
from visionloop.serving.swap import ModelSlot, ServedModel

PREDICT = "/predict"
MAX_TOP_K, MAX_DEADLINE_MS = 1_000_000, 86_400_000
MAX_NEIGHBOURS = 100
LOOK_S = 30.0
Deadline = Annotated[
    int | None, Header(ge=1, le=MAX_DEADLINE_MS, description="How long you wait; if that is too short you get 503")
]


def make_app(
    slot: ModelSlot,
    limits: Limits | None = None,
    access: Access | None = None,
    look_now: Callable[[], None] | None = None,
    *,
    log: PredictionLog | None = None,
    book: FeedbackBook | None = None,
) -> FastAPI:
    """Build the application. The model in `slot` may change, or be missing, at any time.

    `look_now` looks at the ledger, and may take as long as that takes; None: the server follows none. With a `log`
    answers are written down; a `book` takes feedback on them.
    """
    limits, access = limits or Limits(), access or Access()
    meters = Meters(slot, lambda: batcher.depth, lambda: access.has_problem, log, book)
    batcher = Batcher(
        max_batch=limits.max_batch,
        max_queue=limits.max_queue,
        max_pixels=limits.max_pixels,
        cache_bytes=limits.cache_bytes,
        decoders=lambda: slot.current.decoders if slot.current else 0,
        on_batch=meters.count_batch,
        measure=log.measure if log else lambda image_hwc: None,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="visionloop", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.dependencies.append(Depends(check_options))
    app.add_middleware(Envelope, meters=meters, counted=PREDICT, access=access)
    for kind in ERROR_KINDS:
        app.add_exception_handler(kind, answer_error)
    inbox = Inbox(limits)
    _add_predict(app, slot, inbox, batcher, meters, log=log)
    add_feedback(app, partial(_require_model, slot), inbox, book)
    _add_similar(app, slot, inbox, batcher)
    _add_admin(app, slot, look_now)
    _add_state(app, slot, meters, lambda: batcher.is_stuck(limits.stuck_s))
    add_page(app)
    complete_document(app)
    return app


def _add_predict(
    app: FastAPI, slot: ModelSlot, inbox: Inbox, batcher: Batcher, meters: Meters, *, log: PredictionLog | None
) -> None:
    @app.post(
        PREDICT,
        response_model=PredictLabelsAnswer | PredictAnswer | BatchAnswer,
        responses={**REFUSED, **ERRORS},
        openapi_extra={"requestBody": PREDICT_BODY},
        summary="Classify one image, or several",
    )
    async def predict(
        request: Request,
        top_k: Annotated[
            int | None,
            Query(ge=1, le=MAX_TOP_K, description="`probabilities` has only the so many highest, the highest first"),
        ] = None,
        embedding: Annotated[bool, Query(description="Answer with the embedding too: one vector an image")] = False,
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """Send the image as the body, one or more files in a form, or JSON with base64.

        JPEG, PNG, WebP or AVIF; the bytes decide. HEIC, where the extra `heic` is installed.

        A model whose task is multilabel (see /model) also answers with the list of labels, which may be empty. Where
        the model does not know, `abstained` says why; `prediction` is then its best guess.
        """
        limit = _TimeLimit.read(inbox.limits.deadline_s, x_deadline_ms)
        async with _take_in(request, inbox, batcher, limit) as uploads:
            model = _note_model(request, slot)
            answers = await _answer_in_time(request, batcher, model, uploads, limit)
        for answer in answers:
            if isinstance(answer, Answer):
                meters.count_prediction(answer)
                meters.count_timing(answer.timing)
        if log:
            _note(log, request, model, uploads, answers)
        request_id = request.state.request_id
        described = _make_answer(
            uploads, answers, lambda answer: _describe(answer, top_k, embedding=embedding), request_id
        )
        return JSONResponse({**described, "model": _name_model(model), **name_request(request)})


def _add_similar(app: FastAPI, slot: ModelSlot, inbox: Inbox, batcher: Batcher) -> None:
    held = WeakKeyDictionary[Predictor, Reference]()  # a model that was swapped out takes its reference with it
    loading = threading.Lock()

    def load(model: ServedModel) -> Reference:
        with loading:
            if model.predictor not in held:
                held[model.predictor] = Reference(model.predictor.bundle)
            return held[model.predictor]

    @app.post(
        "/similar",
        response_model=SimilarAnswer | SimilarBatchAnswer,
        responses={**REFUSED, **ERRORS, 409: {"model": ErrorAnswer, "description": "The model does not hold which"}},
        openapi_extra={"requestBody": PREDICT_BODY},
        summary="The validation images nearest to an image, or to several",
    )
    async def similar(
        request: Request,
        k: Annotated[int, Query(ge=1, le=MAX_NEIGHBOURS, description="So many of them")] = 5,
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """Send images as for /predict. The answer names images by the sha256 of their files, and says their labels.

        `distance` is the cosine distance of the embeddings, from 0 to 2, as in `visionloop similar`.
        """
        limit = _TimeLimit.read(inbox.limits.deadline_s, x_deadline_ms)
        async with _take_in(request, inbox, batcher, limit) as uploads:
            model = _note_model(request, slot)
            reference = await asyncio.to_thread(load, model)
            answers = await _answer_in_time(request, batcher, model, uploads, limit)

        def describe(answer: Answer) -> dict[str, Any]:
            return {"neighbours": [asdict(each) for each in reference.find(answer.embedding_d, k)]}

        described = await asyncio.to_thread(_make_answer, uploads, answers, describe, request.state.request_id)
        return JSONResponse({**described, "model": _name_model(model), **name_request(request)})


def _add_admin(app: FastAPI, slot: ModelSlot, look_now: Callable[[], None] | None) -> None:
    under_way: asyncio.Future[None] | None = None

    @app.post(
        "/admin/reload",
        response_model=ReloadAnswer,
        responses={**REFUSED, 409: NOT_FOLLOWING, 422: ERRORS[422], 503: ERRORS[503]},
        summary="Look at the ledger now",
    )
    async def reload(request: Request) -> dict[str, Any]:
        """Take up a promotion or a rollback at once, and try a refused model again. Several at a time are one look."""
        nonlocal under_way
        if look_now is None:
            found, todo = "the server was started with a bundle", "Start it without --bundle to follow the ledger."
            raise RequestError(found, "one that follows the ledger", todo, status=409, reason_code="not_following")
        before = slot.current
        if under_way is None or under_way.done():
            under_way = _run_aside(look_now)
        try:
            await asyncio.wait_for(asyncio.shield(under_way), LOOK_S)
        except TimeoutError as exc:
            found = f"the ledger was not read within {LOOK_S:g} s"
            raise RequestError(found, todo="It goes on; see /model.", status=503, reason_code="slow_store") from exc
        model = _note_model(request, slot)
        swapped = before is None or (before.digest, before.entry) != (model.digest, model.entry)
        return {"model": _name_model(model), "entry": model.entry, "swapped": swapped, "problem": slot.problem}


def _run_aside(work: Callable[[], None]) -> "asyncio.Future[None]":
    """Run what may hang in a thread that ends with the process: no executor waits for it when the server stops."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def run() -> None:
        try:
            work()
        finally:
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(done.set_result, None)

    threading.Thread(target=run, name="look-at-ledger", daemon=True).start()
    return done


def _add_state(app: FastAPI, slot: ModelSlot, meters: Meters, is_stuck: Callable[[], bool]) -> None:
    @app.get("/health/live", responses={503: ERRORS[503]}, summary="Does it work, or must it be started again")
    async def live() -> dict[str, str]:
        if is_stuck():
            raise RequestError("the network does not finish", todo="Start it again.", status=503, reason_code="stuck")
        return {"status": "live"}

    @app.get("/health/ready", response_model=ReadyAnswer, responses={503: ERRORS[503]}, summary="Can it answer")
    async def ready() -> dict[str, Any]:
        if slot.is_leaving:
            raise RequestError("the server stops", todo="Ask another one.", status=503, reason_code="stopping")
        return {"status": "ready", "model": _name_model(_require_model(slot)), "problem": slot.problem}

    @app.get(
        "/model", response_model=ModelAnswer, responses={**REFUSED, 503: ERRORS[503]}, summary="Which model answers"
    )
    async def describe_model() -> dict[str, Any]:
        model = _require_model(slot)
        known = {"task", "classes", "image_size", "resize", "threshold", "thresholds", "abstain", "dataset"}
        card = {key: value for key, value in asdict(model.predictor.card).items() if key in known}
        runtime = {"engine": model.predictor.engine, "why": model.why}
        return {**_name_model(model), "entry": model.entry, "problem": slot.problem, "runtime": runtime, **card}

    @app.get("/metrics", response_class=Response, responses=REFUSED, summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(meters.scrape(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _require_model(slot: ModelSlot) -> ServedModel:
    if slot.current is None:
        found = f"no model is ready ({slot.problem})" if slot.problem else "no model is ready"
        raise RequestError(found, todo="Try again in a moment.", status=503, reason_code="not_ready")
    return slot.current


def _note_model(request: Request, slot: ModelSlot) -> ServedModel:
    """Return the model that answers a request, and note it for the log."""
    model = _require_model(slot)
    request.state.model = {"version": model.version, "digest": model.digest}
    return model


def _name_model(model: ServedModel) -> dict[str, Any]:
    return {"name": model.name, "version": model.version, "digest": model.digest}


@dataclass(frozen=True)
class _TimeLimit:
    """How long a request may take. `is_said`: by the client's own word."""

    seconds: float
    is_said: bool

    @classmethod
    def read(cls, most_s: float, asked_ms: int | None) -> "_TimeLimit":
        return cls(most_s, False) if asked_ms is None else cls(min(most_s, asked_ms / 1000), True)


@contextlib.asynccontextmanager
async def _take_in(request: Request, inbox: Inbox, batcher: Batcher, limit: _TimeLimit) -> AsyncIterator[list[Upload]]:
    """Yield the images of a request, counted for its client; refuse it before its body is read if there is no room."""
    check = partial(batcher.require_room, 1, limit.seconds, is_patient=limit.is_said)
    async with inbox.receive(request, check) as uploads:
        request.state.access.charge(request, len(uploads))
        yield uploads


async def _answer_in_time(
    request: Request, batcher: Batcher, model: ServedModel, uploads: Sequence[Upload], limit: _TimeLimit
) -> list[Answer | ImageError]:
    """Answer while the client is there, and for so long at most after its request began.

    Raises:
        QueueFull: it takes longer. ClientDisconnect: nobody waits for the answer.
    """
    left_s = limit.seconds - (time.perf_counter() - request.state.started)
    images = [upload.data for upload in uploads]
    work = asyncio.create_task(batcher.predict(model, images, limit_s=left_s, is_patient=limit.is_said))
    gone = asyncio.ensure_future(request.receive())  # the body is read: nothing but the end can come
    try:
        done, _ = await asyncio.wait((work, gone), timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
    finally:
        work.cancel()
        gone.cancel()
    if gone in done:
        if not limit.is_said:
            batcher.patience.note_left(time.perf_counter() - request.state.started)
        raise ClientDisconnect
    if work in done:
        return work.result()
    raise batcher.refuse("has no answer in time", f"one within {limit.seconds:g} s", "deadline")


def _note(
    log: PredictionLog,
    request: Request,
    model: ServedModel,
    uploads: Sequence[Upload],
    answers: Sequence[Answer | ImageError],
) -> None:
    """Note the answers in the prediction log. It waits for nothing."""
    state, at_s = request.state, time.time()
    total_ms = 1000 * (time.perf_counter() - state.started)
    for number, (upload, answer) in enumerate(zip(uploads, answers, strict=True)):
        if isinstance(answer, Answer):
            request_id = _name_image(state.request_id, number, is_only=_is_single(uploads))
            client = getattr(state, "who", None)
            log.note(Noted(request_id, at_s, model, upload.data, answer, total_ms, state.client_request_id, client))


def _is_single(uploads: Sequence[Upload]) -> bool:
    return len(uploads) == 1 and not uploads[0].in_list


def _name_image(request_id: str, number: int, *, is_only: bool) -> str:
    """Return the id of one image of a request: several images cannot share the id that feedback names."""
    return request_id if is_only else f"{request_id}.{number}"


def _make_answer(
    uploads: Sequence[Upload],
    answers: Sequence[Answer | ImageError],
    describe: Callable[[Answer], dict[str, Any]],
    request_id: str,
) -> dict[str, Any]:
    """Return the answer for one upload, or a list of answers and errors for several.

    Raises:
        ImageError: the only upload cannot be used.
    """
    if _is_single(uploads):
        if isinstance(answers[0], ImageError):
            raise answers[0]
        return describe(answers[0])
    results = []
    for number, (upload, answer) in enumerate(zip(uploads, answers, strict=True)):
        if isinstance(answer, ImageError):
            results.append({"file": upload.name, "error": {"code": answer.reason_code, "message": str(answer)}})
        else:
            own_id = _name_image(request_id, number, is_only=False)
            results.append({"file": upload.name, **describe(answer), "request_id": own_id})
    return {"results": results}


def _describe(answer: Answer, top_k: int | None, *, embedding: bool) -> dict[str, Any]:
    labels = {} if answer.labels is None else {"labels": list(answer.labels)}
    probabilities = answer.probabilities
    if top_k is not None:
        probabilities = dict(heapq.nlargest(top_k, probabilities.items(), key=lambda item: item[1]))
    return {
        "prediction": answer.prediction,
        **labels,
        "confidence": answer.confidence,
        "abstained": answer.abstained,
        "probabilities": probabilities,
        **({"embedding": answer.embedding_d.tolist()} if embedding else {}),
        "timing": {
            "queue_ms": round(answer.timing.queue_s * 1000, 3),
            "decode_ms": round(answer.timing.decode_s * 1000, 3),
            "network_ms": round(answer.timing.network_s * 1000, 3),
            "cached": answer.timing.is_cached,
        },
    }
