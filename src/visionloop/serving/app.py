"""The HTTP interface of a model: routes, answers and errors. Builds no model, reads no settings, opens no socket.

A wrong request gets a 4xx. A full server, or one without a model, answers 503. Only our own bugs give a 500.
"""

import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visionloop import __version__
from visionloop.errors import ImageError, VisionLoopError
from visionloop.records import Prediction
from visionloop.serving.batcher import Batcher, QueueFull
from visionloop.serving.body import Inbox, Limits, RequestError, Upload
from visionloop.serving.metrics import Meters
from visionloop.serving.schemas import (
    BatchAnswer,
    ErrorAnswer,
    ModelAnswer,
    PredictAnswer,
    PredictLabelsAnswer,
    ReadyAnswer,
)
from visionloop.serving.swap import ModelSlot, ServedModel

IMAGE_STATUS = {"empty": 400, "not_an_image": 415, "too_large": 422, "damaged": 422}
PREDICT = "/predict"
RETRY_AFTER_S = "1"
PAGE = Path(__file__).parent / "page" / "docs.html"
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:"
)
REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,64}$")
_FILE = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {"file": {"type": "array", "items": _FILE}}}
PREDICT_BODY = {
    "required": True,
    "content": {"multipart/form-data": {"schema": _FORM}, "image/*": {"schema": _FILE}},
}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "No image in the request, or a malformed form"},
    408: {"model": ErrorAnswer, "description": "The body came too slowly"},
    413: {"model": ErrorAnswer, "description": "The body is too large, or the form has too many parts"},
    415: {"model": ErrorAnswer, "description": "Not an image, or a format that is not read"},
    422: {"model": ErrorAnswer, "description": "A damaged image, or too many pixels"},
    503: {"model": ErrorAnswer, "description": "The queue is full, or no model is ready; see Retry-After"},
}

log = logging.getLogger(__name__)


def make_app(slot: ModelSlot, limits: Limits | None = None) -> FastAPI:
    """Build the application. The model in `slot` may change, or be missing, at any time."""
    limits = limits or Limits()
    meters = Meters(slot, lambda: batcher.depth)
    batcher = Batcher(
        max_batch=limits.max_batch,
        max_queue=limits.max_queue,
        max_pixels=limits.max_pixels,
        on_batch=meters.count_batch,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="visionloop", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(_Envelope, meters=meters)
    for kind in (VisionLoopError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, _answer_error)
    _add_predict(app, slot, Inbox(limits), batcher, meters)
    _add_state(app, slot, meters)
    _add_page(app)
    return app


def _add_predict(app: FastAPI, slot: ModelSlot, inbox: Inbox, batcher: Batcher, meters: Meters) -> None:
    @app.post(
        PREDICT,
        response_model=PredictLabelsAnswer | PredictAnswer | BatchAnswer,
        responses=ERRORS,
        openapi_extra={"requestBody": PREDICT_BODY},
        summary="Classify one image, or several",
    )
    async def predict(request: Request) -> Response:
        """Send the image as the body, or one or more files in a form. JPEG, PNG, WebP or AVIF; the bytes decide.

        A model whose task is multilabel (see /model) also answers with the list of labels, which may be empty. Where
        the model does not know, `abstained` says why; `prediction` is then its best guess.
        """
        async with inbox.receive(request) as uploads:
            model = _require_model(slot)
            answers = await batcher.predict(model, [upload.data for upload in uploads])
        for answer in answers:
            if isinstance(answer, Prediction):
                meters.count_prediction(answer)
        return JSONResponse(
            {
                **_make_answer(uploads, answers),
                "model": _name_model(model),
                "request_id": request.state.request_id,
            }
        )


def _add_state(app: FastAPI, slot: ModelSlot, meters: Meters) -> None:
    @app.get("/health/live", summary="Is the process alive")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", response_model=ReadyAnswer, responses={503: ERRORS[503]}, summary="Can it answer")
    async def ready() -> dict[str, Any]:
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


def _make_answer(uploads: Sequence[Upload], answers: Sequence[Prediction | ImageError]) -> dict[str, Any]:
    """Return the answer for one upload, or a list of answers and errors for several.

    Raises:
        ImageError: the only upload cannot be used.
    """
    if len(answers) > 1:
        return {"results": [{"file": u.name, **_describe(a)} for u, a in zip(uploads, answers, strict=True)]}
    if isinstance(answers[0], ImageError):
        raise answers[0]
    return _describe(answers[0])


def _describe(answer: Prediction | ImageError) -> dict[str, Any]:
    if isinstance(answer, ImageError):
        return {"error": {"code": answer.reason_code, "message": str(answer)}}
    labels = {} if answer.labels is None else {"labels": list(answer.labels)}
    return {
        "prediction": answer.prediction,
        **labels,
        "confidence": answer.confidence,
        "abstained": answer.abstained,
        "probabilities": answer.probabilities,
    }


async def _answer_error(request: Request, exc: Exception) -> Response:
    status, code, message = _translate(exc)
    request.state.outcome = code
    headers = dict(getattr(exc, "headers", None) or {})
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = RETRY_AFTER_S
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
        headers["Connection"] = "close"  # the rest of the body is still on its way
    body = {"error": {"code": code, "message": message}, "request_id": request.state.request_id}
    return JSONResponse(body, status, headers)


def _translate(exc: Exception) -> tuple[int, str, str]:
    """Return the HTTP status, the stable code and the message of an error."""
    if isinstance(exc, RequestError):
        return exc.status, exc.reason_code, str(exc)
    if isinstance(exc, ImageError):
        return IMAGE_STATUS.get(exc.reason_code, 422), exc.reason_code, str(exc)
    if isinstance(exc, QueueFull):
        return 503, "busy", str(exc)
    if isinstance(exc, ClientDisconnect):
        return 400, "disconnected", "request: the client went away."
    if isinstance(exc, HTTPException):
        code = HTTPStatus(exc.status_code).phrase.lower().replace(" ", "_")
        return exc.status_code, code, f"request: {exc.detail}."
    log.error("unexpected error", exc_info=exc)
    return 500, "internal", "server: an unexpected error; see its log under the request id."


class _Envelope:
    """Wraps every request: sets its id, counts it, and turns any other exception into a 500.

    It is plain ASGI, so it never buffers a body.
    """

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if REQUEST_ID.match(sent_id) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, outcome="ok")
        started, begun = time.perf_counter(), False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as exc:
            log.error("request %s failed", request_id)
            if begun:
                raise
            await (await _answer_error(Request(scope), exc))(scope, receive, send_with_id)
        finally:
            if scope["path"] == PREDICT and scope["method"] == "POST":
                self._meters.count_request(state["outcome"], time.perf_counter() - started)
