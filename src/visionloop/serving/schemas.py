"""What the server says, as pydantic models: they make the answers' schema for /docs and `openapi.json`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ModelName(BaseModel):
    """Which model answered. `version` is null for a bundle that is served by its path."""

    name: str
    version: str | None
    digest: str


class ErrorDetail(BaseModel):
    """`code` is stable, for programs; `message` is for people."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail
    request_id: str


class ImageAnswer(BaseModel):
    """The answer for one image."""

    prediction: str
    confidence: float = Field(ge=0, le=1)
    probabilities: dict[str, float]


class PredictAnswer(ImageAnswer):
    """The answer to a request with one image."""

    model: ModelName
    request_id: str


class FileAnswer(ImageAnswer):
    """The answer for one of several files."""

    file: str | None


class FileError(BaseModel):
    """What is wrong with one of several files; the others are answered all the same."""

    file: str | None
    error: ErrorDetail


class BatchAnswer(BaseModel):
    """The answer to a request with several files, in their order."""

    results: list[FileAnswer | FileError]
    model: ModelName
    request_id: str


class ReadyAnswer(BaseModel):
    """`problem` says why a newer model is not served; null when there is none."""

    status: str
    model: ModelName
    problem: str | None


class ModelAnswer(ModelName):
    """The model that answers now, and where it came from."""

    model_config = ConfigDict(protected_namespaces=())

    entry: int | None
    task: str
    classes: list[str]
    image_size: tuple[int, int]
    resize: str
    threshold: float | None
    dataset: dict[str, Any]
    problem: str | None
