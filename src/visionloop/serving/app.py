"""The HTTP interface of a model: routes, answers and errors. Builds no model, reads no settings, opens no socket.

A wrong request gets a 4xx. A full server, or one without a model, answers 503. Only our own bugs give a 500.
"""

import asyncio
import contextlib
import heapq
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from visionloop import __version__
from visionloop.errors import ImageError
from visionloop.serving.batcher import Answer, Batcher
from visionloop.serving.body import Inbox, Limits, RequestError, Upload
from visionloop.serving.envelope import ERROR_KINDS, Envelope, answer_error, name_request
from visionloop.serving.feedback import FeedbackBook, add_feedback
from visionloop.serving.log import Noted, PredictionLog
from visionloop.serving.metrics import Meters
from visionloop.serving.schemas import (
    ERRORS,
    PREDICT_BODY,
    PROBLEM,
    BatchAnswer,
    ModelAnswer,
    PredictAnswer,
    PredictLabelsAnswer,
    ReadyAnswer,
)
from visionloop.serving.swap import ModelSlot, ServedModel

PREDICT = "/predict"
MAX_TOP_K, MAX_DEADLINE_MS = 1_000_000, 86_400_000
PAGE = Path(__file__).parent / "page" / "docs.html"
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:"
)


def make_app(
    slot: ModelSlot,
    limits: Limits | None = None,
    *,
    log: PredictionLog | None = None,
    book: FeedbackBook | None = None,
) -> FastAPI:
    """Build the application. The model in `slot` may change, or be missing, at any time.

    With a `log` answers are written down; a `book` takes feedback on them.
    """
    limits = limits or Limits()
    meters = Meters(slot, lambda: batcher.depth)
    batcher = Batcher(
        max_batch=limits.max_batch,
        max_queue=limits.max_queue,
        max_pixels=limits.max_pixels,
        on_batch=meters.count_batch,
        measure=log.measure if log else lambda image_hwc: None,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="visionloop", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Envelope, meters=meters, counted=PREDICT)
    for kind in ERROR_KINDS:
        app.add_exception_handler(kind, answer_error)
    _add_predict(app, slot, Inbox(limits), batcher, meters, log=log)
    add_feedback(app, slot, book)
    _add_state(app, slot, meters, lambda: batcher.is_stuck(limits.stuck_s))
    _add_page(app)
    _name_problems(app)
    return app


def _name_problems(app: FastAPI) -> None:
    """Let the document name the content type of errors, which FastAPI takes for that of the answer."""
    make = app.openapi

    def make_openapi() -> dict[str, Any]:
        document = make()
        for route in (route for path in document["paths"].values() for route in path.values()):
            for status, response in route["responses"].items():
                content = response.get("content", {})
                if status >= "400" and "application/json" in content:
                    content[PROBLEM] = content.pop("application/json")
        return document

    app.openapi = make_openapi  # type: ignore[method-assign]


def _add_predict(
    app: FastAPI, slot: ModelSlot, inbox: Inbox, batcher: Batcher, meters: Meters, *, log: PredictionLog | None
) -> None:
    @app.post(
        PREDICT,
        response_model=PredictLabelsAnswer | PredictAnswer | BatchAnswer,
        responses=ERRORS,
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
        x_deadline_ms: Annotated[
            int | None,
            Header(ge=1, le=MAX_DEADLINE_MS, description="How long you wait; if that is too short you get 503"),
        ] = None,
    ) -> Response:
        """Send the image as the body, one or more files in a form, or JSON with base64.

        JPEG, PNG, WebP or AVIF; the bytes decide. HEIC, where the extra `heic` is installed.

        A model whose task is multilabel (see /model) also answers with the list of labels, which may be empty. Where
        the model does not know, `abstained` says why; `prediction` is then its best guess.
        """
        async with inbox.receive(request) as uploads:
            model = _require_model(slot)
            limit_s = inbox.limits.deadline_s if x_deadline_ms is None else x_deadline_ms / 1000
            images = [upload.data for upload in uploads]
            answers = await _answer_in_time(request, batcher, model, images, min(limit_s, inbox.limits.deadline_s))
        for answer in answers:
            if isinstance(answer, Answer):
                meters.count_prediction(answer)
        if log:
            _note(log, request, model, uploads, answers)
        request_id = request.state.request_id
        described = _make_answer(
            uploads, answers, lambda answer: _describe(answer, top_k, embedding=embedding), request_id
        )
        return JSONResponse({**described, "model": _name_model(model), **name_request(request)})


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

    @app.get("/model", response_model=ModelAnswer, responses={503: ERRORS[503]}, summary="Which model answers")
    async def describe_model() -> dict[str, Any]:
        model = _require_model(slot)
        known = {"task", "classes", "image_size", "resize", "threshold", "thresholds", "abstain", "dataset"}
        card = {key: value for key, value in asdict(model.predictor.card).items() if key in known}
        return {**_name_model(model), "entry": model.entry, "problem": slot.problem, **card}

    @app.get("/metrics", response_class=Response, summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(meters.scrape(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_page(app: FastAPI) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:
        return RedirectResponse("docs")


def _require_model(slot: ModelSlot) -> ServedModel:
    if slot.current is None:
        found = f"no model is ready ({slot.problem})" if slot.problem else "no model is ready"
        raise RequestError(found, todo="Try again in a moment.", status=503, reason_code="not_ready")
    return slot.current


def _name_model(model: ServedModel) -> dict[str, Any]:
    return {"name": model.name, "version": model.version, "digest": model.digest}


async def _answer_in_time(
    request: Request, batcher: Batcher, model: ServedModel, images: Sequence[bytes], limit_s: float
) -> list[Answer | ImageError]:
    """Answer while the client is there, and for so long at most after its request began.

    Raises:
        QueueFull: it takes longer. ClientDisconnect: nobody waits for the answer.
    """
    left_s = limit_s - (time.perf_counter() - request.state.started)
    work = asyncio.create_task(batcher.predict(model, images, limit_s=left_s))
    gone = asyncio.ensure_future(request.receive())  # the body is read: nothing but the end can come
    try:
        done, _ = await asyncio.wait((work, gone), timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
    finally:
        work.cancel()
        gone.cancel()
    if gone in done:
        raise ClientDisconnect
    if work in done:
        return work.result()
    raise batcher.refuse("has no answer in time", f"one within {limit_s:g} s", "deadline")


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
    }
