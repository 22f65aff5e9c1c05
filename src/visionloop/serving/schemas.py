"""The server's answers as pydantic models. /docs and `openapi.json` are made from them."""

from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field


class ModelName(BaseModel):
    """Which model answered, and in which engine: `onnxruntime int8`, a runtime and a precision.

    `version` is null for a bundle that is served by its path.
    """

    name: str
    version: str | None
    digest: str
    engine: str


class ErrorDetail(BaseModel):
    """`code` is stable, for programs; `message` is for people."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """The body of every answer that is not 2xx: a problem by RFC 9457.

    `code` is stable, for programs; `detail` is for people. `error` holds the same two as before, and goes away with the
    next release.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    error: ErrorDetail
    request_id: str
    client_request_id: str | None


class ImageTiming(BaseModel):
    """Where the time for an image went. `network_ms` is that of its whole batch.

    `cached`: this server answered the same bytes with the same model before, and remembers it.
    """

    queue_ms: float
    decode_ms: float
    network_ms: float
    cached: bool


class ImageAnswer(BaseModel):
    """The answer for one image. `confidence` is the probability of `prediction`; all probabilities sum to 1.

    With `top_k` there are only the highest, the highest first. `embedding` is there where it was asked for.
    `abstained` says in words why the model does not know: treat `prediction` as its best guess. null: it answers.
    """

    prediction: str
    confidence: float = Field(ge=0, le=1)
    abstained: str | None
    probabilities: dict[str, float]
    embedding: list[float] = Field(default=[], description="Only if the request has embedding=true")
    timing: ImageTiming


class LabelsAnswer(ImageAnswer):
    """The answer of a model whose task is multilabel.

    `labels` are those that the image has, any number, in the order of the model's classes. `prediction` is the same as
    one text, joined by `|`. Each class has its own probability. `confidence` is that of the whole answer if labels are
    independent: the product over all classes of p for a given label and 1 - p for one not given.
    """

    labels: list[str]


class ToRequest(BaseModel):
    """The part of an answer that concerns the whole request.

    `request_id` is the server's own, which no other request has; `client_request_id` is the X-Request-ID that came.
    """

    model: ModelName
    request_id: str
    client_request_id: str | None


class PredictAnswer(ToRequest, ImageAnswer):
    """The answer to a request with one image."""


class PredictLabelsAnswer(ToRequest, LabelsAnswer):
    """The answer to a request with one image, of a multilabel model."""


class FileAnswer(ImageAnswer):
    """The answer for one of several files. `request_id` is that of this file, for feedback."""

    file: str | None
    request_id: str


class FileLabelsAnswer(LabelsAnswer):
    """The answer for one of several files, of a multilabel model. `request_id` is that of this file, for feedback."""

    file: str | None
    request_id: str


class FileError(BaseModel):
    """What is wrong with one of several files. The others are still answered."""

    file: str | None
    error: ErrorDetail


class BatchAnswer(ToRequest):
    """The answer to a request with several files, in their order."""

    results: list[FileLabelsAnswer | FileAnswer | FileError]


class FeedbackAnswer(BaseModel):
    """What was taken, and is in the store."""

    request_id: str
    labels: list[str]
    status: str


class FeedbackError(BaseModel):
    """What is wrong with one of several items. The others are still taken."""

    request_id: str | None
    error: ErrorDetail


class FeedbackListAnswer(BaseModel):
    """The answer to a list of feedback, in its order."""

    results: list[FeedbackAnswer | FeedbackError]


class ReadyAnswer(BaseModel):
    """`problem` says why a newer model is not served; null when there is none."""

    status: str
    model: ModelName
    problem: str | None


class EngineAnswer(BaseModel):
    """The engine that answers, a runtime and a precision as `onnxruntime int8`; and the figures it was chosen by."""

    engine: str
    why: str


class ModelAnswer(ModelName):
    """The model that answers now, and where it came from.

    `since` is when it was promoted, `task` binary, multiclass or multilabel. `threshold` is of binary (null
    otherwise): the probability of the second class from which it is the answer. `thresholds` are of multilabel
    (null otherwise): by class, the probability from which a label is given. `abstain` is the rule of when it does
    not know (null: it always answers): below which `confidence`, beyond which `distance` to the `neighbours`-th
    nearest validation image. `runtime` says which engine answers, and why that one.
    """

    model_config = ConfigDict(protected_namespaces=())

    entry: int | None
    since: str | None
    task: str
    classes: list[str]
    image_size: Annotated[list[int], Field(min_length=2, max_length=2)]
    resize: str
    threshold: float | None
    thresholds: dict[str, float] | None
    abstain: dict[str, Any] | None
    dataset: dict[str, Any]
    problem: str | None
    runtime: EngineAnswer


class Neighbour(BaseModel):
    """A validation image of the model, by the sha256 of its file. `distance` is from 0 to 2.

    `image` is the address of a small picture of it, below that of the server; 404 where the store does not have it.
    """

    sha256: str
    labels: list[str]
    distance: float = Field(ge=0, le=2)
    image: str


class ImageNeighbours(BaseModel):
    """The nearest validation images of one image, nearest first."""

    neighbours: list[Neighbour]


class SimilarAnswer(ToRequest, ImageNeighbours):
    """The answer to a request with one image."""


class FileNeighbours(ImageNeighbours):
    """The answer for one of several files."""

    file: str | None


