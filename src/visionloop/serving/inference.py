"""The Open Inference Protocol v2 (KServe, Triton): health, metadata, and `infer` with tensors in JSON or in binary.

What a tensor is on the wire is in `tensors.py`.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from visionloop import __version__
from visionloop.errors import ImageError, shorten
from visionloop.serving.answers import Answer
from visionloop.serving.body import LARGE_BYTES, RequestError, Upload, WholeReader
from visionloop.serving.metrics import Meters
from visionloop.serving.predict import Note, note_answers
from visionloop.serving.service import Deadline, Service
from visionloop.serving.swap import ServedModel
from visionloop.serving.tensors import BINARY, REQUEST_SCHEMA, make_response, read_request

EXTENSION = "binary_tensor_data"
INFER = r"/v2/models/[^/]+(?:/versions/[^/]+)?/infer"
SHOWN_CHARS = 80


class ProtocolError(BaseModel):
    """The body of every answer below /v2 that is not 2xx."""

    error: str


class ServerMetadata(BaseModel):
    """`extensions`: what of the protocol there is beside its core."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """-1 in `shape` is any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The model. `versions` is empty for a bundle that is served by its path."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """The model that answers now."""

    name: str
    ready: bool


class AnswerTensor(BaseModel):
    """Flat, in row-major order; `data` is missing where it comes in binary."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] = {}
    data: list[Any] = []


class InferAnswer(BaseModel):
    """`parameters` names the request (`request_id`; image i has the id `request_id.i`, for feedback) and the model."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    model_name: str
    model_version: str
    parameters: dict[str, str]
    outputs: list[AnswerTensor]


_REFUSALS = {
    400: "Not the tensors that the metadata states, too many of them, or an image that cannot be read",
    401: "The server has keys, and the request has no valid one",
    403: "The key lacks the role, or a page of another origin asks",
    404: "There is no such model here",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is compressed",
    422: "An option or a header of no such value",
    429: "The client is above its rate; see Retry-After",
    503: "The queue is full, there is no answer in time, or no model is ready; see Retry-After",
}


def _describe_refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ProtocolError, "description": _REFUSALS[status]} for status in statuses}


_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": REQUEST_SCHEMA},
        BINARY: {"schema": {"type": "string", "format": "binary"}},
    },
}


def add_inference(app: FastAPI, service: Service, meters: Meters, note: Note | None) -> None:
    """Add the routes. `note` is called with each answer for an encoded image."""
    _add_health(app, service)
    _add_models(app, service)
    reading = asyncio.Lock()
    asked: dict[str, Any] = {
        "response_model": InferAnswer,
        "responses": {
            200: {"content": {BINARY: {"schema": {"type": "string", "format": "binary"}}}},
            **_describe_refusals(*_REFUSALS),
        },
        "openapi_extra": {"requestBody": _BODY},
        "summary": "Open Inference Protocol: answer for tensors",
    }

    @app.post("/v2/models/{name}/infer", **asked)
    @app.post("/v2/models/{name}/versions/{version}/infer", **asked)
    async def infer(
        request: Request,
        name: str,
        version: str | None = None,
        inference_header_content_length: Annotated[
            int | None, Header(ge=0, description="So many bytes of the body are JSON, the others tensors")
        ] = None,
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """Send `images` as UINT8 [n, h, w, 3], of the model's size, or as BYTES [n], encoded files.

        Outputs: `probabilities` FP32 [n, k], in the order of the classes (see /model), `label` BYTES [n], `abstained`
        BOOL [n]: the model does not know, and `label` is its best guess; and, where asked for, `embedding` FP32 [n, d].
        """
        limit = service.read_limit(x_deadline_ms)
        check = partial(service.batcher.require_room, 1, limit.seconds, is_patient=limit.is_said)
        async with service.inbox.receive_by(request, lambda: WholeReader(bytes), check) as body:
            model = _find_model(service, name, version)
            service.note_model(request)
            card, most = model.predictor.card, service.inbox.limits.max_files
            read = partial(read_request, body, inference_header_content_length, card, most)
            async with reading:  # a list of numbers takes far more memory than its text
                asked_for, images = await asyncio.to_thread(read) if len(body) > LARGE_BYTES else read()
            request.state.access.charge(request, len(images))
            found = await service.answer(request, model, images, limit)
        answers = _require_all(found)
        for answer in answers:
            meters.count_answer(answer)
        files = [Upload(None, image, in_list=True) for image in images if isinstance(image, bytes)]
        if note and files:
            note_answers(note, request, model, files, answers)
        return make_response(asked_for, model, answers, request.state.request_id)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/v2", response_model=ServerMetadata, responses=_describe_refusals(400, 401, 403, 429))
    async def describe_server() -> dict[str, Any]:
        return {"name": "visionloop", "version": __version__, "extensions": [EXTENSION]}

    @app.get("/v2/health/live", responses=_describe_refusals(503))
    async def is_live() -> dict[str, bool]:
        service.require_live()
        return {"live": True}

    @app.get("/v2/health/ready", responses=_describe_refusals(503))
    async def is_ready() -> dict[str, bool]:
        service.require_ready()
        return {"ready": True}


def _add_models(app: FastAPI, service: Service) -> None:
    refusals = _describe_refusals(400, 401, 403, 404, 422, 429, 503)

    @app.get("/v2/models/{name}", response_model=ModelMetadata, responses=refusals)
    @app.get("/v2/models/{name}/versions/{version}", response_model=ModelMetadata, responses=refusals)
    async def describe(name: str, version: str | None = None) -> dict[str, Any]:
        model = _find_model(service, name, version)
        height, width = model.predictor.card.image_size
        images = {"name": "images", "datatype": "UINT8", "shape": [-1, height, width, 3]}
        outputs = [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(model.predictor.card.classes)]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "abstained", "datatype": "BOOL", "shape": [-1]},
            {"name": "embedding", "datatype": "FP32", "shape": [-1, -1]},
        ]
        versions = [model.version] if model.version else []
        engine = model.predictor.engine
        return {"name": name, "versions": versions, "platform": engine, "inputs": [images], "outputs": outputs}

    @app.get("/v2/models/{name}/ready", response_model=ModelReady, responses=refusals)
    @app.get("/v2/models/{name}/versions/{version}/ready", response_model=ModelReady, responses=refusals)
    async def is_model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        _find_model(service, name, version)
        service.require_ready()
        return {"name": name, "ready": True}


def _find_model(service: Service, name: str, version: str | None) -> ServedModel:
    """Return the model that answers now, if it is that one. Raises RequestError."""
    model = service.require_model()
    if name != model.name or version not in (None, model.version):
        known = f"{model.name!r}, version {model.version}" if model.version else f"{model.name!r} without a version"
        asked = [f"{name[:SHOWN_CHARS]!r}", *([f"version {version[:SHOWN_CHARS]!r}"] if version else [])]
        raise RequestError(f"there is no model {', '.join(asked)}", known, status=404, reason_code="not_found")
    return model


def _require_all(found: Sequence[Answer | ImageError]) -> list[Answer]:
    """Return the answers: the protocol knows none for a part of a request. Raises RequestError."""
    bad = [f"{i} ({one.found})" for i, one in enumerate(found) if isinstance(one, ImageError)]
    if bad:
        found_ = f"images that cannot be used: {shorten(bad)}"
        raise RequestError(found_, "JPEG, PNG, WebP or AVIF, whole and within the limits", "Send the others alone.")
    return [one for one in found if isinstance(one, Answer)]
