"""The validation images of a model that are nearest to an image, by the embeddings that its bundle holds.

They say on what a model's answer rests: images like this one, and their labels. Dimensions: n images, d embedding size.
A picture of each can be had from the store, small and encoded anew: of these images alone, so that who may ask a model
sees no others of a store that models share.
"""

import asyncio
import io
import threading
import zipfile
from functools import partial
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import numpy as np
import simplejpeg
from fastapi import FastAPI, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from visionloop.bundle import Bundle
from visionloop.confidence import pick_rows, scale_to_one
from visionloop.data.images import load_sized_array
from visionloop.data.manifest import make_image_key
from visionloop.data.tombstones import make_tombstone_key
from visionloop.errors import BundleError, ImageError, ObjectMissing, StoreError
from visionloop.predictor import FloatArray, Predictor
from visionloop.serving.answers import Answer
from visionloop.serving.aside import Aside
from visionloop.serving.body import RequestError
from visionloop.serving.envelope import name_request
from visionloop.serving.schemas import (
    ERRORS,
    PICTURE_ERRORS,
    PREDICT_BODY,
    REFUSED,
    ErrorAnswer,
    SimilarAnswer,
    SimilarBatchAnswer,
)
from visionloop.serving.service import Deadline, Service, make_answer, name_model
from visionloop.serving.swap import ServedModel
from visionloop.store import ObjectStore

MAX_NEIGHBOURS = 100
MIN_PX, SHOWN_PX, MAX_PX, QUALITY = 16, 256, 512, 85
STORE_S = 10.0


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
            self._known = frozenset(self._sha256_n)
            chosen = [[label_n[row]] if several_nk is None else np.flatnonzero(several_nk[row]) for row in rows]
            self._labels_n = [tuple(classes[k] for k in each if k >= 0) for each in chosen]
            if not len(rows) or self._unit_nd.ndim != 2 or not np.isfinite(self._unit_nd).all():
                raise ValueError(f"embeddings of shape {embedding_nd.shape}")
        except (BundleError, ValueError, KeyError, IndexError, AttributeError, zipfile.BadZipFile) as exc:
            raise _make_refusal() from exc

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._known

    def find(self, embedding_d: FloatArray, k: int) -> list[dict[str, Any]]:
        """Return the k nearest, nearest first, each as a `schemas.Neighbour`. Raises RequestError."""
        if len(embedding_d) != self._unit_nd.shape[1]:
            raise _make_refusal()
        distance_n = np.clip(1 - self._unit_nd @ scale_to_one(embedding_d[None])[0], 0, 2)
        nearest = np.argsort(distance_n, kind="stable")[:k]
        return [self._describe(int(row), float(distance_n[row])) for row in nearest]

    def _describe(self, row: int, distance: float) -> dict[str, Any]:
        sha256, address = self._sha256_n[row], f"/images/{self._sha256_n[row]}?px={SHOWN_PX}"
        return {"sha256": sha256, "labels": self._labels_n[row], "distance": distance, "image": address}


class References:
    """The reference of each model, read when it is first asked for. A model that is gone takes its own with it."""

    def __init__(self) -> None:
        self._held = WeakKeyDictionary[Predictor, Reference]()
        self._loading = threading.Lock()

    async def load(self, model: ServedModel) -> Reference:
        """Return it; the first time it is read from the disk. Raises RequestError."""
        held = self._held.get(model.predictor)
        return held if held is not None else await asyncio.to_thread(self._read, model)

    def _read(self, model: ServedModel) -> Reference:
        with self._loading:
            if model.predictor not in self._held:
                self._held[model.predictor] = Reference(model.predictor.bundle)
            return self._held[model.predictor]


def add_similar(app: FastAPI, service: Service, store: ObjectStore | None) -> None:
    """Add the routes. The pictures are in `store`; None: there are none."""
    references = References()

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

        `distance` is the cosine distance of the embeddings, from 0 to 2, as in `visionloop similar`. `image` is the
        address of a small picture, with the same key.
        """
        limit = service.read_limit(x_deadline_ms)
        async with service.take_in(request, limit) as uploads:
            model = service.note_model(request)
            reference = await references.load(model)
            answers = await service.answer(request, model, [upload.data for upload in uploads], limit)

        def describe(answer: Answer) -> dict[str, Any]:
            return {"neighbours": reference.find(answer.embedding_d, k)}

        described = await asyncio.to_thread(make_answer, uploads, answers, describe, request.state.request_id)
        return JSONResponse({**described, "model": name_model(model), **name_request(request)})

    threads = Aside("pictures", 2)

    @app.get(
        "/images/{sha256}",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}, **REFUSED, **PICTURE_ERRORS},
        summary="A small picture of a validation image of the model",
    )
    async def picture(
        request: Request,
        sha256: Annotated[str, Path(pattern="^[0-9a-f]{64}$")],
        px: Annotated[int, Query(ge=MIN_PX, le=MAX_PX, description="Of its longer side")] = SHOWN_PX,
    ) -> Response:
        """Only those that /similar names, with the model that answers now. Upright, and without its notes."""
        model = service.note_model(request)
        if store is None or sha256 not in await references.load(model):
            raise _make_absence()
        try:
            async with asyncio.timeout(STORE_S):
                data = await threads.run(partial(draw_picture, store, model, sha256, px))
        except (StoreError, TimeoutError) as exc:
            found = "the store does not give it now"
            raise RequestError(found, todo="Try again.", status=503, reason_code="store_away") from exc
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, no-store"})


def draw_picture(store: ObjectStore, model: ServedModel, sha256: str, px: int) -> bytes:
    """Return an image of the store as a JPEG, upright, whose longer side has `px` pixels.

    Raises:
        RequestError: it was forgotten, is not in the store, or cannot be drawn. StoreError: the store is away.
    """
    if store.exists(make_tombstone_key(model.name, sha256)):
        raise _make_absence()
    try:
        data, limit = store.get(make_image_key(sha256)), model.predictor.card.max_pixels
        square, size = load_sized_array(data, "image", size_hw=(px, px), resize="letterbox", max_pixels=limit)
    except (ObjectMissing, ImageError) as exc:
        raise _make_absence() from exc
    width, height = (max(1, round(px * side / max(size))) for side in size)
    left, top = round((px - width) / 2), round((px - height) / 2)  # without the bars
    pixels = np.ascontiguousarray(square[top : top + height, left : left + width])
    return bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorspace="RGB"))


def _make_absence() -> RequestError:
    found = "there is no such picture"
    return RequestError(found, "that of an image that /similar names", status=404, reason_code="not_found")


def _make_refusal() -> RequestError:
    found, todo = "this model does not say which images it was judged with", "Train it anew."
    return RequestError(found, todo=todo, status=409, reason_code="no_reference")