class SimilarBatchAnswer(ToRequest):
    """The answer to a request with several files, in their order."""

    results: list[FileNeighbours | FileError]


class ReloadAnswer(BaseModel):
    """What a look at the ledger came to. `swapped`: another model, or another entry of the ledger, answers now."""

    model: ModelName
    entry: int | None
    swapped: bool
    problem: str | None


_FILE = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "array", "minItems": 1, "items": _FILE}},
}
_JSON = {
    "oneOf": [
        {"type": "object", "required": [name], "properties": {name: value}, "additionalProperties": False}
        for name, value in (("image", _BASE64), ("images", {"type": "array", "minItems": 1, "items": _BASE64}))
    ]
}
# The name of a content type does not matter, but a range like image/* would promise formats that are refused.
PREDICT_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": _FORM},
        "application/json": {"schema": _JSON},
        **{f"image/{kind}": {"schema": _FILE} for kind in ("jpeg", "png", "webp", "avif")},
        "application/octet-stream": {"schema": _FILE},
    },
}
_ONE_FORM = {"type": "object", "required": ["file"], "properties": {"file": _FILE}}
EXPLAIN_BODY = {
    "required": True,
    "content": {
        **PREDICT_BODY["content"],  # type: ignore[dict-item]
        "multipart/form-data": {"schema": _ONE_FORM},
        "application/json": {"schema": _JSON["oneOf"][0]},
    },
}
VIDEO_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": _ONE_FORM},
        **{f"video/{kind}": {"schema": _FILE} for kind in ("mp4", "quicktime", "webm", "x-matroska", "x-msvideo")},
        "application/octet-stream": {"schema": _FILE},
    },
}
_REFUSALS = {
    400: "No image in the request, or a malformed form or JSON",
    408: "The body came too slowly",
    413: "The body is too large, or has too many images",
    415: "Not an image, or a format that is not read",
    422: "A damaged image, too many pixels, or an option of no such value",
    503: "The queue is full, there is no answer in time, or no model is ready; see Retry-After",
}
PROBLEM = "application/problem+json"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _REFUSALS.items()
}
REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "A host that the server does not answer to"},
    401: {"model": ErrorAnswer, "description": "The server has keys, and the request has no valid one"},
    403: {"model": ErrorAnswer, "description": "The key lacks the role, or a page of another origin asks"},
    429: {"model": ErrorAnswer, "description": "The client is above its rate; see Retry-After"},
}
PICTURE_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorAnswer, "description": "Not one that /similar names, forgotten, or not in the store"},
    409: {"model": ErrorAnswer, "description": "The model does not hold which images it was judged with"},
    422: ERRORS[422],
    503: {"model": ErrorAnswer, "description": "The store does not give it now, or no model is ready"},
}
NOT_FOLLOWING: dict[str, Any] = {"model": ErrorAnswer, "description": "It follows no ledger"}
KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Where the server has keys"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def is_of_protocol(path: str) -> bool:
    """Say whether a path is one of the Open Inference Protocol, which has a form of errors of its own."""
    return path == "/v2" or path.startswith("/v2/")


def complete_document(app: FastAPI) -> None:
    """Add the keys to the document, and the content type of errors, which FastAPI takes for that of the answer."""
    make = app.openapi

    def make_openapi() -> dict[str, Any]:
        document = make()
        document["components"]["securitySchemes"] = KEY_SCHEMES
        document["security"] = [{}, *({name: []} for name in KEY_SCHEMES)]
        own = [routes for path, routes in document["paths"].items() if not is_of_protocol(path)]
        for route in (route for path in own for route in path.values()):
            for status, response in route["responses"].items():
                content = response.get("content", {})
                if status >= "400" and "application/json" in content:
                    content[PROBLEM] = content.pop("application/json")
        return document

    app.openapi = make_openapi  # type: ignore[method-assign]


_LABEL = {"type": "string", "minLength": 1, "maxLength": 200}
_FEEDBACK = {
    "type": "object",
    "required": ["request_id"],
    "properties": {
        "request_id": {"type": "string", "description": "Of the answer; of one of several files: that of its result"},
        "label": _LABEL,
        "labels": {"type": "array", "items": _LABEL, "description": "Instead of `label`, for multilabel"},
        "who": {"type": ["string", "null"], "maxLength": 200, "description": "Who says so"},
        "allow_new": {"type": "boolean", "default": False, "description": "Take a label that is no class of the model"},
    },
    "oneOf": [{"required": ["label"]}, {"required": ["labels"]}],
    "additionalProperties": False,
}
_FEEDBACK_ITEM = {"description": "As one alone. What is wrong with it is said in its result, and spoils no other"}
_FEEDBACK_LIST = {
    "type": "object",
    "required": ["feedback"],
    "properties": {"feedback": {"type": "array", "minItems": 1, "maxItems": 1000, "items": _FEEDBACK_ITEM}},
    "additionalProperties": False,
}
FEEDBACK_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"oneOf": [_FEEDBACK, _FEEDBACK_LIST]}}},
}
FEEDBACK_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "Malformed JSON, or not the keys that are known",
        404: "No request id of this server, an answer that is too old, or a server that writes no log",
        408: "The body came too slowly",
        413: "The body is too large, or has too many items",
        415: "The body is compressed",
        422: "A label that is no class of the model",
        429: "More feedback than your share; see Retry-After",
        503: "The store does not take it now, or no model is ready: send it again",
    }.items()
}
