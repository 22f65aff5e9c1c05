"""The validation images of a model that are nearest to an image, by the embeddings that its bundle holds.

They say on what a model's answer rests: images like this one, and their labels. Dimensions: n images, d embedding size.
"""

import asyncio
import io
import threading
import zipfile
from dataclasses import asdict, dataclass
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from visionloop.bundle import Bundle
from visionloop.confidence import pick_rows, scale_to_one
from visionloop.errors import BundleError
from visionloop.predictor import FloatArray, Predictor
from visionloop.serving.answers import Answer
from visionloop.serving.body import RequestError
from visionloop.serving.envelope import name_request
from visionloop.serving.schemas import (
    ERRORS,
    PREDICT_BODY,
    REFUSED,
    ErrorAnswer,
    SimilarAnswer,
    SimilarBatchAnswer,
)
from visionloop.serving.service import Deadline, Service, make_answer, name_model
from visionloop.serving.swap import ServedModel

MAX_NEIGHBOURS = 100


@dataclass(frozen=True)
class Neighbour:
    """A validation image, by the sha256 of its file, and its cosine distance (0 to 2)."""

    sha256: str
    labels: tuple[str, ...]
    distance: float


class Reference:
    """The validation images of one model: at most 5,000, evenly picked; 26 MB at 1,280 numbers each."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises RequestError for a bundle that does not say which images its embeddings are of."""
        classes = bundle.card.classes
        try:
            with np.load(io.BytesIO(bundle.read("reference.npz")), allow_pickle=False) as arrays:
                sha256_n, label_n, embedding_nd = (arrays[k] for k in ("sha256_n", "label_n", "embedding_nd"))
                several_nk = arrays.get("targets_nk")
            rows = pick_rows(len(sha256_n))
            self._unit_nd = scale_to_one(embedding_nd[rows])
            self._sha256_n = [sha256_n[row].decode() for row in rows]
            chosen = [[label_n[row]] if several_nk is None else np.flatnonzero(several_nk[row]) for row in rows]
            self._labels_n = [tuple(classes[k] for k in each if k >= 0) for each in chosen]
            if not len(rows) or self._unit_nd.ndim != 2 or not np.isfinite(self._unit_nd).all():
                raise ValueError(f"embeddings of shape {embedding_nd.shape}")
        except (BundleError, ValueError, KeyError, IndexError, AttributeError, zipfile.BadZipFile) as exc:
            raise _make_refusal() from exc

    def find(self, embedding_d: FloatArray, k: int) -> list[Neighbour]:
        """Return the k nearest, nearest first. Raises RequestError."""
        if len(embedding_d) != self._unit_nd.shape[1]:
            raise _make_refusal()
        distance_n = np.clip(1 - self._unit_nd @ scale_to_one(embedding_d[None])[0], 0, 2)
        nearest = np.argsort(distance_n, kind="stable")[:k]
        return [Neighbour(self._sha256_n[row], self._labels_n[row], float(distance_n[row])) for row in nearest]


def add_similar(app: FastAPI, service: Service) -> None:
    """Add the route."""
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
        limit = service.read_limit(x_deadline_ms)
        async with service.take_in(request, limit) as uploads:
            model = service.note_model(request)
            reference = await asyncio.to_thread(load, model)
            answers = await service.answer(request, model, uploads, limit)

        def describe(answer: Answer) -> dict[str, Any]:
            return {"neighbours": [asdict(each) for each in reference.find(answer.embedding_d, k)]}

        described = await asyncio.to_thread(make_answer, uploads, answers, describe, request.state.request_id)
        return JSONResponse({**described, "model": name_model(model), **name_request(request)})


def _make_refusal() -> RequestError:
    found, todo = "this model does not say which images it was judged with", "Train it anew."
    return RequestError(found, todo=todo, status=409, reason_code="no_reference")
